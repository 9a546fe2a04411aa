"""RayS: the nearest decision boundary along sign vectors, from predicted classes alone.

Chen & Gu 2020, `RayS: A Ray Searching Method for Hard-label Adversarial Attack` - https://arxiv.org/abs/2006.12792,
algorithms 2 and 3.
"""
from typing import Callable, Optional

import torch

from ..errors import InputError
from .losses import hard_labels
from .search import Jobs, Search, State, keep_best, run_search
from .threat import ThreatModel

__all__ = ['RaySSearch', 'rays']

_TOLERANCE = 1e-3  # where a bisection ends, as an L2 distance (the authors' code)


class RaySSearch(Search):
    """RayS on a pool of images; arguments of `rays`.

    Each image either probes a direction (the best one with a block of signs flipped) at the best radius so far, or,
    where that fooled, bisects for the radius at which it starts to.
    """
    needs_float32 = True  # for the last digits of a radius

    def __init__(self, threat: ThreatModel, query_limit: int = 10000):
        if threat.norm != 'linf':
            raise InputError(f"norm={threat.norm!r}: RayS is an untargeted Linf attack, use norm='linf'")
        if query_limit < 1:
            raise InputError(f'query_limit={query_limit} must be at least 1')
        self.threat = threat
        self.query_limit = query_limit

    def start(self, jobs: Jobs) -> State:
        zero = torch.zeros(len(jobs.x), dtype=torch.int64, device=jobs.x.device)
        one = torch.ones_like(jobs.x[:, 0, 0, 0])
        return jobs.state(
            y=hard_labels(jobs.y),
            signs=torch.ones_like(jobs.x),
            trial=torch.ones_like(jobs.x),
            radius=one * float('inf'),
            low=one * 0,
            high=one.clone(),
            bisecting=zero > 0,
            level=zero,
            block=zero - 1,
            point=(jobs.x + 1).clamp(0, 1),
        )

    def step(self, model: Callable, state: State) -> None:
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
        over |= bisecting & (high <= self.threat.eps)
        better = over & (high < state['radius'])
        image = better.view(-1, 1, 1, 1)
        state['radius'] = torch.where(better, high, state['radius'])
        state['signs'] = torch.where(image, state['trial'], state['signs'])
        state['step'] = state['step'] + 1
        allowed = state['radius'] <= self.threat.eps
        keep_best(state, self._at(state, state['signs'], state['radius']), allowed, state['rank'])
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
        """Best signs with the next block flipped, for images that probe next; blocks halve once all were tried."""
        size = state['x'][0].numel()
        level, block = state['level'], state['block'] + probing
        length = (size + 2 ** level - 1) // 2 ** level
        past = probing & ((block >= 2 ** level) | (block * length >= size))
        # blocks of one pixel each cannot be halved: begin anew
        level = torch.where(past, torch.where(length > 1, level + 1, 0), level)
        block = torch.where(past, 0, block)
        length = (size + 2 ** level - 1) // 2 ** level
        pixel = torch.arange(size, device=block.device)
        start = (block * length)[:, None]
        inside = ((pixel >= start) & (pixel < start + length[:, None])).view(state['x'].shape)
        flipped = torch.where(inside, -state['signs'], state['signs'])
        state['trial'] = torch.where(probing.view(-1, 1, 1, 1), flipped, state['trial'])
        state['level'], state['block'] = level, block


def rays(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        query_limit: int = 10000,
        targets: Optional[torch.Tensor] = None,
        **kwargs,
) -> torch.Tensor:
    """RayS: needs the predicted class alone, and draws no random numbers.

    Args:
        model: Maps images to logits, of which only the largest counts.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True class indices, shape (N,).
        threat: Linf and eps; an image is fooled once its radius is at most eps.
        query_limit: Largest number of images shown to the network for each image.
        targets: Not supported.
        **kwargs: `space`, `batch_size`, `search_model` and `progress` of `apgd_ce`; a `seed` is without effect.

    Returns:
        Images like x: one that fools within eps of x, x itself where none was found.

    Raises:
        InputError: On bad arguments, a norm other than Linf, targets, and if x is not in [0, 1] although no `space` is
            given.
    """
    if targets is not None:
        raise InputError('targets: RayS is an untargeted Linf attack, use pgd or apgd_t to steer towards a class')
    return run_search(RaySSearch(threat, query_limit), model, x, y, **kwargs).adv
