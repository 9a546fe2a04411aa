"""Cached standardized weights of normalizer-free networks, while their parameters are unchanged."""
from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same

from .._compat import are_functorch_transforms_active

__all__ = ['cached_weights', 'standardized_weight']

_STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def standardized_weight(conv: Any) -> torch.Tensor:
    """The weight that timm's (Scaled)StdConv2d convolves with."""
    gain = (conv.gain * conv.scale).view(-1) if hasattr(conv, 'gain') else None
    flat = conv.weight.reshape(1, conv.out_channels, -1)
    return F.batch_norm(flat, None, None, gain, None, True, 0., conv.eps).reshape_as(conv.weight)


class _Cache:
    """The standardized weight of a layer and what it was computed from.

    A source is identified by its address and by its version, which counts in-place changes. A view of it is kept, so
    that the address is not reused.
    """

    def __init__(self) -> None:
        self.weight: Any = None
        self.in_inference_mode = False
        self.sources: List[Tuple[torch.Tensor, int]] = []
        self.copies: List[torch.Tensor] = []
        self.steady = True

    def holds(self, sources: List[torch.Tensor]) -> bool:
        """Whether the weight was computed from these sources in their current state."""
        # a tensor of inference mode cannot be used outside of it
        return self.weight is not None and self.in_inference_mode == torch.is_inference_mode_enabled() and all(
            t.data_ptr() == view.data_ptr() and t._version == version
            for t, (view, version) in zip(sources, self.sources))

    def take(self, weight: torch.Tensor, sources: List[torch.Tensor]) -> None:
        """Store a weight."""
        self.weight = weight
        self.in_inference_mode = torch.is_inference_mode_enabled()
        self.sources = [(t.detach(), t._version) for t in sources]
        self.copies = [t.detach().clone() for t in sources]

    def check(self, sources: List[torch.Tensor]) -> None:
        """Compare values, once: code that changes `.data` in place (weight-noise defences) does so in each pass."""
        self.steady = all(torch.equal(t, copy) for t, copy in zip(sources, self.copies))
        self.copies = []


def _forward(conv: Any, cache: _Cache, x: torch.Tensor) -> torch.Tensor:
    sources = [conv.weight, conv.gain] if hasattr(conv, 'gain') else [conv.weight]
    if (
            not cache.steady
            or torch.compiler.is_compiling() or are_functorch_transforms_active()
            or any(t.is_inference() for t in sources)  # they have no version
            or (torch.is_grad_enabled() and any(t.requires_grad for t in sources))):
        return type(conv).forward(conv, x)
    if cache.holds(sources):
        if cache.copies:
            cache.check(sources)
            return _forward(conv, cache, x)
    else:
        with torch.no_grad():
            cache.take(standardized_weight(conv), sources)
    if getattr(conv, 'same_pad', False):
        x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
    return F.conv2d(x, cache.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Compute the standardized weights of a network once instead of in every forward pass.

    For passes without weight gradients: attack steps, evaluation. Results are bit-identical. A weight changed by an
    optimizer, a load, a swap, a move or `functional_call` is computed again. An in-place change of `weight.data` cannot
    be tracked: it is detected in the second pass, from which on the layer is not cached, but not later. Passes with
    weight gradients are not cached either. The attacks of this package use this automatically.

    Args:
        model: Any network, also inside wrappers. Networks without standardized weights are left alone, and so are
            compiled ones, which would be recompiled.
    """
    # replicas of DataParallel would share the cache of the first device
    apart = any(isinstance(m, nn.DataParallel) or hasattr(m, '_orig_mod') for m in model.modules())
    convs = [] if apart else [
        m for m in model.modules() if type(m) in _STANDARDIZED and 'forward' not in m.__dict__]
    try:
        for conv in convs:
            conv.forward = partial(_forward, conv, _Cache())
        yield
    finally:
        for conv in convs:
            conv.__dict__.pop('forward', None)
