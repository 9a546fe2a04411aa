"""Base of minimum-norm attacks: one run gives the accuracy at every eps."""
import math
from dataclasses import dataclass
from typing import Callable

import torch

from ..errors import check_at_least
from ..settings import setting
from .base import Attack
from .context import input_gradient
from .state import Batch, State, keep_best
from .threat import ThreatModel, l2_norm

__all__ = ['MinimumNorm', 'Seen']


@dataclass(frozen=True)
class Seen:
    """Evaluation of the current point.

    Attributes:
        fools: Whether the point fools the network, shape (N,).
        loss: Loss at the point, shape (N,).
        gradient: Gradient of the loss, shape (N, C, H, W).
        cosine: Schedule from 1 to 0 over the steps, shape (N, 1, 1, 1).
    """
    fools: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor
    cosine: torch.Tensor

    @property
    def ascent(self) -> torch.Tensor:
        """A step along the gradient whose L2 length decays from 1 to 0.01, in pixel units."""
        return (.01 + .99 * self.cosine) * self.gradient / l2_norm(self.gradient).clamp_min(1e-12)


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Attack):
    """Runs all steps on every image and returns the nearest point that fools the network within eps.

    With `threat.unbounded(shape)` no point is excluded. Subclasses define `loss_of` and `move`, which must not depend
    on eps.
    """
    minimizes = True
    steerable = True
    needs_float32 = True  # for the distance
    steps: int = setting(100, 'number of gradient steps')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('steps', self.steps)

    @property
    def run_length(self) -> int:
        return self.steps + 1

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        farthest = threat.size(torch.maximum(batch.x, 1 - batch.x))
        return batch.state(point=batch.x.clone(), farthest=farthest)

    def loss_of(self, state: State, logits: torch.Tensor) -> torch.Tensor:
        """Loss to maximize: one value per image."""
        raise NotImplementedError

    def move(self, state: State, threat: ThreatModel, seen: Seen) -> torch.Tensor:
        """The next perturbation, shape (N, C, H, W).

        Args:
            state: State of the images; the attack's own entries are updated.
            threat: Threat model with the norm to minimize.
            seen: Evaluation of `point`.
        """
        raise NotImplementedError

    def step(self, model: Callable, state: State, threat: ThreatModel) -> None:
        gradient, logits, loss = input_gradient(model, state['point'], lambda z: self.loss_of(state, z))
        fools = logits.argmax(1) != state['y']
        distance = threat.size(state['point'] - state['x'])
        keep_best(
            state, state['point'], torch.zeros_like(fools),
            torch.where(fools & (distance <= threat.eps), -distance, -math.inf))
        state['done'] = state['step'] >= self.steps
        cosine = (1 + torch.cos(math.pi * state['step'].to(loss.dtype) / self.steps)) / 2
        delta = self.move(state, threat, Seen(fools, loss, gradient, cosine.view(-1, 1, 1, 1)))
        state['point'] = (state['x'] + delta).clamp(0, 1)
        state['step'] = state['step'] + 1
