"""`timm-robust models`: list the models of this package, where their weights are, and their accuracies."""
from fnmatch import fnmatch
from pathlib import Path
from typing import List, Optional, Tuple

import timm
from timm.models import model_entrypoint

from ..evaluation import EvaluationReport, accuracy_on_all_images, read_reports
from ..evaluation.render import text_table
from ..models._build import WEIGHTS_DIR, stored_weights
from .arguments import Parser

__all__ = ['build_parser', 'model_rows', 'run']

_HEADER = ('model and tag', 'weights', 'data', 'images attacked', 'threat model', 'clean %', 'AutoAttack %')


def build_parser() -> Parser:
    """The parser of `timm-robust models`."""
    parser = Parser(
        prog='timm-robust models',
        description='List the models of this package with their tags. Packaged weights load offline, others once they '
                    'are on the Hub. Accuracies come from the model cards.',
        examples=("timm-robust models 'nofrost_*cifar*'",))
    parser.add_argument('filter', nargs='?', default='*', metavar='PATTERN', help="for example 'nofrost_*cifar*'")
    parser.add_argument('--cards', default='hub_cards', metavar='DIR', help='card folders (default: %(default)s)')
    return parser


def _accuracies(path: Path) -> Tuple[str, ...]:
    """Data, images, threat model, clean and AutoAttack accuracy; of the first evaluation with AutoAttack, if any.

    Clean accuracy is of all images, if the file has it.
    """
    def autoattack(report: EvaluationReport) -> Optional[float]:
        found = next((report.accuracy(a.name) for a in report.attacks if a.is_autoattack), None)
        return found if found is None or len(report.threats) == 1 else report.worst_case_accuracy

    pairs = read_reports(path)
    name, report = next((p for p in pairs if autoattack(p[1]) is not None), pairs[0])
    clean = accuracy_on_all_images(name, pairs)
    clean = report.clean_accuracy if clean is None else clean
    return (name, f'{report.data.num_examples:,}', str(report.threat), *(
        '-' if v is None else f'{v:.2f}' for v in (clean, autoattack(report))))


def model_rows(pattern: str, cards: Path) -> List[Tuple[str, ...]]:
    """Table rows, one for each model and tag that matches the pattern."""
    rows = []
    own = {name for name in timm.list_models() if model_entrypoint(name).__module__.startswith('timm_robust.')}
    for name in (n for n in timm.list_models(include_tags=True) if n.partition('.')[0] in own):
        cfg = timm.get_pretrained_cfg(name)
        packaged = WEIGHTS_DIR / f'{name}.safetensors'
        on_hub = cfg is not None and cfg.hf_hub_id
        where = (
            'in the package' if packaged.is_file() else 'in the local store' if stored_weights(name) else
            'hf-hub, once published' if on_hub else 'none')
        measured = next(
            (p for p in (packaged.with_suffix('.json'), cards / name / 'results.json') if p.is_file()), None)
        known = _accuracies(measured) if measured else ('-',) * 5
        if fnmatch(name, pattern):
            rows.append((name, where, *known))
    return rows


def run(argv: List[str]) -> None:
    """Print the table of models."""
    args = build_parser().parse_args(argv)
    print(text_table(model_rows(args.filter, Path(args.cards)), _HEADER))
