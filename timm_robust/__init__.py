"""Adversarially robust models, training objectives and honest evaluation for timm. Importing registers the models."""
from . import attacks, tasks
from .attacks import L1, L2, Attack, InputSpace, Linf, ThreatModel, register_attack, register_norm
from .errors import InputError
from .evaluation import EvaluationReport, TransferReport, diagnose, evaluate, transfer
from .layers import RobustNorm2d, replace_norm, set_bn_mode, sync_norm_statistics
from .models import NormalizedModel
from .tasks import Objective, register_objective
from .training import TrainConfig, TrainResult, train
from .version import __version__

__all__ = [
    'Attack',
    'EvaluationReport',
    'InputError',
    'InputSpace',
    'L1',
    'L2',
    'Linf',
    'NormalizedModel',
    'Objective',
    'RobustNorm2d',
    'ThreatModel',
    'TrainConfig',
    'TrainResult',
    'TransferReport',
    '__version__',
    'attacks',
    'diagnose',
    'evaluate',
    'register_attack',
    'register_norm',
    'register_objective',
    'replace_norm',
    'set_bn_mode',
    'sync_norm_statistics',
    'tasks',
    'train',
    'transfer',
]
