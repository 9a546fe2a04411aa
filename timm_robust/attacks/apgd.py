"""Auto-PGD: momentum steps whose length halves, image by image, where progress stalls.

Croce & Hein 2020, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks` -
https://arxiv.org/abs/2003.01690, algorithm 1.
"""
from functools import partial
from typing import Callable, Optional

import torch

from ..errors import InputError
from . import noise
from .context import input_gradient
from .losses import cross_entropy, dlr, dlr_targeted, hard_labels
from .search import Jobs, Search, State, keep_best, run_search
from .threat import Ball, InputSpace, Seed, ThreatModel, l2_norm

__all__ = ['APGDSearch', 'apgd_ce', 'apgd_dlr', 'apgd_t']

_MOMENTUM = .75  # share of the new step (alpha in the paper)
_MIN_CLASSES = {'ce': 2, 'dlr': 3, 'dlr_targeted': 4}


class APGDSearch(Search):
    """Auto-PGD on a pool of images; arguments of `apgd_ce`."""

    def __init__(self, threat: ThreatModel, loss: str, steps: int = 100, rho: float = .75, eot_iter: int = 1):
        if steps < 1:
            raise InputError(f'steps={steps} must be at least 1')
        if eot_iter < 1:
            raise InputError(f'eot_iter={eot_iter} must be at least 1')
        self.threat = threat
        self.loss = loss
        self.steps = steps
        self.rho = rho
        self.queries = eot_iter
        # first interval between two checks of the step size, and how intervals shrink (the paper's p_j)
        self.first_interval = max(int(.22 * steps), 1)
        self.shorter_by = max(int(.03 * steps), 1)
        self.min_interval = max(int(.06 * steps), 1)

    def start(self, jobs: Jobs) -> State:
        x, size = jobs.x, jobs.x[0].numel()
        ball = Ball(x, self.threat, InputSpace())
        # on the surface of the ball, as the reference starts
        if self.threat.norm == 'linf':
            direction = noise.uniform(jobs.seeds, 0, size) * 2 - 1
            direction = direction / direction.abs().amax(1, keepdim=True).clamp_min(1e-12)
        else:
            direction = noise.normal(jobs.seeds, 0, size)
            direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
        point = ball.project(x + self.threat.eps * direction.to(x.dtype).view(x.shape))
        lowest = torch.full((len(x),), float('-inf'), dtype=x.dtype, device=x.device)
        zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return jobs.state(
            **ball.rows(),
            point=point,
            previous=point.clone(),
            best_gradient=torch.zeros_like(x),
            step_size=torch.full_like(lowest, 2 * self.threat.eps),
            last_loss=lowest,
            ascents=zero,
            since_check=zero - 1,
            interval=zero + self.first_interval,
            best_at_check=lowest.clone(),
            halved_at_check=zero == 0,
        )

    def _loss(self, state: State, logits: torch.Tensor) -> torch.Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if logits.shape[1] < _MIN_CLASSES[self.loss]:
            raise InputError(
                f'the {self.loss} loss of APGD needs at least {_MIN_CLASSES[self.loss]} classes, the model has '
                f'{logits.shape[1]}')
        if self.loss == 'dlr_targeted':
            return dlr_targeted(logits, state['y'], state['target'])
        return {'ce': cross_entropy, 'dlr': dlr}[self.loss](logits, state['y'])

    def step(self, model: Callable, state: State) -> None:
        gradient, logits, loss = input_gradient(model, state['point'], partial(self._loss, state))
        fooled = logits.argmax(1) != hard_labels(state['y'])
        for _ in range(self.queries - 1):
            more, _, more_loss = input_gradient(model, state['point'], partial(self._loss, state))
            gradient, loss = gradient + more, loss + more_loss
            # that one noisy pass is fooled says little about the next: the highest mean loss decides, at the end
            fooled = torch.zeros_like(fooled)
        better = keep_best(state, state['point'], fooled, loss / self.queries)
        state['best_gradient'] = torch.where(better.view(-1, 1, 1, 1), gradient, state['best_gradient'])
        state['done'] = (state['rank'] == float('inf')) | (state['step'] >= self.steps)
        self._check_step_size(state, loss / self.queries)
        halved = state.pop('halved').view(-1, 1, 1, 1)
        point = torch.where(halved, state['best'], state['point'])
        gradient = torch.where(halved, state['best_gradient'], gradient)
        momentum = torch.where((state['step'] == 0).view(-1, 1, 1, 1), 0., point - state['previous'])
        share = torch.where(state['step'] == 0, 1., _MOMENTUM).to(point.dtype).view(-1, 1, 1, 1)
        state['previous'] = point
        state['point'] = self._next(state, point, gradient, momentum, share)
        state['step'] = state['step'] + 1

    def _check_step_size(self, state: State, loss: torch.Tensor) -> None:
        """Conditions 1 and 2 of the paper's section 3.2; sets state['halved']."""
        state['ascents'] = state['ascents'] + ((loss > state['last_loss']) & (state['step'] > 0))
        state['last_loss'] = loss
        since = state['since_check'] + 1
        due = since == state['interval']
        stalls = state['ascents'] <= self.rho * state['interval']
        no_better = ~state['halved_at_check'] & (state['best_at_check'] >= state['rank'])
        halved = due & (stalls | no_better)
        state['step_size'] = torch.where(halved, state['step_size'] / 2, state['step_size'])
        state['halved_at_check'] = torch.where(due, halved, state['halved_at_check'])
        state['best_at_check'] = torch.where(due, state['rank'], state['best_at_check'])
        shorter = (state['interval'] - self.shorter_by).clamp_min(self.min_interval)
        state['interval'] = torch.where(due, shorter, state['interval'])
        state['since_check'] = torch.where(due, 0, since)
        state['ascents'] = torch.where(due, 0, state['ascents'])
        state['halved'] = halved

    def _next(
            self,
            state: State,
            point: torch.Tensor,
            gradient: torch.Tensor,
            momentum: torch.Tensor,
            share: torch.Tensor,
    ) -> torch.Tensor:
        ball = Ball.of_rows(state, self.threat)
        size = state['step_size'].view(-1, 1, 1, 1)
        if self.threat.norm == 'linf':
            step = gradient.sign() * size
        else:
            step = gradient / l2_norm(gradient).clamp_min(1e-12) * size
        ahead = ball.project(point + step)
        return ball.project(point + (ahead - point) * share + momentum * (1 - share))


