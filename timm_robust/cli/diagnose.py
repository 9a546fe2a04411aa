"""`timm-robust diagnose`: check a network for gradient masking and other false robustness."""
from dataclasses import dataclass
from typing import ClassVar, List

from ..attacks import make_fast_model
from ..evaluation import diagnose, loss_surface
from ..evaluation.render import findings_text, plot_loss_surface
from ..evaluation.subject import open_surrogate
from ..settings import setting, to_mapping
from .arguments import SettingsParser
from .measuring import MeasuringConfig, measuring_parser, open_measurement

__all__ = ['DiagnoseConfig', 'build_parser', 'run']


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(MeasuringConfig):
    """Settings of `timm-robust diagnose`."""
    file_name: ClassVar[str] = 'diagnostics.json'
    usual_examples: ClassVar[int] = 100
    surrogate: str = setting(
        '', 'another network with the same classes to craft attacks on (a timm model or the folder of an export)',
        metavar='MODEL')
    surrogate_checkpoint: str = setting('', 'weights of the surrogate', metavar='PATH')


def build_parser() -> SettingsParser:
    """The parser of `timm-robust diagnose`."""
    return measuring_parser(
        'diagnose',
        'Look for gradient masking and other false robustness, and for predictions that depend on the batch. Writes '
        'diagnostics.json and loss_surface.png.',
        DiagnoseConfig)


def run(argv: List[str]) -> None:
    """Run the checks, write the findings and plot the loss surface."""
    config, found = open_measurement(build_parser(), DiagnoseConfig, argv)
    surrogate = open_surrogate(config.surrogate, found.subject, config.surrogate_checkpoint)
    model, x, y, threat = found.subject.model, found.images, found.labels, found.threat
    findings = diagnose(
        model, x, y, threat, batch_size=found.batch_size, seed=config.seed,
        surrogate=surrogate.model if surrogate else None, fast_model=make_fast_model(model, x[:8]))
    surface = loss_surface(model, x, y, threat, batch_size=found.batch_size, seed=config.seed)
    found.write({'findings': [to_mapping(f) for f in findings], 'surface': to_mapping(surface)})
    figure = found.path.with_name('loss_surface.png')
    plot_loss_surface(surface, f'{found.name}, {found.sample}', figure)
    print(f'\n{found.name}: {found.sample}\n\n{findings_text(findings)}\n\nWritten: {found.path}, {figure}')
