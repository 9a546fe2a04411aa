"""Adversarially robust models, training objectives and honest evaluation for timm. Importing registers the models."""
from .attacks import L2, InputSpace, Linf, ThreatModel
from .layers import RobustNorm2d, replace_norm, set_bn_mode, sync_norm_statistics
from .models import NormalizedModel
from .version import __version__

__all__ = [
    'InputSpace',
    'L2',
    'Linf',
    'NormalizedModel',
    'RobustNorm2d',
    'ThreatModel',
    '__version__',
    'replace_norm',
    'set_bn_mode',
    'sync_norm_statistics',
]
