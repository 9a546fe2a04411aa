from .adaptive import adaptive_batch
from .apgd import apgd_ce, apgd_dlr, apgd_t
from .autoattack import ATTACKS, AUTOATTACK_VERSIONS, autoattack
from .context import crafting, input_gradient
from .cw_l2 import cw_l2
from .fab import fab, fab_t
from .friendly import friendly_pgd
from .losses import cross_entropy, dlr, dlr_targeted, hard_labels, logit_gap, margin
from .pgd import bim, cw_linf, fgsm, fgsm_rs, mim, pgd, pgd_targeted
from .rays import rays
from .search import Found, Search, run_search
from .square import square
from .threat import InputSpace, ThreatModel, madry_step_size, nofrost_step_size, parse_eps

__all__ = [
    'ATTACKS',
    'AUTOATTACK_VERSIONS',
    'Found',
    'InputSpace',
    'Search',
    'ThreatModel',
    'adaptive_batch',
    'apgd_ce',
    'apgd_dlr',
    'apgd_t',
    'autoattack',
    'bim',
    'crafting',
    'cross_entropy',
    'cw_l2',
    'cw_linf',
    'dlr',
    'dlr_targeted',
    'fab',
    'fab_t',
    'fgsm',
    'fgsm_rs',
    'friendly_pgd',
    'hard_labels',
    'input_gradient',
    'logit_gap',
    'madry_step_size',
    'margin',
    'mim',
    'nofrost_step_size',
    'parse_eps',
    'pgd',
    'pgd_targeted',
    'rays',
    'run_search',
    'square',
]
