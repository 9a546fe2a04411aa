"""The mode of a network under attack, and input gradients."""
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Tuple

import torch
import torch.nn as nn

from ..errors import InputError, check_choice
from ..layers import cached_weights, is_norm

__all__ = ['ATTACK_BN_MODES', 'attack_mode', 'input_gradient', 'input_gradients', 'without_ddp']

ATTACK_BN_MODES = ('eval', 'train')

# Loss scale under float16 autocast, so that small input gradients do not underflow.
_FLOAT16_LOSS_SCALE = 1024.


def without_ddp(model: Any) -> Any:
    """The network inside DistributedDataParallel, which exchanges buffers in every pass.

    Processes that attack make different numbers of passes, and would wait for each other forever.
    """
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextmanager
def attack_mode(model: Any, bn_mode: str = 'eval') -> Iterator[None]:
    """Freeze a model while crafting and restore it afterwards.

    Inside, every module is in eval mode, no parameter requires a gradient, standardized weights are computed once, and
    `torch.inference_mode` is off, since autograd cannot be switched on inside it. Afterwards training flags,
    `requires_grad` flags and normalization buffers are restored, also after an exception.

    Args:
        model: The network; a plain function is not changed.
        bn_mode: 'eval', or 'train' to run normalization layers in training mode, on the statistics of the current
            batch; their running averages are restored.

    Raises:
        InputError: On an unknown `bn_mode`, or a network that was built inside `torch.inference_mode`.
    """
    check_choice('bn_mode', bn_mode, ATTACK_BN_MODES)
    grad_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad_enabled):
        if not isinstance(model, nn.Module):
            yield
            return
        if any(p.is_inference() for p in model.parameters()):
            raise InputError(
                'was built inside torch.inference_mode(), where no gradient can be taken', 'build it outside',
                argument='model')
        training = [(m, m.training) for m in model.modules()]
        thawed = [p for p in model.parameters() if p.requires_grad]
        buffers: List[Tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for module, _ in training:
                module.training = bn_mode == 'train' and is_norm(module)
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


def _differentiate(
        values: torch.Tensor,
        x: torch.Tensor,
        logits: torch.Tensor,
        keep_graph: bool = False,
) -> torch.Tensor:
    """Gradient of the summed values; zero if a defence detaches the graph."""
    if not values.requires_grad:
        return torch.zeros_like(x)
    scale = _FLOAT16_LOSS_SCALE if logits.dtype == torch.float16 else 1.
    gradient, = torch.autograd.grad(values.sum() * scale, x, retain_graph=keep_graph, allow_unused=True)
    if gradient is None:
        return torch.zeros_like(x)
    if scale != 1. and gradient.dtype != torch.float16:
        gradient = gradient / scale
    # a single NaN would make the whole image NaN under L2
    return torch.nan_to_num(gradient, 0., 1., -1.)


def input_gradients(
        model: Callable,
        x: torch.Tensor,
        values_fn: Callable[[torch.Tensor], torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]]:
    """Gradients of several values per image with respect to the input only, from one forward pass.

    Works inside `no_grad`, `inference_mode` and autocast. Nothing is accumulated in `.grad`, and no hook of distributed
    training fires. If the network detaches the graph, as some defences do, the gradient is zero. NaN gradients become
    0, infinite ones 1 or -1.

    Args:
        model: Maps x to logits.
        x: Input, shape (N, C, H, W).
        values_fn: Maps logits (N, K) to V values per image, shape (N, V), or to one, shape (N,).

    Returns:
        Logits (N, K) and values, both detached, and an iterator that yields the gradient of one value at a time, shaped
        like x: all gradients at once might not fit in memory.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        logits = model(x)
        values = values_fn(logits)
        columns = values.unbind(1) if values.ndim == 2 else (values,)

    def gradients() -> Iterator[torch.Tensor]:
        for k, column in enumerate(columns):
            with torch.inference_mode(False), torch.enable_grad():
                gradient = _differentiate(column, x, logits, keep_graph=k + 1 < len(columns))
            yield gradient

    return logits.detach(), values.detach(), gradients()


def input_gradient(
        model: Callable,
        x: torch.Tensor,
        loss_fn: Callable[[torch.Tensor], torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the summed loss with respect to the input only; see `input_gradients`.

    Args:
        model: Maps x to logits.
        x: Input, shape (N, C, H, W).
        loss_fn: Maps logits (N, K) to one loss per image (N,).

    Returns:
        Gradient, shaped like x, logits (N, K) and losses (N,), all detached.
    """
    logits, loss, gradients = input_gradients(model, x, loss_fn)
    return next(gradients), logits, loss
