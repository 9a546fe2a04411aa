"""Square attack: random search with square patches, from the network's scores alone.

Andriushchenko et al. 2020, `Square Attack: a query-efficient black-box adversarial attack via random search` -
https://arxiv.org/abs/1912.00049, algorithms 1 to 3.
"""
from typing import Callable

import torch

from ..errors import InputError
from . import noise
from .losses import logit_gap
from .search import Jobs, Search, State, keep_best, run_search
from .threat import ThreatModel, l2_norm

__all__ = ['SquareSearch', 'square']

# queries after which the share of pixels in a patch halves, of a budget of _SCHEDULED (the authors' code)
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULED = 10000


def _pyramid(height: int, width: int) -> torch.Tensor:
    """The paper's eta for L2: nested rectangles, each of weight 1/i^2 around the centre, with norm 1."""
    rows, columns = torch.arange(height), torch.arange(width)
    top, left = height // 2, width // 2
    eta = torch.zeros(height, width)
    for i in range(max(height // 2, width // 2) + 1):
        inside = ((rows - top).abs() <= i)[:, None] & ((columns - left).abs() <= i)[None, :]
        eta += inside / (i + 1) ** 2
    return eta / eta.norm().clamp_min(1e-12)


def _two_pyramids(size: int) -> torch.Tensor:
    """A positive pyramid beside a negative one in a window of size x size, with norm 1."""
    half = size // 2
    window = torch.cat([_pyramid(half, size), -_pyramid(size - half, size)]) if half else torch.ones(size, size)
    return window / window.norm().clamp_min(1e-12)


class SquareSearch(Search):
    """Square attack on a pool of images; arguments of `square`."""
    needs_float32 = True  # a patch changes the margin by less than bfloat16 can tell

    def __init__(
            self,
            threat: ThreatModel,
            query_limit: int = 5000,
            p_init: float = .8,
            rescale_schedule: bool = False,
    ):
        if query_limit < 1:
            raise InputError(f'query_limit={query_limit} must be at least 1')
        if not 0 < p_init <= 1:
            raise InputError(f'p_init={p_init} must be in (0, 1]: the share of pixels in the first patch')
        self.threat = threat
        self.query_limit = query_limit
        self.p_init = p_init
        self.rescale_schedule = rescale_schedule

    def patch_sizes(self, step: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Side of the patch at a query, shape (N,), by the paper's schedule."""
        edges = torch.tensor(_HALVINGS, device=step.device)
        # query 0 is the start; the reference counts its iterations from there
        step = step - 1
        if self.rescale_schedule:
            step = step * _SCHEDULED // self.query_limit
        share = self.p_init / 2. ** torch.bucketize(step, edges).double()
        smallest = 1 if self.threat.norm == 'linf' else 3
        size = (share * height * width).sqrt().round().long().clamp_min(smallest)
        if self.threat.norm == 'l2':
            size = size + (size % 2 == 0)
        return size.clamp_max(min(height, width))

    def start(self, jobs: Jobs) -> State:
        x = jobs.x
        count, channels, height, width = x.shape
        if self.threat.norm == 'linf':
            stripes = noise.signs(jobs.seeds, 0, channels * width).view(count, channels, 1, width)
            delta = self.threat.eps * stripes.to(x.dtype)
        else:
            delta = self._tiles(jobs)
        return jobs.state(point=(x + delta).clamp(0, 1))

    def _tiles(self, jobs: Jobs) -> torch.Tensor:
        count, channels, height, width = jobs.x.shape
        delta = torch.zeros_like(jobs.x)
        size = max(min(height, width) // 5, 1)
        window = _two_pyramids(size).to(delta)
        top, left = (height % size) // 2, (width % size) // 2
        places = [(i, j) for i in range(height // size) for j in range(width // size)]
        random = noise.signs(jobs.seeds, 0, len(places) * (channels + 1)).view(count, len(places), channels + 1)
        for k, (i, j) in enumerate(places):
            turned = torch.where(random[:, k, 0].view(-1, 1, 1) > 0, window, window.T)
            rows, columns = top + i * size, left + j * size
            delta[:, :, rows:rows + size, columns:columns + size] = (
                turned[:, None] * random[:, k, 1:, None, None].to(delta.dtype))
        return delta / l2_norm(delta).clamp_min(1e-12) * self.threat.eps

    def step(self, model: Callable, state: State) -> None:
        with torch.no_grad():
            logits = model(state['point'])
        # a tie is a failure: argmax may still pick the true class
        fooled = logits.argmax(1) != state['y']
        keep_best(state, state['point'], fooled, logit_gap(logits, state['y']))
        state['step'] = state['step'] + 1
        state['done'] = (state['rank'] == float('inf')) | (state['step'] >= self.query_limit)
        propose = self._propose_linf if self.threat.norm == 'linf' else self._propose_l2
        state['point'] = propose(state)

    def _propose_linf(self, state: State) -> torch.Tensor:
        x, best = state['x'], state['best']
        count, channels, height, width = x.shape
        size = self.patch_sizes(state['step'], height, width)
        random = noise.uniform(state['seed'], state['step'], 2 + channels)
        top = (random[:, 0] * (height - size + 1)).long()[:, None]
        left = (random[:, 1] * (width - size + 1)).long()[:, None]
        size = size[:, None]
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        inside = ((rows >= top) & (rows < top + size))[:, None, :, None] & (
            (columns >= left) & (columns < left + size))[:, None, None, :]
        sign = torch.where(random[:, 2:] < .5, -1., 1.).to(x.dtype)[:, :, None, None]
        return torch.where(inside, (x + sign * self.threat.eps).clamp(0, 1), best)

    def _propose_l2(self, state: State) -> torch.Tensor:
        x, eps = state['x'], self.threat.eps
        count, channels, height, width = x.shape
        sizes = self.patch_sizes(state['step'], height, width)
        random = noise.uniform(state['seed'], state['step'], 5 + channels)
        delta = state['best'] - x
        out = delta.clone()
        for size in sizes.unique().tolist():
            own = (sizes == size).nonzero().squeeze(1)
            part, r = delta[own], random[own]
            corners = (r[:, :4] * torch.tensor([height - size + 1, width - size + 1] * 2, device=x.device)).long()
            window = torch.arange(size, device=x.device)
            index = torch.arange(len(own), device=x.device)[:, None, None, None]
            channel = torch.arange(channels, device=x.device)[None, :, None, None]
            target, source = (
                (index, channel, corners[:, i, None, None, None] + window[None, None, :, None],
                 corners[:, i + 1, None, None, None] + window[None, None, None, :])
                for i in (0, 2))
            taken = part[target]
            union = torch.zeros_like(part)
            union[target] = 1
            union[source] = 1
            # the budget of both windows and what the image has left goes into the first window
            budget = ((eps ** 2 - l2_norm(part) ** 2).clamp_min(0) / channels
                      + (part * union).square().sum((2, 3), keepdim=True)).sqrt()
            shape = _two_pyramids(size).to(x)
            shape = torch.where(r[:, 4].view(-1, 1, 1) < .5, shape, shape.T)[:, None]
            sign = torch.where(r[:, 5:] < .5, -1., 1.).to(x.dtype)[:, :, None, None]
            fresh = shape * sign + taken / taken.norm(dim=(2, 3), keepdim=True).clamp_min(1e-12)
            part[source] = 0
            part[target] = fresh / fresh.norm(dim=(2, 3), keepdim=True).clamp_min(1e-12) * budget
            out[own] = part / l2_norm(part).clamp_min(1e-12) * eps
        return (x + out).clamp(0, 1)


def square(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        query_limit: int = 5000,
        p_init: float = .8,
        rescale_schedule: bool = False,
        **kwargs,
) -> torch.Tensor:
    """Square attack on the margin of the logits.

    Args:
        model: Maps images to logits; no gradient is taken.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True class indices, shape (N,).
        threat: Norm and eps.
        query_limit: Largest number of images shown to the network for each image and restart.
        p_init: Share of an image's pixels in the first patch, in (0, 1].
        rescale_schedule: Shrink patches as if the budget were 10,000, which makes more of a small one; AutoAttack does
            not.
        **kwargs: `restarts`, `space`, `batch_size`, `search_model`, `progress` and `seed` of `apgd_ce`.

    Returns:
        Adversarial images like x, within eps of x and within valid pixels.

    Raises:
        InputError: On bad arguments, and if x is not in [0, 1] although no `space` is given.
    """
    return run_search(SquareSearch(threat, query_limit, p_init, rescale_schedule), model, x, y, **kwargs).adv
