"""Conversion of results in format 2, which had other names and untyped mappings."""
from typing import Any, Dict, List, Mapping

__all__ = ['upgraded']

_NORMS = {'linf': 'Linf', 'l2': 'L2'}
_RENAMED = {'norm_statistics': 'bn_mode', 'mbnat_gamma': 'gamma', 'search_dtype': 'fast_dtype'}


def _renamed(content: Mapping[str, Any]) -> Dict[str, Any]:
    return {_RENAMED.get(key, key): value for key, value in content.items()}


def _settings(attack: Mapping[str, Any]) -> Dict[str, Any]:
    """The attack in the form of `Attack.to_dict`, with all its recorded settings."""
    if 'parts' in attack:
        return {'attack': 'autoattack'}
    kept = {k: v for k, v in attack.items() if k not in ('name', 'norm', 'eps', 'function')}
    return {'attack': str(attack.get('function', attack['name'])).replace('_', '-'), **kept}


def _effort(attack: Mapping[str, Any]) -> str:
    if 'parts' in attack:
        return f"{len(attack['parts'])} attacks"
    if 'query_limit' in attack:
        return f"{attack['query_limit']} queries"
    if 'norm' not in attack:
        return ''
    restarts = attack.get('restarts', 1)
    return f"{attack.get('steps', 1)}{f' x {restarts}' if restarts > 1 else ''}"


def _count(accuracy: float, total: int) -> int:
    return round(accuracy * total / 100)


def upgraded(content: Mapping[str, Any]) -> Dict[str, Any]:
    """Convert the content of a results.json from format 2 to format 3, without the format number.

    Raises:
        KeyError, TypeError, AttributeError: If it is not in format 2.
    """
    data, threat = dict(content['data']), dict(content['threat_model'])
    total = data.pop('num_examples')
    threat.update(norm=_NORMS[threat['norm']], text=threat['text'].replace(' eps ', ' '))
    attacks: List[Dict[str, Any]] = []
    for row in content['results']:
        attack = row['attack']
        attacks.append({
            'name': attack['name'],
            'attack': _settings(attack),
            'members': [_settings(part) for part in attack.get('parts', ())],
            'threat': threat if 'norm' in attack else None,
            'effort': _effort(attack),
            'correct': [None if c is None else c == 1 for c in row['correct']],
            **{key: row[key] for key in ('attacked', 'seconds', 'accuracy', 'worst_case_so_far')},
        })
    return {
        'model': _renamed(content['model']),
        'data': data,
        'threat': threat,
        'settings': _renamed(content['settings']),
        'attacks': attacks,
        'worst_case_accuracy': content['worst_case_accuracy'],
        'eps_sweep': [
            {'eps': p['eps'], 'num_correct': _count(p['accuracy'], total), 'num_examples': total}
            for p in sorted(content.get('eps_sweep', ()), key=lambda p: p['eps'])],
        'gamma_sweep': [
            {'gamma': p['gamma'], 'num_clean': _count(p['clean'], total), 'num_robust': _count(p['robust'], total),
             'num_examples': total} for p in content.get('mbnat_gamma_sweep', ())],
        'findings': content.get('diagnostics', []),
        'versions': content['versions'],
    }
