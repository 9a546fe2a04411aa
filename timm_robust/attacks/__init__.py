from .context import crafting, input_gradient
from .losses import cross_entropy, hard_labels, margin
from .pgd import ATTACKS, bim, cw_linf, fgsm, fgsm_rs, mim, pgd, pgd_targeted
from .threat import InputSpace, ThreatModel, madry_step_size, nofrost_step_size, parse_eps

__all__ = [
    'ATTACKS',
    'InputSpace',
    'ThreatModel',
    'bim',
    'crafting',
    'cross_entropy',
    'cw_linf',
    'fgsm',
    'fgsm_rs',
    'hard_labels',
    'input_gradient',
    'madry_step_size',
    'margin',
    'mim',
    'nofrost_step_size',
    'parse_eps',
    'pgd',
    'pgd_targeted',
]
