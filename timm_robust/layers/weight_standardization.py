"""Cache the standardized weights of normalizer-free networks while their parameters are unchanged."""
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
    """The standardized weight of a layer, and its sources: the tensors it was computed from.

    A source is identified by its address and its version counter, which counts in-place changes. The cache keeps a view
    of each source, so that its address is not reused.
    """

    def __init__(self) -> None:
        self.weight: Any = None
        self.in_inference_mode = False
        self.sources: List[Tuple[torch.Tensor, int]] = []
        self.copies: List[torch.Tensor] = []
        self.steady = True

    def holds(self, sources: List[torch.Tensor]) -> bool:
        """Whether the weight was computed from these sources in their current state."""
        # an inference tensor cannot be used outside inference mode
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
        """Detect in-place changes of `.data`, once: code that makes them (weight-noise defences) does so every pass."""
        self.steady = all(torch.equal(t, copy) for t, copy in zip(sources, self.copies))
        self.copies = []


def _forward(conv: Any, cache: _Cache, x: torch.Tensor) -> torch.Tensor:
    sources = [conv.weight, conv.gain] if hasattr(conv, 'gain') else [conv.weight]
    if (
            not cache.steady
            or torch.compiler.is_compiling() or are_functorch_transforms_active()
            or any(t.is_inference() for t in sources)  # inference tensors have no version counter
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

    For passes without weight gradients, such as attack steps and evaluation; passes with weight gradients bypass the
    cache. Results are bit-identical. A weight is recomputed after an optimizer step, a loaded state dict, a swapped
    tensor, a move to another device or `functional_call`. An in-place change of `weight.data` is detected only if it
    happens before the second pass; the layer is then no longer cached. The attacks of this package use this cache
    automatically.

    Args:
        model: Any network, also inside wrappers. Networks without standardized weights are unaffected, and so are
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
