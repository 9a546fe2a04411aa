"""Which statistics normalize at inference, for every layer that has a choice.

The switch behind Tables 1 and 2 of `Towards an Adversarially Robust Normalization Approach`
(https://arxiv.org/abs/2006.11007): population (P) or batch (B) statistics.
"""
from functools import cache
from typing import Dict, Type

import torch
import torch.nn as nn
import torch.nn.functional as F

from .aux_norm import has_aux_norm
from .robust_norm import BN_MODES, RobustNorm2d

__all__ = [
    'BN_MODES',
    'has_batch_statistics',
    'is_norm',
    'set_bn_mode',
    'sync_norm_statistics',
    'tracking_norms',
]


class _BatchStatisticsAtInference:
    """Mixin over a BatchNorm class: in eval mode the batch normalizes and the running averages stay untouched."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        x = F.batch_norm(x, None, None, self.weight, self.bias, True, 0., self.eps)
        # timm's fused layers have more to do, plain and synchronized
        return self.act(self.drop(x)) if hasattr(self, 'act') else x


@cache
def _with_batch_statistics(norm_class: Type[nn.Module]) -> Type[nn.Module]:
    return type(f'BatchStatistics{norm_class.__name__}', (_BatchStatisticsAtInference, norm_class), {})


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm or RobustNorm layer."""
    return _is_batch_norm(module) or isinstance(module, RobustNorm2d)


def tracking_norms(model: nn.Module) -> Dict[str, nn.Module]:
    """BatchNorm and RobustNorm layers that track statistics, by name."""
    return {name: m for name, m in model.named_modules() if is_norm(m) and m.running_mean is not None}


def set_bn_mode(model: nn.Module, mode: str) -> nn.Module:
    """Choose which statistics normalize at inference in every BatchNorm and RobustNorm layer of a model.

    Training mode and the state dict are unaffected.

    Args:
        model: A built model, changed in place.
        mode: 'population' (tracked in training), 'batch' (of the batch at hand) or, for RobustNorm alone,
            'mean' (tracked mean, range of the batch).

    Returns:
        The model.

    Raises:
        ValueError: On an unknown choice, on 'mean' for a model with BatchNorm, on 'batch' for one with auxiliary
            BatchNorm, and if no layer has a choice.
    """
    if mode not in BN_MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(BN_MODES)}")
    robust_norms = [m for m in model.modules() if isinstance(m, RobustNorm2d)]
    batch_norms = [m for m in model.modules() if _is_batch_norm(m)]
    if not robust_norms and not batch_norms:
        raise ValueError(
            f'mode={mode!r}: {type(model).__name__} has no BatchNorm or RobustNorm layer to switch')
    if batch_norms and mode == 'mean':
        raise ValueError("mode='mean': BatchNorm has no such mode, choose 'batch' or 'population'")
    if mode == 'batch' and has_aux_norm(model):
        raise ValueError("mode='batch': two BatchNorms are mixed by tracked statistics, choose 'population'")
    for module in robust_norms:
        module.bn_mode = mode
    for module in batch_norms:
        switched = isinstance(module, _BatchStatisticsAtInference)
        if mode == 'batch' and not switched:
            module.__class__ = _with_batch_statistics(type(module))
        elif mode == 'population' and switched:
            module.__class__ = type(module).__mro__[2]
    return model


def has_batch_statistics(model: nn.Module, training: bool = False) -> bool:
    """Whether a model's output for one image depends on the other images of its batch.

    Args:
        model: A built model.
        training: Ask for training mode; otherwise for inference.
    """
    for module in model.modules():
        if isinstance(module, RobustNorm2d) and (training or module.bn_mode != 'population'):
            return True
        if _is_batch_norm(module) and (
                training or isinstance(module, _BatchStatisticsAtInference) or module.running_mean is None):
            return True
    return False


def sync_norm_statistics(model: nn.Module, enabled: bool = True, process_group=None) -> nn.Module:
    """Let the RobustNorm layers of a model share their training statistics between processes.

    The counterpart of timm's `convert_sync_batchnorm`, which leaves RobustNorm alone.

    Args:
        model: A built model, changed in place.
        enabled: Share statistics.
        process_group: The processes to share with, all by default.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, RobustNorm2d):
            module.sync = enabled
            module.process_group = process_group
    return model
