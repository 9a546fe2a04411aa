"""Standardized weights of normalizer-free networks, computed once while they stand still."""
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
    """The weight with which timm's (Scaled)StdConv2d convolves."""
    gain = (conv.gain * conv.scale).view(-1) if hasattr(conv, 'gain') else None
    flat = conv.weight.reshape(1, conv.out_channels, -1)
    return F.batch_norm(flat, None, None, gain, None, True, 0., conv.eps).reshape_as(conv.weight)


class _Cache:
    """The standardized weight of a layer and what it was computed from.

    A source is known by its address, of which a view is kept, so that no other tensor comes to lie there, and by its
    version, which counts changes in place.
    """

    def __init__(self) -> None:
        self.weight: Any = None
        self.in_inference_mode = False
        self.sources: List[Tuple[torch.Tensor, int]] = []
        self.copies: List[torch.Tensor] = []
        self.steady = True

    def holds(self, sources: List[torch.Tensor]) -> bool:
        """Whether the weight is of these sources as they are."""
        # a tensor of inference mode is of no use outside of it
        return self.weight is not None and self.in_inference_mode == torch.is_inference_mode_enabled() and all(
            t.data_ptr() == view.data_ptr() and t._version == version
            for t, (view, version) in zip(sources, self.sources))

    def take(self, weight: torch.Tensor, sources: List[torch.Tensor]) -> None:
        """Keep a weight."""
        self.weight = weight
        self.in_inference_mode = torch.is_inference_mode_enabled()
        self.sources = [(t.detach(), t._version) for t in sources]
        self.copies = [t.detach().clone() for t in sources]

    def check(self, sources: List[torch.Tensor]) -> None:
        """Compare values, once: who changes `.data` in place, as defences by weight noise do, does it in each pass."""
        self.steady = all(torch.equal(t, copy) for t, copy in zip(sources, self.copies))
        self.copies = []


def _forward(conv: Any, cache: _Cache, x: torch.Tensor) -> torch.Tensor:
    sources = [conv.weight, conv.gain] if hasattr(conv, 'gain') else [conv.weight]
    if (
            not cache.steady
            or torch.compiler.is_compiling() or are_functorch_transforms_active()
            or any(t.is_inference() for t in sources)  # has no version
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
    """Compute the standardized weights of a network once and not in every forward pass.

    For passes that take no gradient for the weights: the steps of an attack, evaluation. Results are bit-equal. A
    weight that changes inside, by an optimizer, a load, a swap, a move or `functional_call`, is computed anew. A change
    of `weight.data` in place leaves no trace: it is seen in the second pass, from which on the layer computes as ever,
    and not if it comes later. Where a gradient for a weight is taken the network computes as ever too. Attacks of this
    package do this by themselves.

    Args:
        model: Any network, also inside wrappers; one without standardized weights is left alone, and so is one that is
            compiled, which would be compiled anew.
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
