"""Choose the statistics that BatchNorm and RobustNorm layers use at inference.

Tables 1 and 2 of `Towards an Adversarially Robust Normalization Approach` (https://arxiv.org/abs/2006.11007) compare
population (P) and batch (B) statistics.
"""
from typing import Any, Dict

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, SyncBatchNormAct

from ..errors import InputError, check_choice
from .aux_norm import AuxNorm
from .conversion import recast, replace_modules
from .norms import BatchNormMode, Norm, is_batch_norm, is_norm, plain_class, run_fused
from .robust_norm import BN_MODES, RobustNorm2d

__all__ = ['BATCH_MODE_CLASSES', 'BatchModeNorm', 'bn_mode_of', 'set_bn_mode']


class BatchModeNorm(BatchNormMode):
    """Mixin for a BatchNorm class: eval mode uses batch statistics and leaves the running averages unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """BatchNorm with batch statistics."""
        if self.training:
            return super().forward(x)
        x = F.batch_norm(x, None, None, self.weight, self.bias, True, 0., self.eps)
        return run_fused(self, x)


class BatchModeBatchNorm1d(BatchModeNorm, nn.BatchNorm1d):
    """BatchNorm1d that uses batch statistics at inference too."""


class BatchModeBatchNorm2d(BatchModeNorm, nn.BatchNorm2d):
    """BatchNorm2d that uses batch statistics at inference too."""


class BatchModeBatchNorm3d(BatchModeNorm, nn.BatchNorm3d):
    """BatchNorm3d that uses batch statistics at inference too."""


class BatchModeSyncBatchNorm(BatchModeNorm, nn.SyncBatchNorm):
    """SyncBatchNorm that at inference uses the statistics of the batch in its own process."""


class BatchModeBatchNormAct2d(BatchModeNorm, BatchNormAct2d):
    """BatchNormAct2d that uses batch statistics at inference too."""


class BatchModeSyncBatchNormAct(BatchModeNorm, SyncBatchNormAct):
    """SyncBatchNormAct that at inference uses the statistics of the batch in its own process."""


BATCH_MODE_CLASSES: Dict[Any, Any] = {c.__bases__[1]: c for c in BatchModeNorm.__subclasses__()}


def bn_mode_of(norm: Norm) -> str:
    """The statistics that a BatchNorm or RobustNorm layer uses at inference, one of `BN_MODES`."""
    if isinstance(norm, RobustNorm2d):
        return norm.bn_mode
    return 'batch' if isinstance(norm, BatchModeNorm) or norm.running_mean is None else 'population'


def _in_mode(norm: Norm, mode: str) -> nn.Module:
    """The BatchNorm layer itself if it is in the mode, else a new layer in that mode."""
    name = type(norm).__name__
    if mode == 'mean':
        raise InputError('BatchNorm has no such mode', "choose 'batch' or 'population'", argument='mode', value=mode)
    if mode == bn_mode_of(norm):
        return norm
    if mode == 'population':
        if not isinstance(norm, BatchModeNorm):
            raise InputError(f'{name} tracks no statistics', "choose 'batch'", argument='mode', value=mode)
        return recast(norm, plain_class(norm))
    if isinstance(norm, AuxNorm):
        raise InputError(
            'two BatchNorms can be mixed only with tracked statistics',
            "choose 'population', or keep one of the two with plain_branch", argument='mode', value=mode)
    if type(norm) not in BATCH_MODE_CLASSES:
        raise InputError(
            f'{name} is a custom BatchNorm, which cannot be switched',
            'replace it with a BatchNorm of torch or timm', argument='mode', value=mode)
    return recast(norm, BATCH_MODE_CLASSES[type(norm)])


def set_bn_mode(model: nn.Module, mode: str) -> nn.Module:
    """Choose the statistics that every BatchNorm and RobustNorm layer of a model uses at inference.

    Training mode and the state dict are unaffected. BatchNorm layers are replaced by layers of another class with the
    same tensors, as in `convert_sync_batchnorm`, so that the model can be pickled and copied in every mode.

    Args:
        model: A built model, changed in place (a bare BatchNorm is not: use the return value).
        mode: 'population' (tracked in training), 'batch' (of the current batch) or, for RobustNorm only, 'mean'
            (tracked mean, range of the current batch).

    Returns:
        The converted model.

    Raises:
        InputError: On an unknown mode; on 'mean' for a model with BatchNorm, 'batch' for one with auxiliary BatchNorm,
            or 'population' for one that tracks no statistics; and if the model has no such layers or a custom
            BatchNorm. The model is then unchanged.
    """
    check_choice('mode', mode, BN_MODES)
    norms = [m for m in model.modules() if is_norm(m)]
    if not norms:
        raise InputError(
            f'{type(model).__name__} has no BatchNorm or RobustNorm layer to switch', argument='mode', value=mode)
    replacements = {norm: _in_mode(norm, mode) for norm in norms if is_batch_norm(norm)}
    for norm in norms:
        if isinstance(norm, RobustNorm2d):
            norm.bn_mode = mode
    return replace_modules(model, replacements)
