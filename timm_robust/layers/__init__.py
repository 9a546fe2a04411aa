from .aux_norm import at_gamma, convert_aux_norm, has_aux_norm, plain_branch, set_gamma
from .batch_statistics import has_batch_statistics
from .bn_mode import set_bn_mode
from .fold import fold_for_inference
from .norms import is_norm, tracking_norms
from .perturbed_norm import NormPerturbation
from .replace import replace_norm
from .robust_norm import BN_MODES, RobustNorm2d, RobustNormAct2d
from .sync_norm import sync_norm_statistics
from .weight_standardization import cached_weights

__all__ = [
    'BN_MODES',
    'NormPerturbation',
    'RobustNorm2d',
    'RobustNormAct2d',
    'at_gamma',
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
