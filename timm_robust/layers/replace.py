"""Exchange the normalization layers of a built model."""
from typing import Callable, Tuple, Type

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d

from .robust_norm import RobustNorm2d, RobustNormAct2d

__all__ = ['replace_norm']

_CARRIED = ('weight', 'bias', 'running_mean')


def _convert(module: nn.Module, norm_layer: Callable[..., nn.Module], norm_kwargs: dict) -> nn.Module:
    fused = isinstance(module, (BatchNormAct2d, RobustNormAct2d))
    if fused:
        norm_layer = {RobustNorm2d: RobustNormAct2d, nn.BatchNorm2d: BatchNormAct2d}.get(norm_layer, norm_layer)
    reference = module.running_mean if module.running_mean is not None else module.weight
    new = norm_layer(
        module.num_features,
        **{
            'eps': module.eps,
            'momentum': 0.1 if module.momentum is None else module.momentum,  # None: BatchNorm's cumulative average
            'affine': module.affine,
            'device': reference.device,
            'dtype': reference.dtype,
            **norm_kwargs,
        },
    )
    if fused:
        new.drop, new.act = module.drop, module.act
    with torch.no_grad():
        for name in _CARRIED:
            old_value, new_value = getattr(module, name, None), getattr(new, name, None)
            if old_value is not None and new_value is not None:
                new_value.copy_(old_value)
                new_value.requires_grad_(old_value.requires_grad)
    return new.train(module.training)


def replace_norm(
        model: nn.Module,
        norm_layer: Callable[..., nn.Module] = RobustNorm2d,
        source: Tuple[Type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,),
        **norm_kwargs,
) -> nn.Module:
    """Replace every BatchNorm of a model by RobustNorm (or the reverse), keeping its weights.

    Scale, shift and running mean are carried over. The running range has no counterpart in BatchNorm: it starts at 1
    and is learned in training, so train or recalibrate before inference with population statistics. Parameter names,
    activations fused into timm's BatchNormAct2d, device, dtype, mode and `requires_grad` are kept.

    Args:
        model: A built timm model, changed in place (a bare norm layer is not, use the return value).
        norm_layer: `RobustNorm2d`, `torch.nn.BatchNorm2d`, or another class with their arguments.
        source: Classes to replace; `(RobustNorm2d,)` to convert back.
        **norm_kwargs: Arguments of `norm_layer`, for example `power=0.2`.

    Returns:
        The converted model.

    Raises:
        ValueError: If the model has no layer of the `source` classes.

    Examples:

        ```python
        model = replace_norm(timm.create_model('efficientnet_b0'), power=0.2)
        ```
    """
    if isinstance(model, source):
        return _convert(model, norm_layer, norm_kwargs)
    names = [name for name, module in model.named_modules() if isinstance(module, source)]
    if not names:
        classes = ', '.join(s.__name__.lstrip('_') for s in source)
        raise ValueError(f'model={type(model).__name__}: no layer of {classes} to replace')
    for name in names:
        parent_name, _, child_name = name.rpartition('.')
        parent = model.get_submodule(parent_name)
        setattr(parent, child_name, _convert(getattr(parent, child_name), norm_layer, norm_kwargs))
    return model