def _apgd(model, x, y, threat, loss, *, steps=100, rho=.75, eot_iter=1, **kwargs) -> torch.Tensor:
    return run_search(APGDSearch(threat, loss, steps, rho, eot_iter), model, x, y, **kwargs).adv


def apgd_ce(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 100,
        rho: float = .75,
        eot_iter: int = 1,
        restarts: int = 1,
        space: Optional[InputSpace] = None,
        batch_size: Optional[int] = None,
        search_model: Optional[Callable] = None,
        progress: Optional[Callable[[int], None]] = None,
        seed: Seed = 0,
) -> torch.Tensor:
    """APGD on the cross-entropy.

    Args:
        model: Maps images to logits.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True labels, class indices (N,) or soft targets (N, K).
        threat: Norm and eps.
        steps: Number of gradient steps.
        rho: Share of ascending steps between two checks below which the step size halves.
        eot_iter: Forward and backward passes averaged for each gradient, for networks with noise inside. With more
            than one no image leaves early, and the iterate of the highest mean loss is returned.
        restarts: Number of runs; each attacks the images that still resist.
        space: Input space of the network if it is not pixels.
        batch_size: Images in the network at once, all by default.
        search_model: Faster network to search with, see `run_search`.
        progress: Told how many images have come to their end since it was last told.
        seed: One seed for all images, or one per image.

    Returns:
        Adversarial images like x, within eps of x and within valid pixels.

    Raises:
        InputError: On bad arguments, and if x is not in [0, 1] although no `space` is given.
    """
    return _apgd(
        model, x, y, threat, 'ce', steps=steps, rho=rho, eot_iter=eot_iter, restarts=restarts, space=space,
        batch_size=batch_size, search_model=search_model, progress=progress, seed=seed)


def apgd_dlr(model: Callable, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel, **kwargs) -> torch.Tensor:
    """APGD on the difference of logits ratio, for 3 classes and more; arguments of `apgd_ce`."""
    return _apgd(model, x, y, threat, 'dlr', **kwargs)


def apgd_t(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        num_targets: Optional[int] = None,
        **kwargs,
) -> torch.Tensor:
    """APGD on the targeted DLR loss, for 4 classes and more, one run for each of the likeliest wrong classes.

    Args:
        model, x, y, threat: See `apgd_ce`.
        num_targets: Number of targets by descending logit; by default 9, or all wrong classes if there are fewer.
        **kwargs: Further arguments of `apgd_ce`.
    """
    return _apgd(model, x, y, threat, 'dlr_targeted', targeted=True, num_targets=num_targets, **kwargs)
