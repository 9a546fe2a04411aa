from .accuracy import evaluate_attacks
from .diagnostics import Finding, diagnose
from .examples import example_images
from .figures import plot_eps_sweep, plot_images
from .journal import Journal
from .outcome import AttackResult, Evaluation
from .report import (
    build_results,
    evaluation_table,
    format_table,
    write_report,
)
from .specs import AttackSpec, parse_attacks
from .surface import loss_surface, plot_loss_surface

__all__ = [
    'AttackResult',
    'AttackSpec',
    'Evaluation',
    'Finding',
    'Journal',
    'build_results',
    'diagnose',
    'evaluate_attacks',
    'evaluation_table',
    'example_images',
    'format_table',
    'loss_surface',
    'parse_attacks',
    'plot_eps_sweep',
    'plot_images',
    'plot_loss_surface',
    'write_report',
]
