from .fold import fold_for_inference
from .replace import replace_norm
from .robust_norm import RobustNorm2d, RobustNormAct2d
from .statistics import NORM_STATISTICS, has_batch_statistics, set_norm_statistics, sync_norm_statistics

__all__ = [
    'NORM_STATISTICS',
    'RobustNorm2d',
    'RobustNormAct2d',
    'fold_for_inference',
    'has_batch_statistics',
    'replace_norm',
    'set_norm_statistics',
    'sync_norm_statistics',
]
