from .accuracy import AttackResult, Evaluation, evaluate_attacks
from .report import format_table, plot_eps_sweep, plot_images, weights_sha256, write_results
from .specs import AttackSpec, parse_attacks

__all__ = [
    'AttackResult',
    'AttackSpec',
    'Evaluation',
    'evaluate_attacks',
    'format_table',
    'parse_attacks',
    'plot_eps_sweep',
    'plot_images',
    'weights_sha256',
    'write_results',
]
