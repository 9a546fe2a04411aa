"""`timm-robust statistics`: how an attack shifts the inputs of norm layers, and batch against population statistics."""
import math
from dataclasses import dataclass
from typing import ClassVar, List, Tuple, Union

from ..evaluation import make_plan
from ..evaluation.norm_statistics import compare_bn_modes
from ..evaluation.render import text_table
from ..evaluation.render.figures import plot_statistics
from ..settings import setting, to_mapping
from .arguments import SettingsParser
from .measuring import MeasuringConfig, measuring_parser, open_measurement

__all__ = ['StatisticsConfig', 'build_parser', 'run']

_NOTE = (
    'With batch statistics a prediction depends on the other images in its batch, and attacks perturb whole batches. '
    'The accuracy therefore holds for these batches only. `timm-robust diagnose` checks it further.')


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(MeasuringConfig):
    """Settings of `timm-robust statistics`."""
    file_name: ClassVar[str] = 'statistics.json'
    usual_examples: ClassVar[int] = 1000
    attacks: Union[str, Tuple[str, ...]] = setting(
        'clean,fgsm,pgd20', 'comma-separated: clean, fgsm, fgsm-rs, bim, pgd, mim, cw', metavar='NAMES')


def build_parser() -> SettingsParser:
    """The parser of `timm-robust statistics`."""
    return measuring_parser(
        'statistics',
        'Compare the statistics of clean and adversarial batches with the tracked ones, layer by layer (RobustNorm, '
        'figure 2), and accuracy with population and with batch statistics (RobustNorm, tables 1, 2 and 4). Writes '
        'statistics.json and statistics.png.',
        StatisticsConfig, without=('bn_mode', 'gamma'))


def run(argv: List[str]) -> None:
    """Compare the statistics; print and write them."""
    config, found = open_measurement(build_parser(), StatisticsConfig, argv)
    measured = compare_bn_modes(
        found.subject.model, found.images, found.labels, make_plan(config.attacks, found.threat),
        batch_size=found.batch_size, seed=config.seed)
    found.write({
        'accuracy': measured.accuracy,
        'layers': {
            kind: {name: to_mapping(layer) for name, layer in layers.items()}
            for kind, layers in (('clean', measured.clean), ('adversarial', measured.adversarial))},
    })
    figure = found.path.with_name('statistics.png')
    plot_statistics(measured.rows, f'{found.name}\n{found.sample}, PGD-20 on population statistics', figure)
    names = list(measured.accuracy['population'])
    print(f'\n{found.name}: {found.sample}\n')
    print(text_table(
        [(mode, *(f'{own[n]:.1f}' for n in names)) for mode, own in measured.accuracy.items()],
        ('statistics', *(f'{n} %' for n in names))))
    print(f'\n{_NOTE}\n')
    worst = sorted(
        measured.rows, key=lambda row: 0 if math.isnan(row.adversarial_mean) else -row.adversarial_mean)[:5]
    print('Layers whose mean shifts most under attack, in units of the tracked spread (clean batches for comparison):')
    print(text_table(
        [(r.layer, f'{r.adversarial_mean:.3f}', f'{r.clean_mean:.3f}') for r in worst],
        ('layer', 'adversarial', 'clean')))
    print(f'\nWritten: {found.path}, {figure}')
