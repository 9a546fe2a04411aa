"""Engine that perturbs a whole batch in lockstep: for training, surrogates and networks with batch statistics."""
from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, Optional, Tuple

import torch

from .ball import Ball
from .checks import Classifier
from .loop import longest_gap

__all__ = ['KEEP', 'Ascent', 'last_iterate', 'most_fooled']

KEEP = ('last', 'most_fooled')
_ROWS = 32  # a shrunk batch has a multiple of this size, since each new shape may cost a compilation

Rows = Dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ascent:
    """One ascent step of a gradient attack.

    Args:
        step_size: Step size in pixel units.
        decay: Decay of the momentum over L1-normalized gradients, 0 for none.
    """
    step_size: float
    decay: float = 0.

    def move(self, ball: Ball, rows: Rows, gradient: torch.Tensor) -> None:
        """Move `point` along the gradient with respect to the network's input, and update `velocity`."""
        direction = ball.to_input(gradient)
        if self.decay > 0:
            unit = direction / direction.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
            direction = rows['velocity'] = self.decay * rows.get('velocity', torch.zeros_like(unit)) + unit
        rows['point'] = ball.ascend(rows['point'], direction, self.step_size)


class _Friendly:
    """Early stopping of friendly adversarial training: an image stops once it has been misclassified `tau` + 1 times.

    On a CPU stopped images leave the batch immediately. On a GPU each check forces a sync, and a compiled network is
    recompiled for each new shape. There stopped images stay in the batch, unchanged, until it next shrinks.
    """

    def __init__(self, start: torch.Tensor, tau: int, compiled: bool):
        self.adv = start.clone()
        self.left = torch.full((len(start),), tau, device=start.device)
        self.stopped = torch.zeros_like(self.left, dtype=torch.bool)
        self.longest_gap = longest_gap(start.device)
        self.multiple = _ROWS if self.longest_gap > 1 or compiled else 1
        self.gap, self.next_look = 1, 0

    def stop(self, fooled: torch.Tensor, step: int) -> Optional[torch.Tensor]:
        """Update which images have stopped; returns the rows to keep in the batch, or None for all."""
        self.stopped = self.stopped | (fooled & (self.left <= 0))
        self.left = self.left - fooled.long()
        if step < self.next_look:
            return None
        self.next_look, self.gap = step + self.gap, min(2 * self.gap, self.longest_gap)
        going = len(self.stopped) - int(self.stopped.sum())
        count = min(-(-going // self.multiple) * self.multiple, len(self.stopped))
        return None if count == len(self.stopped) else self.stopped.long().argsort(stable=True)[:count].sort().values

    def put_aside(self, rows: Rows) -> None:
        """Save the images of the batch at their original positions."""
        self.adv[rows['place']] = rows['point']

    def take(self, index: torch.Tensor) -> None:
        """Keep these rows."""
        self.left, self.stopped = self.left[index], self.stopped[index]


def last_iterate(
        model: Classifier,
        gradient_fn: Callable,
        ball: Ball,
        rows: Rows,
        loss_fn: Callable[[Rows, torch.Tensor], torch.Tensor],
        steps: int,
        ascent: Ascent,
        tau: Optional[int],
) -> torch.Tensor:
    """Take all steps and return the last iterate.

    Args:
        model: The network.
        gradient_fn: Its `GradientAttack.gradient`.
        ball: The allowed images.
        rows: `point` (the start), `y` (true classes), `seed`, `step` and the inputs of `loss_fn`, one row per image.
        loss_fn: Maps rows and logits to the loss to maximize.
        steps, ascent, tau: See `GradientAttack`.
    """
    friendly = None if tau is None else _Friendly(rows['point'], tau, hasattr(model.model, '_orig_mod'))
    if friendly is not None:
        rows['place'] = torch.arange(len(rows['point']), device=rows['point'].device)
    for step in range(steps):
        gradient, logits, _ = gradient_fn(rows, partial(loss_fn, rows))
        if friendly is not None:
            index = friendly.stop(logits.argmax(1) != rows['y'], step)
            if index is not None:
                friendly.put_aside(rows)
                friendly.take(index)
                rows = {name: values[index] for name, values in rows.items()}
                gradient, ball = gradient[index], ball.take(index)
                if not len(index):
                    break
        before = rows['point']
        ascent.move(ball, rows, gradient)
        rows['step'] = rows['step'] + 1
        if friendly is not None and friendly.multiple > 1:
            rows['point'] = torch.where(friendly.stopped.view(-1, 1, 1, 1), before, rows['point'])
    if friendly is None:
        return rows['point']
    friendly.put_aside(rows)
    return friendly.adv


def most_fooled(
        model: Callable,
        gradient_fn: Callable,
        ball: Ball,
        rows: Rows,
        loss_fn: Callable[[Rows, torch.Tensor], torch.Tensor],
        steps: int,
        ascent: Ascent,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The iterate in which the most images fool the network at once, and their number as a tensor."""
    best, most = rows['point'], torch.full((), -1, device=rows['point'].device)

    def look(logits: torch.Tensor) -> None:
        nonlocal best, most
        count = (logits.argmax(1) != rows['y']).sum()
        # without a branch, which would force a GPU sync
        best, most = torch.where(count > most, rows['point'], best), torch.maximum(count, most)

    for _ in range(steps):
        gradient, logits, _ = gradient_fn(rows, partial(loss_fn, rows))
        look(logits)
        ascent.move(ball, rows, gradient)
        rows['step'] = rows['step'] + 1
    with torch.no_grad():
        look(model(rows['point']))
    return best, most
