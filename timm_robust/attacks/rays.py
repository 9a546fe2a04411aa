"""RayS: searches for the nearest decision boundary along sign vectors; uses only predicted classes.

Chen & Gu 2020, `RayS: A Ray Searching Method for Hard-label Adversarial Attack` - https://arxiv.org/abs/2006.12792,
algorithms 2 and 3.
"""
from typing import Callable

import torch

from ..errors import check_at_least
from ..settings import setting
from .base import Attack
from .registry import register_attack
from .state import Batch, State, keep_best
from .threat import ThreatModel

__all__ = ['RayS']

_TOLERANCE = 1e-3  # of a bisection, as an L2 distance (authors' code)


@register_attack
class RayS(Attack):
    """Untargeted RayS: needs only the predicted class; deterministic.

    Each step either probes a direction (the best one with a block of signs flipped) at the best radius so far or, after
    a successful probe, bisects for the smallest radius that fools the network. The attack succeeds on an image once its
    radius is at most eps.
    """
    name = 'rays'
    norms = ('Linf',)
    budget = 'query_limit'
    counts_queries = True
    needs_float32 = True  # for precise radii
    query_limit: int = setting(10000, 'maximum number of queries per image')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('query_limit', self.query_limit)

    @property
    def run_length(self) -> int:
        return self.query_limit

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        zero = batch.full(0, torch.int64)
        return batch.state(
            signs=torch.ones_like(batch.x),
            trial=torch.ones_like(batch.x),
            radius=batch.full(float('inf')),
            low=batch.full(0.),
            high=batch.full(1.),
            bisecting=zero > 0,
            level=zero.clone(),
            block=zero - 1,
            point=(batch.x + 1).clamp(0, 1),
        )

    def step(self, model: Callable, state: State, threat: ThreatModel) -> None:
        x = state['x']
        size = x[0].numel()
        with torch.no_grad():
            fools = model(state['point']).argmax(1) != state['y']
        bisecting = state['bisecting']
        middle = (state['low'] + state['high']) / 2
        # a probe that fools starts a bisection between the image and the best radius
        low = torch.where(bisecting & ~fools, middle, torch.where(bisecting, state['low'], 0.))
        high = torch.where(bisecting, torch.where(fools, middle, state['high']), state['radius'].clamp_max(1.))
        bisecting = torch.where(bisecting, True, fools)
        over = bisecting & (high - low <= _TOLERANCE / size ** .5)
        over |= bisecting & (high <= threat.eps)
        better = over & (high < state['radius'])
        image = better.view(-1, 1, 1, 1)
        state['radius'] = torch.where(better, high, state['radius'])
        state['signs'] = torch.where(image, state['trial'], state['signs'])
        state['step'] = state['step'] + 1
        allowed = state['radius'] <= threat.eps
        keep_best(state, self._at(state, state['signs'], state['radius']), allowed, state['score'])
        state['done'] = allowed | (state['step'] >= self.query_limit)

        bisecting = bisecting & ~over
        self._flip_next_block(state, ~bisecting)
        state['low'], state['high'], state['bisecting'] = low, high, bisecting
        ahead = torch.where(bisecting, (low + high) / 2, state['radius'].clamp_max(1.))
        state['point'] = self._at(state, state['trial'], ahead)

    @staticmethod
    def _at(state: State, signs: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        return (state['x'] + signs * radius.view(-1, 1, 1, 1)).clamp(0, 1)

    @staticmethod
    def _flip_next_block(state: State, probing: torch.Tensor) -> None:
        """Flip the next block of the best signs, for images that probe next; halve blocks once all were tried."""
        size = state['x'][0].numel()
        level, block = state['level'], state['block'] + probing
        length = (size + 2 ** level - 1) // 2 ** level
        past = probing & ((block >= 2 ** level) | (block * length >= size))
        # blocks of one pixel cannot be halved: start over
        level = torch.where(past, torch.where(length > 1, level + 1, 0), level)
        block = torch.where(past, 0, block)
        length = (size + 2 ** level - 1) // 2 ** level
        pixel = torch.arange(size, device=block.device)
        start = (block * length)[:, None]
        inside = ((pixel >= start) & (pixel < start + length[:, None])).view(state['x'].shape)
        flipped = torch.where(inside, -state['signs'], state['signs'])
        state['trial'] = torch.where(probing.view(-1, 1, 1, 1), flipped, state['trial'])
        state['level'], state['block'] = level, block
