"""Adversarially robust models, training objectives and honest evaluation for timm. Importing registers the models."""
from .attacks import InputSpace, ThreatModel, bim, cw_linf, fgsm, fgsm_rs, mim, pgd, pgd_targeted
from .layers import RobustNorm2d, replace_norm, set_bn_mode, sync_norm_statistics
from .models import NormalizedModel
from .version import __version__

__all__ = [
    'InputSpace',
    'NormalizedModel',
    'RobustNorm2d',
    'ThreatModel',
    '__version__',
    'bim',
    'cw_linf',
    'fgsm',
    'fgsm_rs',
    'mim',
    'pgd',
    'pgd_targeted',
    'replace_norm',
    'set_bn_mode',
    'sync_norm_statistics',
]
