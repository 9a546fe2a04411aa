"""What the content of results.json says, in words and rows that every form of report shares."""
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..attacks import ThreatModel

__all__ = [
    'GAMMA_HEADER',
    'HEADER',
    'facts',
    'gamma_rows',
    'headline',
    'notes',
    'robust_accuracy',
    'sweep_rows',
    'table_rows',
    'title',
    'warnings',
]

HEADER = ('attack', 'threat model', 'steps', 'attacked', 'accuracy under it alone %', 'worst case so far %', 'seconds')
GAMMA_HEADER = ('gamma', 'clean accuracy %', 'robust accuracy %')
GAMMA = 'Two BatchNorms: 0 is that of clean images, 1 that of adversarial ones, between they are mixed.'

SURFACE = (
    'Mean cross-entropy of clean images moved by up to eps: to the right along the gradient, '
    'upwards along random signs. Where the gradient is of use to an attack, the loss rises smoothly to the right.')

_BOUND = 'These attacks bound robustness from above; stronger ones (AutoAttack) leave less.'
_BY_BATCH = (
    'this network normalizes by the batch at hand. A prediction depends on the other images in its batch, and these '
    'accuracies hold for these batches only.')
_ONLY_LEFT = (
    '"Worst case so far" counts images that withstand this attack and all above it. Each attack ran only on images '
    'that withstood those above it, so its accuracy alone is not known.')
_ON_ALL = (
    '"Accuracy under it alone": each attack ran on all images classified correctly. "Worst case so far" counts images '
    'that withstand it and all above it.')


def _number(value: Optional[float]) -> str:
    return '-' if value is None else f'{value:.2f}'


def _attacks(results: Dict[str, Any]) -> List[Dict[str, Any]]:
    return [r for r in results['results'] if 'norm' in r['attack']]


def _effort(attack: Dict[str, Any]) -> str:
    """Steps or queries of an attack as described in results.json."""
    if 'parts' in attack:
        return f"{len(attack['parts'])} attacks"
    if 'query_limit' in attack:
        return f"{attack['query_limit']} queries"
    if 'norm' not in attack:
        return '-'
    restarts = attack.get('restarts', 1)
    return f"{attack.get('steps', 1)}{f' x {restarts}' if restarts > 1 else ''}"


def table_rows(results: Dict[str, Any]) -> List[Sequence[str]]:
    """Rows under `HEADER` from the content of results.json, with all a robust accuracy must be reported with."""
    rows = []
    for found in results['results']:
        attack = found['attack']
        is_attack = 'norm' in attack
        rows.append((
            attack['name'],
            results['threat_model']['text'] if is_attack else '-',
            _effort(attack),
            str(found['attacked']) if is_attack else '-',
            _number(found['accuracy']),
            _number(found['worst_case_so_far']),
            f"{found['seconds']:.1f}",
        ))
    return rows


def reading(results: Dict[str, Any]) -> List[str]:
    """What the columns of the table mean."""
    if not _attacks(results):
        return []
    return [_ONLY_LEFT if results['settings']['worst_case'] else _ON_ALL]


def _transfer(results: Dict[str, Any]) -> List[str]:
    surrogate = results['settings'].get('surrogate')
    return [
        f'Black-box transfer: the attacks were crafted on {surrogate}, not on this network.'] if surrogate else []


def bounded(results: Dict[str, Any]) -> List[str]:
    """That the accuracy is an upper bound, unless AutoAttack was run."""
    attacks = _attacks(results)
    return [_BOUND] if attacks and not any('parts' in r['attack'] for r in attacks) else []


def notes(results: Dict[str, Any]) -> List[str]:
    """What a reader of the table has to know, in sentences."""
    by_batch = results['settings']['batch_dependent']
    sample = f"{results['data']['num_examples']} images, seed {results['settings']['seed']}"
    return [
        f"{sample}, {results['threat_model']['text']}.",
        *_transfer(results),
        *reading(results),
        *bounded(results),
        *(['WARNING: ' + _BY_BATCH] if by_batch else []),
    ]


def title(results: Dict[str, Any]) -> str:
    """Model and data set."""
    model, data = results['model'], results['data']
    name = ' '.join(filter(None, (model['name'], model.get('checkpoint'))))
    source = data.get('dataset')
    # a folder of images is told by where it lies
    source = data.get('data_dir') if source in (None, '', 'ImageFolder') else source
    return f'{name} on {source}' + (f" ({data['split']})" if data.get('split') else '')


def accuracy_of(result: Dict[str, Any]) -> float:
    """Accuracy in percent under one attack; with those before it where it ran only on what they left."""
    return result['worst_case_so_far'] if result['accuracy'] is None else result['accuracy']


