"""`timm-robust statistics`: what an attack does to normalization, and population against batch statistics."""
import math
from dataclasses import dataclass
from typing import List

from ..errors import InputError
from ..evaluation import make_plan
from ..evaluation.norm_statistics import compare_bn_modes
from ..evaluation.render import text_table
from ..evaluation.render.figures import plot_statistics
from ..inputs import write_json
from ..precision import float32_proper
from ..settings import setting, to_mapping
from .arguments import Parser
from .measuring import MeasuringConfig, measuring_parser, open_measurement, read_flags
from .outputs import measured_facts

__all__ = ['StatisticsConfig', 'build_parser', 'run']

_NUM_EXAMPLES = 1000
_NOTE = (
    'With batch statistics a prediction depends on the other images of its batch, and the attacks move whole batches; '
    'accuracy there holds for these batches only. `timm-robust diagnose` says what else to think of it.')


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(MeasuringConfig):
    """Settings of `timm-robust statistics`."""
    attacks: str = setting('clean,fgsm,pgd20', 'clean, fgsm, fgsm-rs, bim, pgd, mim, cw', metavar='NAMES')


def build_parser() -> Parser:
    """The parser of `timm-robust statistics`."""
    return measuring_parser(
        'statistics',
        'Compare the statistics of clean and adversarial batches with the tracked ones, layer by layer (RobustNorm, '
        'figure 2), and accuracy with population and with batch statistics (RobustNorm, tables 1, 2 and 4).',
        StatisticsConfig, 'statistics.json and statistics.png', _NUM_EXAMPLES)


def run(argv: List[str]) -> None:
    """Compare."""
    args, config = read_flags(build_parser(), StatisticsConfig, argv)
    if args.bn_mode:
        raise InputError('all of them are compared', 'leave it out', argument='bn_mode', value=args.bn_mode)
    if args.gamma is not None:
        raise InputError('mixes tracked statistics alone', 'leave it out', argument='gamma', value=args.gamma)
    if args.batch_size == 1:
        raise InputError('has no statistics of a batch', 'choose at least 2', argument='batch_size', value=1)
    found = open_measurement(args, config, 'statistics.json', _NUM_EXAMPLES)
    with float32_proper():
        measured = compare_bn_modes(
            found.subject.model, found.images, found.labels, make_plan(config.attacks, found.threat),
            batch_size=found.source.batch_size, seed=config.seed)
    found.folder.mkdir(parents=True, exist_ok=True)
    write_json(found.folder / 'statistics.json', {
        **measured_facts('statistics', argv, found.subject, found.source, found.threat, config.seed),
        'accuracy': measured.accuracy,
        'layers': {
            kind: {name: to_mapping(layer) for name, layer in layers.items()}
            for kind, layers in (('clean', measured.clean), ('adversarial', measured.adversarial))},
    })
    sample = f'{len(found.images)} images, batch {found.source.batch_size}, {found.threat}, seed {config.seed}'
    plot_statistics(
        measured.rows, f'{found.name}\n{sample}, PGD-20 on population statistics', found.folder / 'statistics.png')
    names = list(measured.accuracy['population'])
    print(f'\n{found.name}: {sample}\n')
    print(text_table(
        [(mode, *(f'{own[n]:.1f}' for n in names)) for mode, own in measured.accuracy.items()],
        ('statistics', *(f'{n} %' for n in names))))
    print(f'\n{_NOTE}\n')
    worst = sorted(
        measured.rows, key=lambda row: 0 if math.isnan(row.adversarial_mean) else -row.adversarial_mean)[:5]
    print('Layers whose mean an attack moves most, in tracked spreads (clean batches for comparison):')
    print(text_table(
        [(r.layer, f'{r.adversarial_mean:.3f}', f'{r.clean_mean:.3f}') for r in worst],
        ('layer', 'adversarial', 'clean')))
    print(f"\nWritten: {found.folder / 'statistics.json'}, {found.folder / 'statistics.png'}")
