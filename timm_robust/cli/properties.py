"""`timm-robust properties`: measure decision margin, boundary thickness and smoothness (NoFrost, table 5)."""
import math
from dataclasses import dataclass
from typing import ClassVar, List

from ..errors import check_at_least
from ..evaluation.properties import measure_properties
from ..evaluation.render import text_table
from ..settings import setting
from .arguments import SettingsParser
from .measuring import MeasuringConfig, measuring_parser, open_measurement

__all__ = ['PropertiesConfig', 'build_parser', 'run']

_HEADER = ('property', 'mean', 'standard error', 'images')


@dataclass(frozen=True, kw_only=True)
class PropertiesConfig(MeasuringConfig):
    """Settings of `timm-robust properties`."""
    file_name: ClassVar[str] = 'properties.json'
    usual_examples: ClassVar[int] = 500
    steps: int = setting(20, 'steps of each attack', metavar='N')
    num_targets: int = setting(3, 'number of wrong classes to search for the margin', metavar='N')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('steps', self.steps)
        check_at_least('num_targets', self.num_targets)


def build_parser() -> SettingsParser:
    """The parser of `timm-robust properties`."""
    return measuring_parser(
        'properties',
        'Measure decision margin M (L2 distance to the boundary along adversarial directions, over correctly '
        'classified images), boundary thickness T (L2 length over which neither class clearly wins) and smoothness D '
        '(largest KL divergence within eps). Robust networks tend to have large M and T and small D. Writes '
        'properties.json.',
        PropertiesConfig)


def run(argv: List[str]) -> None:
    """Measure the properties; print and write them."""
    config, found = open_measurement(build_parser(), PropertiesConfig, argv)
    measured = measure_properties(
        found.subject.model, found.images, found.labels, found.threat, batch_size=found.batch_size,
        seed=config.seed, steps=config.steps, num_targets=config.num_targets)
    found.write({
        'clean_accuracy': 100 * sum(measured.correct) / len(measured.correct),
        'correct': [int(c) for c in measured.correct],
        'properties': {
            p.name: [v if math.isfinite(v) else None for v in p.values] for p in measured.properties},
    })
    print(f'\n{found.name}: {found.sample}, {config.steps} steps\n')
    print(text_table(
        [(p.name, f'{p.mean:.4g}', f'{p.standard_error:.2g}', f'{len(p.finite):,}') for p in measured.properties],
        _HEADER))
    for p in measured.properties:
        if p.unbounded:
            print(f'\n{p.name}: no boundary found for {p.unbounded} images; the mean excludes them.')
    print(f'\nWritten: {found.path}')