def clean_accuracy(results: Dict[str, Any]) -> Optional[float]:
    """Accuracy in percent on clean images, None if it was not asked for."""
    return next((r['accuracy'] for r in results['results'] if 'norm' not in r['attack']), None)


def robust_accuracy(results: Dict[str, Any]) -> Tuple[Optional[float], List[str]]:
    """The robust accuracy to quote, in percent, and the attacks behind it.

    It is AutoAttack's if that was run (together with the attacks before it where it ran only on what they left), else
    that of all attacks together.
    """
    attacks = _attacks(results)
    names = [r['attack']['name'] for r in attacks]
    quoted = [
        (accuracy_of(r), names[:i + 1] if r['accuracy'] is None else [names[i]])
        for i, r in enumerate(attacks) if 'parts' in r['attack']]
    if quoted:
        return min(quoted)
    return (results['worst_case_accuracy'], names) if attacks else (None, [])


def headline(results: Dict[str, Any]) -> str:
    """Clean and robust accuracy with all they depend on, in a sentence or two."""
    clean, (robust, names) = clean_accuracy(results), robust_accuracy(results)
    where = f"{results['data']['num_examples']:,} images, seed {results['settings']['seed']}"
    start = '' if clean is None else f'Clean accuracy {clean:.2f} %, '
    if robust is None:
        return f'{start}{where}. No attack was run: this says nothing about robustness.'
    text = f"{start}robust accuracy {'at most ' if bounded(results) else ''}{robust:.2f} % "
    text += f'under {names[0]}' if len(names) == 1 else f"in the worst case of {', '.join(names[:-1])} and {names[-1]}"
    text += f" ({results['threat_model']['text']}, {where})."
    if results['worst_case_accuracy'] < robust:
        text += f" All attacks together leave {results['worst_case_accuracy']:.2f} %."
    return ' '.join([text[0].upper() + text[1:], *bounded(results)])


def warnings(results: Dict[str, Any]) -> List[Tuple[str, str]]:
    """What casts doubt on the accuracies, as pairs of verdict and text."""
    found = [(v, f) for v in ('alarm', 'warning') for f in results.get('diagnostics', []) if f['verdict'] == v]
    return [
        *([('warning', _BY_BATCH[0].upper() + _BY_BATCH[1:])] if results['settings']['batch_dependent'] else []),
        *(('warning', text) for text in _transfer(results)),
        *((verdict, f"{spoken(f['name'])}: {f['text']}") for verdict, f in found),
    ]


def spoken(name: str) -> str:
    """A name such as 'zero_gradients' for people: 'Zero gradients'."""
    return name.replace('_', ' ').capitalize()


def class_name(index: int, names: Optional[Sequence[str]]) -> str:
    """Name of a class; a network may know classes that the data set has no name for."""
    return str(names[index]) if names and index < len(names) else f'class {index}'


def sweep_rows(results: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Eps and accuracy of the curve over eps, ascending."""
    norm = results['threat_model']['norm']
    points = sorted((p['eps'], p['accuracy']) for p in results.get('eps_sweep', []))
    return [(str(ThreatModel(norm, eps)).rpartition(' ')[2], _number(accuracy)) for eps, accuracy in points]


def gamma_rows(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    """Gamma, clean and robust accuracy of a network with two BatchNorms."""
    return [
        (f"{p['gamma']:g}", _number(p['clean']), _number(p['robust'])) for p in results.get('mbnat_gamma_sweep', [])]


def sweep_attack(results: Dict[str, Any]) -> str:
    """The attack behind the curves over eps and gamma: the last one."""
    return _attacks(results)[-1]['attack']['name'] if _attacks(results) else 'no attack'


def _settings(attack: Dict[str, Any]) -> str:
    shown = [
        f"{k} {f'{v:g}' if isinstance(v, float) else v}" for k, v in attack.items()
        if k not in ('name', 'norm', 'eps', 'parts')]
    parts = [f"{p['name']} ({_settings(p)})" for p in attack.get('parts', [])]
    return ', '.join(shown + parts)


def facts(results: Dict[str, Any]) -> Dict[str, List[Tuple[str, str]]]:
    """What it takes to repeat the evaluation, by group, as pairs of name and value; the command apart."""
    hidden = ('indices', 'labels', 'command')
    groups = {
        group: [
            (key, str(value)) for key, value in results[group].items()
            if key not in hidden and value not in (None, '', {}, [])]
        for group in ('settings', 'threat_model', 'model', 'data', 'versions')}
    groups['attacks'] = [(r['attack']['name'], _settings(r['attack'])) for r in _attacks(results)]
    return {spoken(group): rows for group, rows in groups.items() if rows}
