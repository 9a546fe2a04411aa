"""`timm-robust diagnose`: is the robustness of a network real?"""
from dataclasses import dataclass
from typing import List

from ..attacks import make_fast_model
from ..evaluation import diagnose, loss_surface
from ..evaluation.render import findings_text, plot_loss_surface
from ..evaluation.sources import open_surrogate
from ..inputs import write_json
from ..precision import float32_proper
from ..settings import setting, to_mapping
from .arguments import Parser
from .measuring import MeasuringConfig, measuring_parser, open_measurement, read_flags
from .outputs import measured_facts

__all__ = ['DiagnoseConfig', 'build_parser', 'run']

_NUM_EXAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(MeasuringConfig):
    """Settings of `timm-robust diagnose`."""
    surrogate: str = setting(
        '', 'another network of the same classes (a timm model, the folder of an export), to craft attacks on',
        metavar='MODEL')
    surrogate_checkpoint: str = setting('', 'weights of the surrogate', metavar='PATH')


def build_parser() -> Parser:
    """The parser of `timm-robust diagnose`."""
    return measuring_parser(
        'diagnose',
        'Look for signs that a network hides its gradients, or depends on the batch, instead of being robust.',
        DiagnoseConfig, 'diagnostics.json and loss_surface.png', _NUM_EXAMPLES)


def run(argv: List[str]) -> None:
    """Diagnose."""
    args, config = read_flags(build_parser(), DiagnoseConfig, argv)
    found = open_measurement(args, config, 'diagnostics.json', _NUM_EXAMPLES)
    surrogate = open_surrogate(config.surrogate, found.subject, config.surrogate_checkpoint)
    model, x, y, threat = found.subject.model, found.images, found.labels, found.threat
    with float32_proper():
        findings = diagnose(
            model, x, y, threat, batch_size=found.source.batch_size, seed=config.seed,
            surrogate=surrogate.model if surrogate else None, fast_model=make_fast_model(model, x[:8]))
        surface = loss_surface(model, x, y, threat, batch_size=found.source.batch_size, seed=config.seed)
    found.folder.mkdir(parents=True, exist_ok=True)
    write_json(found.folder / 'diagnostics.json', {
        **measured_facts('diagnose', argv, found.subject, found.source, threat, config.seed),
        'findings': [to_mapping(f) for f in findings],
        'surface': to_mapping(surface),
    })
    sample = f'{threat}, {len(x)} images, seed {config.seed}'
    plot_loss_surface(surface, f'{found.name}, {sample}', found.folder / 'loss_surface.png')
    print(f'\n{found.name}: {sample}\n')
    print(findings_text(findings))
    print(f"\nWritten: {found.folder / 'diagnostics.json'}, {found.folder / 'loss_surface.png'}")
