"""Normalization with training statistics shared between processes."""
from typing import Any

import torch.nn as nn
from timm.layers import BatchNormAct2d, SyncBatchNormAct

from ..errors import InputError
from .aux_norm import AUX_CLASSES, AuxNorm
from .bn_mode import BATCH_MODE_CLASSES, BatchModeNorm
from .conversion import recast, replace_modules
from .norms import PLAIN_BATCH_NORMS, Norm, is_batch_norm
from .robust_norm import RobustNorm2d

__all__ = ['sync_norm_statistics']


def _synchronized(norm: Norm, process_group: Any) -> Norm:
    sync_class: Any = SyncBatchNormAct if isinstance(norm, (BatchNormAct2d, SyncBatchNormAct)) else nn.SyncBatchNorm
    if isinstance(norm, AuxNorm):
        sync_class = AUX_CLASSES[sync_class]
    elif isinstance(norm, BatchModeNorm):
        sync_class = BATCH_MODE_CLASSES[sync_class]
    elif type(norm) not in PLAIN_BATCH_NORMS:
        raise InputError(
            f'{type(norm).__name__} is a custom BatchNorm, which cannot be synchronized',
            'replace it with a BatchNorm of torch or timm')
    new = recast(norm, sync_class)
    new.process_group = process_group
    if isinstance(norm, AuxNorm):
        new.aux = _synchronized(norm.aux, process_group)
    return new


def sync_norm_statistics(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Share the training statistics of a model's BatchNorm and RobustNorm layers between processes.

    timm's `convert_sync_batchnorm` ignores RobustNorm, would turn layers converted by `set_bn_mode` or
    `convert_aux_norm` into plain ones, and drops the activation of layers that are already synchronized.

    Args:
        model: A built model, changed in place (a bare BatchNorm is not: use the return value).
        process_group: Processes that share their statistics, all by default.

    Returns:
        The converted model.

    Raises:
        InputError: On a custom BatchNorm.
    """
    twins = {m.aux for m in model.modules() if isinstance(m, AuxNorm)}
    replacements = {
        m: _synchronized(m, process_group) for m in model.modules() if is_batch_norm(m) and m not in twins}
    for module in model.modules():
        if isinstance(module, RobustNorm2d):
            module.sync, module.process_group = True, process_group
    return replace_modules(model, replacements)
