"""Replace the normalization layers of a built model."""
from typing import Any, Callable, Dict, Tuple, Type

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, SyncBatchNormAct

from ..errors import InputError
from .aux_norm import AuxNorm
from .bn_mode import bn_mode_of, set_bn_mode
from .conversion import replace_modules
from .norms import Norm, is_norm
from .robust_norm import RobustNorm2d, RobustNormAct2d
from .sync_norm import sync_norm_statistics

__all__ = ['replace_norm']

_CARRIED = ('weight', 'bias', 'running_mean')
_FUSED: Dict[Any, Any] = {RobustNorm2d: RobustNormAct2d, nn.BatchNorm2d: BatchNormAct2d}


def _check(module: nn.Module, norm_layer: Callable[..., nn.Module]) -> None:
    name = type(module).__name__
    if isinstance(module, AuxNorm):
        raise InputError(f'{name} holds two BatchNorms', 'choose one with plain_branch first')
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d)) and norm_layer in _FUSED:
        raise InputError(
            f'{name} does not normalize (N, C, H, W), unlike {norm_layer.__name__}',
            'name the classes to replace, for example `source=(torch.nn.BatchNorm2d,)`')


def _carry_modes(old: Norm, new: nn.Module, norm_kwargs: Dict[str, Any]) -> nn.Module:
    """The new layer, or its equivalent with the mode and synchronization of the old one."""
    if not is_norm(new):
        return new
    if is_norm(old) and 'bn_mode' not in norm_kwargs:
        new = set_bn_mode(new, bn_mode_of(old))
    if isinstance(old, nn.SyncBatchNorm) or getattr(old, 'sync', False):
        new = sync_norm_statistics(new, old.process_group)
    return new


def _convert(module: Norm, norm_layer: Callable[..., nn.Module], norm_kwargs: Dict[str, Any]) -> nn.Module:
    _check(module, norm_layer)
    fused = isinstance(module, (BatchNormAct2d, SyncBatchNormAct, RobustNormAct2d))
    if fused:
        norm_layer = _FUSED.get(norm_layer, norm_layer)
    tensors = [t for t in (module.running_mean, module.weight) if t is not None]
    new = norm_layer(
        module.num_features,
        **{
            'eps': module.eps,
            'momentum': 0.1 if module.momentum is None else module.momentum,  # None: BatchNorm's cumulative average
            'affine': module.affine,
            **({'device': tensors[0].device, 'dtype': tensors[0].dtype} if tensors else {}),
            **norm_kwargs,
        },
    )
    if fused:
        if not hasattr(new, 'act'):
            raise InputError(
                f'{type(module).__name__} has an activation, which {type(new).__name__} would drop',
                'choose a layer with `act` and `drop`', argument='norm_layer', value=type(new).__name__)
        new.drop, new.act = module.drop, module.act
    with torch.no_grad():
        for name in _CARRIED:
            old_value, new_value = getattr(module, name, None), getattr(new, name, None)
            if old_value is not None and new_value is not None:
                new_value.copy_(old_value)
                new_value.requires_grad_(old_value.requires_grad)
    return _carry_modes(module, new, norm_kwargs).train(module.training)


def replace_norm(
        model: nn.Module,
        norm_layer: Callable[..., nn.Module] = RobustNorm2d,
        source: Tuple[Type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,),
        **norm_kwargs: Any,
) -> nn.Module:
    """Replace every BatchNorm of a model with RobustNorm (or the reverse), keeping its weights.

    Scale, shift and running mean are copied. The mode of `set_bn_mode` and synchronization are kept if the new layer
    supports them. The running range has no counterpart in BatchNorm: it starts at 1 and is tracked in training, so
    train or recalibrate before inference with population statistics. Parameter names, activations fused into timm's
    BatchNormAct2d, device, dtype, mode and `requires_grad` are kept.

    Args:
        model: A built timm model, changed in place (a bare norm layer is not: use the return value).
        norm_layer: `RobustNorm2d`, `torch.nn.BatchNorm2d`, or another class with the same arguments.
        source: Classes to replace; `(RobustNorm2d,)` to convert back.
        **norm_kwargs: Arguments of `norm_layer`, for example `power=0.2`.

    Returns:
        The converted model.

    Raises:
        InputError: If `norm_layer` is not a class, the model has no layer of the `source` classes, or `norm_layer`
            cannot replace one of them: it has an auxiliary BatchNorm, an activation that would be lost, an input that
            is not (N, C, H, W), or a mode that the new layer does not support. The model is then unchanged.

    Examples:

        ```python
        model = replace_norm(timm.create_model('efficientnet_b0'), power=0.2)
        ```
    """
    if not callable(norm_layer):
        raise InputError(
            'is not a class', 'pass RobustNorm2d or another class', argument='norm_layer', value=norm_layer)
    norms = [m for m in model.modules() if isinstance(m, source)]
    if not norms:
        classes = ', '.join(s.__name__.lstrip('_') for s in source)
        raise InputError(f'{type(model).__name__} has no layer of {classes} to replace')
    return replace_modules(model, {norm: _convert(norm, norm_layer, norm_kwargs) for norm in norms})
