"""Square attack: random search with square patches; uses only the network's scores.

Andriushchenko et al. 2020, `Square Attack: a query-efficient black-box adversarial attack via random search` -
https://arxiv.org/abs/1912.00049, algorithms 1 to 3.

Under L1: Croce & Hein 2021, `Mind the box: l1-APGD for sparse adversarial attacks on image classifiers` -
https://arxiv.org/abs/2103.01208, section 4.
"""
from functools import cache, lru_cache
from typing import Callable, Tuple

import torch

from ..devices import without_wait
from ..errors import check_at_least, check_range
from ..settings import setting
from . import noise
from .ball import Ball
from .base import Attack
from .losses import logit_gap
from .registry import register_attack
from .state import Batch, State, keep_best
from .threat import ThreatModel, l2_norm

__all__ = ['Square']

# queries after which the area of patches halves, for a budget of _SCHEDULED (authors' code)
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULED = 10000


def _pyramid(height: int, width: int, norm: str) -> torch.Tensor:
    """The papers' eta: nested rectangles around the centre, weighted 1/i^2 (1/i^4 for L1), with norm 1."""
    rows, columns = torch.arange(height, device='cpu'), torch.arange(width, device='cpu')
    top, left = height // 2, width // 2
    eta = torch.zeros(height, width, device='cpu')
    for i in range(max(height // 2, width // 2) + 1):
        inside = ((rows - top).abs() <= i)[:, None] & ((columns - left).abs() <= i)[None, :]
        eta += inside / (i + 1) ** (4 if norm == 'L1' else 2)
    return eta / eta.norm(p=int(norm[1:])).clamp_min(1e-12)


def _two_pyramids(size: int, norm: str = 'L2') -> torch.Tensor:
    """A positive pyramid next to a negative one in a window of size x size, with norm 1."""
    half = size // 2
    window = torch.ones(size, size, device='cpu')
    if half:
        window = torch.cat([_pyramid(half, size, norm), -_pyramid(size - half, size, norm)])
    return window / window.norm(p=int(norm[1:])).clamp_min(1e-12)


# Small tables, cached on the device: a copy from the CPU would force a GPU sync in every query.
@cache
def _window(size: int, norm: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return without_wait(_two_pyramids(size, norm).to(dtype), device)


@lru_cache(maxsize=64)
def _sides(p_init: float, height: int, width: int, norm: str) -> Tuple[int, ...]:
    """Side of the patch after each number of halvings."""
    halvings = torch.arange(len(_HALVINGS) + 1, dtype=torch.float64, device='cpu')
    share = p_init / 2. ** halvings
    size = (share * height * width).sqrt().round().long().clamp_min(1 if norm == 'Linf' else 3)
    if norm != 'Linf':
        size = size + (size % 2 == 0)
    return tuple(size.clamp_max(min(height, width)).tolist())


@lru_cache(maxsize=64)
def _on_device(values: Tuple[int, ...], device: torch.device) -> torch.Tensor:
    return without_wait(torch.tensor(values, device='cpu'), device)


@register_attack
class Square(Attack):
    """Square attack on the logit gap; takes no gradient."""
    name = 'square'
    norms = ('Linf', 'L2', 'L1')
    budget = 'query_limit'
    counts_queries = True
    needs_float32 = True  # a patch changes the gap by less than bfloat16 resolves
    query_limit: int = setting(5000, 'maximum number of queries per image and restart')
    p_init: float = setting(.8, "share of an image's pixels in the first patch, in (0, 1]")
    rescale_schedule: bool = setting(
        False, 'rescale the patch schedule from 10,000 queries to query_limit, which is better for small limits; '
        'AutoAttack does not rescale it')
    restarts: int = setting(1, 'number of runs; each attacks the images that earlier runs failed on')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('query_limit', self.query_limit)
        check_at_least('restarts', self.restarts)
        check_range('p_init', self.p_init, 0., 1., open_low=True)

    @property
    def run_length(self) -> int:
        return self.query_limit

    def patch_sizes(self, step: torch.Tensor, height: int, width: int, norm: str) -> torch.Tensor:
        """Side of the patch at a query, shape (N,), by the paper's schedule."""
        # query 0 is the start; the reference counts its iterations from there
        step = step - 1
        if self.rescale_schedule:
            step = step * _SCHEDULED // self.query_limit
        sides = _on_device(_sides(self.p_init, height, width, norm), step.device)
        return sides[torch.bucketize(step, _on_device(_HALVINGS, step.device))]

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        x = batch.x
        count, channels, height, width = x.shape
        if threat.norm == 'Linf':
            stripes = noise.signs(batch.seeds, 0, channels * width).view(count, channels, 1, width)
            delta = threat.eps * stripes.to(x.dtype)
        else:
            delta = self._tiles(batch, threat.norm)
            if threat.norm == 'L1':
                return batch.state(point=Ball(x, threat).project(x + delta))
            delta = delta / l2_norm(delta).clamp_min(1e-12) * threat.eps
        return batch.state(point=(x + delta).clamp(0, 1))

    @staticmethod
    def _tiles(batch: Batch, norm: str) -> torch.Tensor:
        count, channels, height, width = batch.x.shape
        delta = torch.zeros_like(batch.x)
        size = max(min(height, width) // 5, 1)
        window = _window(size, norm, delta.dtype, delta.device)
        top, left = (height % size) // 2, (width % size) // 2
        places = [(i, j) for i in range(height // size) for j in range(width // size)]
        random = noise.signs(batch.seeds, 0, len(places) * (channels + 1)).view(count, len(places), channels + 1)
        for k, (i, j) in enumerate(places):
            turned = torch.where(random[:, k, 0].view(-1, 1, 1) > 0, window, window.T)
            rows, columns = top + i * size, left + j * size
            delta[:, :, rows:rows + size, columns:columns + size] = (
                turned[:, None] * random[:, k, 1:, None, None].to(delta.dtype))
        return delta

    def step(self, model: Callable, state: State, threat: ThreatModel) -> None:
        with torch.no_grad():
            logits = model(state['point'])
        # a tie is a failure: argmax may still pick the true class
        fooled = logits.argmax(1) != state['y']
        keep_best(state, state['point'], fooled, logit_gap(logits, state['y']))
        state['step'] = state['step'] + 1
        state['done'] = (state['score'] == float('inf')) | (state['step'] >= self.query_limit)
        state['point'] = (
            self._propose_linf(state, threat.eps) if threat.norm == 'Linf' else self._propose_windows(state, threat))

    def _propose_linf(self, state: State, eps: float) -> torch.Tensor:
        x, best = state['x'], state['best']
        count, channels, height, width = x.shape
        size = self.patch_sizes(state['step'], height, width, 'Linf')
        random = noise.uniform(state['seed'], state['step'], 2 + channels)
        top = (random[:, 0] * (height - size + 1)).long()[:, None]
        left = (random[:, 1] * (width - size + 1)).long()[:, None]
        size = size[:, None]
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        inside = ((rows >= top) & (rows < top + size))[:, None, :, None] & (
            (columns >= left) & (columns < left + size))[:, None, None, :]
        sign = torch.where(random[:, 2:] < .5, -1., 1.).to(x.dtype)[:, :, None, None]
        return torch.where(inside, (x + sign * eps).clamp(0, 1), best)

    def _propose_windows(self, state: State, threat: ThreatModel) -> torch.Tensor:
        x, eps, is_l1 = state['x'], threat.eps, threat.norm == 'L1'

        def norm_of(windows: torch.Tensor) -> torch.Tensor:
            return windows.abs().sum((2, 3), keepdim=True) if is_l1 else windows.norm(dim=(2, 3), keepdim=True)

        count, channels, height, width = x.shape
        # from the steps counted on the host: reading them from a GPU would force a sync
        steps = torch.tensor([age + 1 for age in state.ages] or state['step'].tolist(), device='cpu')
        sizes = self.patch_sizes(steps, height, width, threat.norm)
        random = noise.uniform(state['seed'], state['step'], 5 + channels)
        delta = state['best'] - x
        out = delta.clone()
        for size in sizes.unique().tolist():
            own = without_wait((sizes == size).nonzero().squeeze(1), x.device)
            part, r = (delta.clone(), random) if len(own) == count else (
                rows[own] for rows in (delta, random))
            corners = [(r[:, i] * (side - size + 1)).long() for i, side in enumerate((height, width) * 2)]
            window = torch.arange(size, device=x.device)
            index = torch.arange(len(own), device=x.device)[:, None, None, None]
            channel = torch.arange(channels, device=x.device)[None, :, None, None]
            target, source = (
                (index, channel, corners[i].view(-1, 1, 1, 1) + window[None, None, :, None],
                 corners[i + 1].view(-1, 1, 1, 1) + window[None, None, None, :])
                for i in (0, 2))
            taken = part[target]
            union = torch.zeros_like(part)
            union[target] = 1
            union[source] = 1
            # the first window gets the budget of both windows, plus the unused budget of the image
            if is_l1:
                budget = (eps - threat.size(part)).clamp_min(0).view(-1, 1, 1, 1) + norm_of(part * union) * channels
            else:
                budget = ((eps ** 2 - l2_norm(part) ** 2).clamp_min(0) / channels
                          + (part * union).square().sum((2, 3), keepdim=True)).sqrt()
            shape = _window(size, threat.norm, x.dtype, x.device)
            shape = torch.where(r[:, 4].view(-1, 1, 1) < .5, shape, shape.T)[:, None]
            sign = torch.where(r[:, 5:] < .5, -1., 1.).to(x.dtype)[:, :, None, None]
            fresh = shape * sign + taken / norm_of(taken).clamp_min(1e-12)
            part[source] = 0
            part[target] = fresh / norm_of(fresh).clamp_min(1e-12) * budget
            moved = part if is_l1 else part / l2_norm(part).clamp_min(1e-12) * eps
            out = moved if len(own) == count else out.index_copy(0, own, moved)
        return Ball(x, threat).project(x + out) if is_l1 else (x + out).clamp(0, 1)
