"""Adversarial weight perturbation: computes the loss at weights that are perturbed to increase the loss.

Wu et al. 2020, `Adversarial Weight Perturbation Helps Robust Generalization` - https://arxiv.org/abs/2004.05884
"""
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, List, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.utils import parameters_to_vector

from ..errors import InputError, check_range
from ..settings import check_types, setting

__all__ = ['AWP', 'perturbed', 'worst_direction']

# Loss scale under float16 autocast, so that small gradients do not underflow; only their direction matters.
_FLOAT16_LOSS_SCALE = 1024.


@dataclass(frozen=True, kw_only=True)
class AWP:
    """Settings of adversarial weight perturbation, for every objective that crafts images; off by default.

    Raises:
        InputError: On bad values.
    """
    prefix: ClassVar[str] = 'awp'

    gamma: float = setting(
        0., 'adversarial weight perturbation: size of the perturbation relative to the norm of each weight; 0.005 in '
        'the paper, 0 is off', metavar='GAMMA')
    start_epoch: float = setting(0., 'epoch in which weight perturbation starts', metavar='N')

    def __post_init__(self) -> None:
        check_types(self)
        check_range('gamma', self.gamma, 0, note='0 is off; the paper uses 0.005')
        check_range('start_epoch', self.start_epoch, 0)
        if self.start_epoch and not self.gamma:
            raise InputError('has no effect without a perturbation', 'pass `gamma=0.005`, or leave it out',
                             argument='start_epoch', value=self.start_epoch)


def worst_direction(weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], gamma: float) -> List:
    r"""γ ||w|| g / ||g|| for each weight w and its gradient g (equations 9 and 10 of the paper, one step).

    Args:
        weights: Tensors of any shape.
        gradients: Gradients of the loss to ascend, of the same shapes.
        gamma: γ, the norm of the perturbation relative to the norm of the weight.

    Returns:
        Perturbations with the shapes of the weights; 0 for a gradient that is 0 or not finite.
    """
    moves = []
    for weight, gradient in zip(weights, gradients):
        size = gradient.norm()
        usable = (size > 0) & size.isfinite()
        moves.append(torch.where(usable, gradient * (gamma * weight.norm() / size), 0.))
    return moves


class _Call(nn.Module):
    """Wraps a function that uses a module as the forward pass of another module, as `functional_call` requires."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def perturbed(
        module: nn.Module,
        objective: Callable[..., Dict[str, torch.Tensor]],
        args: Sequence[Any],
        gamma: float,
        no_sync: Callable,
) -> Dict[str, torch.Tensor]:
    """Evaluate an objective at perturbed weights w + v; its gradient flows to w.

    v is the step of `worst_direction` along the gradient at w of the same objective on the same images. Only kernels
    and matrices are perturbed, not biases, gains or affine parameters of normalization. Weights, optimizer, averages
    and checkpoints never contain v, and only the pass at w + v updates running statistics. In distributed training
    gradients are summed over processes, so that v is the same in all of them.

    Args:
        module: The module with the weights, possibly inside DistributedDataParallel.
        objective: Returns a dict with 'loss' and 'output'; calls `module`.
        args: Arguments of the objective.
        gamma: See `worst_direction`.
        no_sync: Returns a context in which a backward pass is not synchronized.

    Returns:
        What the objective returns at w + v.
    """
    named = {
        name: p for name, p in module.named_parameters()
        if p.requires_grad and p.ndim > 1 and p.numel() > len(p)}  # gains have one entry per channel
    weights = list(named.values())
    buffers = [(b, b.clone()) for b in module.buffers()]
    with no_sync():
        result = objective(*args)
        scale = _FLOAT16_LOSS_SCALE if result['output'].dtype == torch.float16 else 1.
        found = torch.autograd.grad(result['loss'] * scale, weights, allow_unused=True)
    del result
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
        gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found)]
        if dist.is_initialized():
            flat = parameters_to_vector(gradients)
            dist.all_reduce(flat)
            gradients = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients)]
        moves = worst_direction(weights, gradients, gamma)
    return torch.func.functional_call(
        _Call(module, objective), {f'module.{name}': w + v for (name, w), v in zip(named.items(), moves)}, tuple(args))
