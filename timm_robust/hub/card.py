"""A model card whose every number comes from results.json of the same weights."""
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import is_model, save_for_hf

from ..errors import InputError
from ..evaluation import AttackOutcome, EvaluationReport
from ..evaluation.render import words
from ..inputs import weights_sha256, write_json
from ..models._build import WEIGHTS_DIR
from .papers import citations

__all__ = ['FIGURES', 'build_card_folder', 'card_text', 'read_results', 'result_rows']

FIGURES = ('eps_sweep.png', 'gamma_sweep.png', 'loss_surface.png', 'images.png')
_HEADER = ('data', 'images', 'threat model', 'attack', 'steps', 'seed', 'accuracy %')


def _order(report: EvaluationReport) -> List[AttackOutcome]:
    """AutoAttack first, then other attacks from the strongest, clean accuracy last."""
    return sorted(report.attacks, key=lambda a: (a.is_clean, not a.is_autoattack, report.accuracy(a.name)))


def result_rows(evaluations: Sequence[EvaluationReport], data_names: Sequence[str]) -> List[Tuple[str, ...]]:
    """Rows of the card's table, each with all an accuracy depends on."""
    return [
        (name, f'{report.data.num_examples:,}', str(outcome.threat or '-'),
         outcome.name + ('' if outcome.complete else ' after those above it'), outcome.effort or '-',
         str(report.settings.seed), f'{report.accuracy(outcome.name):.2f}')
        for report, name in zip(evaluations, data_names) for outcome in _order(report)]


def _eval_results(evaluations: Sequence[EvaluationReport], data_names: Sequence[str]) -> List[EvalResult]:
    """The same numbers as metadata."""
    found = []
    for report, name in zip(evaluations, data_names):
        for outcome in _order(report):
            threat = outcome.threat
            of_attack = {'attack': outcome.name, 'norm': threat.norm, 'eps': threat.eps} if threat else {}
            found.append(EvalResult(
                task_type='image-classification',
                task_name='Image Classification',
                dataset_type=name.split(' ')[0].lower(),
                dataset_name=name,
                dataset_split=report.data.split,
                metric_type='accuracy',
                metric_name=f'Robust accuracy ({outcome.name}, {threat})' if threat else 'Clean accuracy',
                metric_value=round(report.accuracy(outcome.name), 2),
                metric_args={
                    **of_attack, 'num_examples': report.data.num_examples, 'seed': report.settings.seed},
            ))
    return found


def _warnings(evaluations: Sequence[EvaluationReport]) -> str:
    """What casts doubt on the numbers, and whether anybody looked."""
    lines = [f'> **{verdict.upper()}** {text}' for report in evaluations for verdict, text in words.warnings(report)]
    looked = any(report.findings for report in evaluations)
    if not looked:
        lines.append('> **NOT CHECKED** Nobody ran `timm-robust diagnose` on these weights: gradients may be masked.')
    elif not lines:
        lines.append('The checks for masked gradients and dependence on the batch found nothing.')
    if not _has_autoattack(evaluations):
        lines.append('> **NO AUTOATTACK** These numbers bound robustness from above; AutoAttack leaves less.')
    return '\n>\n'.join(dict.fromkeys(lines))


def _has_autoattack(evaluations: Sequence[EvaluationReport]) -> bool:
    return any(outcome.is_autoattack for report in evaluations for outcome in report.attacks)


def _code(text: str, language: str = '') -> str:
    return f'```{language}\n{text}\n```'


