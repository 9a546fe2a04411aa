"""Helpers that recognize BatchNorm and RobustNorm layers, and the base class of BatchNorm modes."""
from typing import Any, Dict, Tuple, Type

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, SyncBatchNormAct

from ..errors import InputError
from .robust_norm import RobustNorm2d

__all__ = [
    'PLAIN_BATCH_NORMS',
    'BatchNormMode',
    'Norm',
    'is_batch_norm',
    'is_norm',
    'plain_class',
    'run_fused',
    'tracking_norms',
]

# a BatchNorm or RobustNorm layer; torch types its attributes as Tensor | Module
Norm = Any

# each BatchNorm mode defines a subclass of each of these classes
PLAIN_BATCH_NORMS: Tuple[Type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)


class BatchNormMode(nn.Module):
    """Base of the mode mixins: a class in a mode has the bases (mixin, one of `PLAIN_BATCH_NORMS`)."""
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    eps: float
    __jit_unused_properties__ = ['qconfig']

    @property
    def qconfig(self) -> Any:
        """Always raises: the converters of torch and timm read it, and would silently make this layer a plain one."""
        raise InputError(
            f'{type(self).__name__} would lose its mode in a conversion',
            'synchronize it with sync_norm_statistics, or make it plain first with set_bn_mode or plain_branch')


def plain_class(norm: BatchNormMode) -> Type[nn.Module]:
    """The plain BatchNorm class of a layer in a mode."""
    return type(norm).__bases__[1]


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of any kind, in any mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm or RobustNorm layer."""
    return is_batch_norm(module) or isinstance(module, RobustNorm2d)


def run_fused(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """Apply the dropout and activation of timm's fused layers to normalized features."""
    return norm.act(norm.drop(x)) if hasattr(norm, 'act') else x


def tracking_norms(model: nn.Module) -> Dict[str, Norm]:
    """BatchNorm and RobustNorm layers that track statistics, by name."""
    return {name: m for name, m in model.named_modules() if is_norm(m) and m.running_mean is not None}
