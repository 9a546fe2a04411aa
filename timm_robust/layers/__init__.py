from .aux_norm import at_gamma, branch_state_dict, convert_aux_norm, has_aux_norm, plain_branch, set_gamma
from .fold import fold_for_inference
from .perturbed_norm import NormPerturbation
from .replace import replace_norm
from .robust_norm import RobustNorm2d, RobustNormAct2d
from .statistics import (
    BN_MODES,
    has_batch_statistics,
    is_norm,
    set_bn_mode,
    sync_norm_statistics,
    tracking_norms,
)
from .weight_standardization import cached_weights

__all__ = [
    'BN_MODES',
    'NormPerturbation',
    'RobustNorm2d',
    'RobustNormAct2d',
    'at_gamma',
    'branch_state_dict',
    'cached_weights',
    'convert_aux_norm',
    'fold_for_inference',
    'has_aux_norm',
    'has_batch_statistics',
    'is_norm',
    'plain_branch',
    'replace_norm',
    'set_bn_mode',
    'set_gamma',
    'sync_norm_statistics',
    'tracking_norms',
]
