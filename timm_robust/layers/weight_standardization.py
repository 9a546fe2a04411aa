"""Standardized weights of normalizer-free networks, computed once while they stand still."""
from contextlib import contextmanager
from functools import partial
from typing import Any, Dict, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same

__all__ = ['cached_weights', 'standardized_weight']

_STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def standardized_weight(conv: nn.Conv2d) -> torch.Tensor:
    """The weight with which timm's (Scaled)StdConv2d convolves."""
    gain = (conv.gain * conv.scale).view(-1) if hasattr(conv, 'gain') else None
    flat = conv.weight.reshape(1, conv.out_channels, -1)
    return F.batch_norm(flat, None, None, gain, None, True, 0., conv.eps).reshape_as(conv.weight)


def _forward(conv: nn.Conv2d, cache: Dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    sources = [conv.weight, conv.gain] if hasattr(conv, 'gain') else [conv.weight]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in sources)):
        return type(conv).forward(conv, x)
    # a tensor of inference mode is of no use outside of it
    key = torch.is_inference_mode_enabled(), [(t.data_ptr(), t._version, t.dtype, t.device) for t in sources]
    if cache.get('key') != key:
        with torch.no_grad():
            cache.update(key=key, weight=standardized_weight(conv))
    if getattr(conv, 'same_pad', False):
        x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
    return F.conv2d(x, cache['weight'], conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Compute the standardized weights of a network once and not in every forward pass.

    For passes that take no gradient for the weights: the steps of an attack, evaluation. Results are bit-equal. A
    weight that changes inside, by an optimizer, a load, a swap or a move, is computed anew (`weight.data.add_(...)`
    leaves no trace and is not seen); where a gradient for it is taken the network computes as ever. Attacks of this
    package do this by themselves.

    Args:
        model: Any network, also inside wrappers; one without standardized weights is left alone.
    """
    # replicas of DataParallel would share the cache of the first device
    replicated = any(isinstance(m, nn.DataParallel) for m in model.modules())
    convs = [] if replicated else [
        m for m in model.modules() if type(m) in _STANDARDIZED and 'forward' not in m.__dict__]
    try:
        for conv in convs:
            conv.forward = partial(_forward, conv, {})
        yield
    finally:
        for conv in convs:
            conv.__dict__.pop('forward', None)
