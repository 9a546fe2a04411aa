from .aux_norm import convert_aux_norm, has_aux_norm, norm_branch, plain_branch, set_norm_branch, take_norm_branch
from .fold import fold_for_inference
from .perturbed_norm import NormPerturbation
from .replace import replace_norm
from .robust_norm import RobustNorm2d, RobustNormAct2d
from .statistics import (
    NORM_STATISTICS,
    has_batch_statistics,
    is_norm,
    set_norm_statistics,
    sync_norm_statistics,
    tracking_norms,
)
from .weight_standardization import cached_weights

__all__ = [
    'NORM_STATISTICS',
    'NormPerturbation',
    'RobustNorm2d',
    'RobustNormAct2d',
    'cached_weights',
    'convert_aux_norm',
    'fold_for_inference',
    'has_aux_norm',
    'has_batch_statistics',
    'is_norm',
    'norm_branch',
    'plain_branch',
    'replace_norm',
    'set_norm_branch',
    'set_norm_statistics',
    'sync_norm_statistics',
    'take_norm_branch',
    'tracking_norms',
]