def card_text(
        name: str,
        evaluations: Sequence[EvaluationReport],
        data_names: Sequence[str],
        *,
        repo_id: str,
        license: str,
        architecture: str,
        model_args: Dict[str, Any],
        objective: str = '',
        command: str = '',
        origin: str = '',
        selection: str = '',
        figures: Sequence[str] = (),
) -> str:
    """The card as Markdown with metadata.

    Args:
        name: Model and tag, 'nofrost_resnet50.nofrost_linf8_in1k'.
        evaluations: All of these weights.
        data_names: How to call the data of each.
        repo_id: Where the model is published.
        license: Identifier of the licence of the weights.
        architecture: Name by which the config asks for the network.
        model_args: Arguments of the model.
        objective: What the model was trained with by this package.
        command: Command of that training.
        origin: Where weights come from that were not trained by this package.
        selection: Which weights of the run these are and by what they were chosen.
        figures: Names of figures in the folder.
    """
    model = name.split('.')[0]
    data = ModelCardData(
        model_name=name,
        library_name='timm',
        license=license,
        tags=['image-classification', 'timm', 'adversarial-robustness', 'timm-robust'],
        pipeline_tag='image-classification',
        eval_results=_eval_results(evaluations, data_names),
    )
    rows = result_rows(evaluations, data_names)
    table = '\n'.join(f"| {' | '.join(cells)} |" for cells in [_HEADER, ['---'] * len(_HEADER), *rows])
    plain = architecture != model or not model.startswith(('nofrost', 'robustnorm'))
    load = f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()"
    how = _code(f'import timm, timm_robust  # pip install timm-robust\n\n{load}', 'python')
    if plain:
        how += f'\n\nPlain timm loads it too, as its own `{architecture}`:\n\n'
        how += _code(f'import timm\n\n{load}', 'python')
    else:
        how += f'\n\nWithout the package timm does not know `{architecture}`: the import registers it.'
    if (WEIGHTS_DIR / f'{name}.safetensors').is_file():
        how += f" These weights travel in it: `timm.create_model('{name}', pretrained=True)` needs no network."
    blocks = [
        f'# {name}',
        f"A `{model}`{f' ({_arguments(model_args)})' if model_args else ''} "
        + (f'trained with the objective `{objective}` of timm_robust.' if objective else f'from {origin}.'),
        '## Accuracy', table, _warnings(evaluations),
        'Each attack ran on the images classified correctly, within its threat model in pixel units on [0, 1]. '
        '`results.json` holds the outcome of every image and the commands.',
        *(f'![{figure.removesuffix(".png")}]({figure})' for figure in figures),
        '## Use', how,
        '## Training', _code(command) if command else f'See {origin}.', *([f'{selection}.'] if selection else []),
        '## Measured by', _code('\n'.join(report.settings.command for report in evaluations)),
        '## Citation', _code('\n\n'.join(citations(model, objective, _has_autoattack(evaluations))), 'bibtex'),
    ]
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(blocks) + '\n').content


def _arguments(model_args: Dict[str, Any]) -> str:
    return ', '.join(f'{k}={v}' for k, v in model_args.items())


def _plain_architecture(name: str) -> str:
    """timm's own name of a network that is timm's own, else the name it has here."""
    own = name.replace('nofrost', 'nf', 1)
    return own if name.startswith('nofrost') and is_model(own) else name


def _check(evaluations: Sequence[EvaluationReport], paths: Sequence[str], digest: str) -> None:
    for path, report in zip(paths, evaluations):
        measured = report.model.weights_sha256
        if measured != digest:
            raise InputError(
                f'--results {path}: was measured on other weights ({measured[:12]}) than these ({digest[:12]}), '
                'evaluate these')


def read_results(path: str) -> EvaluationReport:
    """The report in a results.json of `timm-robust eval`."""
    try:
        report = EvaluationReport.load(path)
    except InputError as error:
        raise error.about('results', path) from error
    if not report.attacks:
        raise InputError('holds no attack', 'evaluate again', argument='results', value=path)
    return report


def build_card_folder(
        folder: Path,
        name: str,
        model: nn.Module,
        results: Sequence[str],
        *,
        model_args: Optional[Dict[str, Any]] = None,
        **facts: Any,
) -> List[Path]:
    """Write everything a Hub repository of a model holds; the same input gives the same bytes.

    Args:
        folder: Where to.
        name: Model and tag.
        model: The network with its weights.
        results: Paths of results.json; figures beside them are taken along.
        model_args: Arguments the model was built with.
        **facts: Arguments of `card_text`.

    Returns:
        The files written.

    Raises:
        InputError: If a results.json was measured on other weights.
    """
    architecture, tag = name.split('.', 1)
    digest = weights_sha256(model)
    evaluations = [read_results(path) for path in results]
    _check(evaluations, results, digest)
    seen = evaluations[0].model
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for index, path in enumerate(results):
        for figure in FIGURES:
            if (Path(path).parent / figure).exists():
                figures[f'{index}_{figure}' if index else figure] = Path(path).parent / figure
    for target, source in figures.items():
        shutil.copyfile(source, folder / target)
    published_as = _plain_architecture(architecture)
    save_for_hf(
        model,
        str(folder),
        safe_serialization=True,
        model_config={
            'architecture': published_as,
            'weights_sha256': digest,
            'pretrained_cfg': {'tag': tag, 'license': facts['license']},
        },
        model_args=model_args or None,
        data_config={
            k: getattr(seen, k) for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
    )
    write_json(folder / 'results.json', {
        'weights_sha256': digest, 'data_names': list(facts['data_names']),
        'evaluations': [report.to_dict() for report in evaluations]})
    text = card_text(
        name, evaluations, architecture=published_as, model_args=model_args or {}, figures=list(figures), **facts)
    (folder / 'README.md').write_text(text)
    return sorted(folder.iterdir())
