"""Crafting without a trace: the network is in the right mode, its parameters rest, and all is put back after."""
from contextlib import contextmanager
from typing import Callable, Iterator, Tuple

import torch
import torch.nn as nn

from ..errors import InputError
from ..layers import cached_weights, is_norm

__all__ = ['NORM_MODES', 'crafting', 'input_gradient']

NORM_MODES = ('eval', 'train')

# Scales the loss of an attack under float16 autocast, where small input gradients would vanish on their way.
_FLOAT16_LOSS_SCALE = 1024.


@contextmanager
def crafting(model: Callable, norm_mode: str = 'eval') -> Iterator[None]:
    """Hold a network still while adversarial images are crafted.

    Inside, every module is in eval mode, no parameter requires a gradient and standardized weights are computed once.
    After, training flags, `requires_grad` flags and normalization buffers are as they were, also when an exception
    passes.

    Args:
        model: The network; a plain function is left alone.
        norm_mode: 'eval', or 'train' for normalization layers that use the statistics of the batch at hand (their
            running averages are restored).

    Raises:
        InputError: On an unknown `norm_mode`.
    """
    if norm_mode not in NORM_MODES:
        raise InputError(f"norm_mode={norm_mode!r} is unknown: choose one of {', '.join(NORM_MODES)}")
    if not isinstance(model, nn.Module):
        yield
        return
    training = [(m, m.training) for m in model.modules()]
    thawed = [p for p in model.parameters() if p.requires_grad]
    buffers = []
    try:
        for module, _ in training:
            module.training = norm_mode == 'train' and is_norm(module)
            if module.training:
                buffers += [(b, b.clone()) for b in module.buffers(recurse=False)]
        for parameter in thawed:
            parameter.requires_grad_(False)
        with cached_weights(model):
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in thawed:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def input_gradient(
        model: Callable,
        x: torch.Tensor,
        loss_fn: Callable[[torch.Tensor], torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the summed loss for the input alone.

    Nothing is accumulated in `.grad`, and no hook of distributed training fires. A network that cuts the graph, as some
    defences do, has gradient zero; so has a pixel whose gradient is not a number, and an infinite one is 1 or -1.

    Args:
        model: Maps x to logits.
        x: Input, shape (N, C, H, W).
        loss_fn: Maps logits (N, K) to one loss per image (N,).

    Returns:
        Gradient like x, logits (N, K) and losses (N,), all detached.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        loss = loss_fn(logits)
        if not loss.requires_grad:
            return torch.zeros_like(x), logits, loss
        scale = _FLOAT16_LOSS_SCALE if logits.dtype == torch.float16 else 1.
        gradient, = torch.autograd.grad(loss.sum() * scale, x)
    if scale != 1. and gradient.dtype != torch.float16:
        gradient = gradient / scale
    # one entry that is not a number would make the whole image so under L2
    return torch.nan_to_num(gradient, 0., 1., -1.), logits.detach(), loss.detach()
