"""Auto-PGD: momentum steps with a per-image step size that halves when progress stalls.

Croce & Hein 2020, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks` -
https://arxiv.org/abs/2003.01690, algorithm 1. For L1, steps are sparse, see `apgd_l1`.
"""
from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, Optional, Tuple

import torch

from ..errors import check_at_least, check_choice, check_range
from ..settings import setting
from . import apgd_l1
from .ball import Ball
from .base import Attack
from .context import input_gradient
from .losses import cross_entropy, dlr, dlr_targeted, gap_targeted, logit_gap, probability_margin
from .registry import register_attack
from .state import Batch, State, keep_best
from .threat import ThreatModel

__all__ = ['APGD', 'APGDT']

_PASSES = 100  # estimates an error rate to within 10 points
_MOMENTUM = .75  # share of the new step (alpha in the paper)


@dataclass(frozen=True, kw_only=True)
class _AutoPGD(Attack):
    """Base of APGD and APGD-T."""
    steps: int = setting(100, 'number of gradient steps')
    rho: float = setting(
        .75, 'halve the step size if at most this share of the steps between two checks increased the loss')
    eot_iter: int = setting(
        1, 'forward passes averaged per gradient, for randomized networks; above 1 no image stops early, and the '
        'iterate with the highest mean loss is returned')
    restarts: int = setting(1, 'number of runs; each attacks the images that earlier runs failed on')

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('steps', 'eot_iter', 'restarts'):
            check_at_least(name, getattr(self, name))
        check_range('rho', self.rho, 0., 1.)

    @property
    def queries(self) -> int:
        return self.eot_iter

    @property
    def passes(self) -> int:
        return _PASSES if self.eot_iter > 1 else 1

    @property
    def run_length(self) -> int:
        return self.steps + 1

    def runs_in_turn(self, threat: ThreatModel) -> bool:
        return threat.norm == 'L1'

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        if threat.norm == 'L1':
            return apgd_l1.start(batch, threat.eps, self.steps)
        x, ball = batch.x, Ball(batch.x, threat)
        # a point on the surface of the ball, as in the reference
        direction = threat.direction(batch.seeds, 0, x[0].numel())
        point = ball.project(x + threat.eps * direction.to(x.dtype).view(x.shape))
        lowest, zero = batch.full(float('-inf')), batch.full(0, torch.int64)
        return batch.state(
            **ball.rows(),
            point=point,
            previous=point.clone(),
            best_gradient=torch.zeros_like(x),
            step_size=torch.full_like(lowest, 2 * threat.eps),
            last_loss=lowest,
            ascents=zero.clone(),
            since_check=zero - 1,
            interval=zero + max(int(.22 * self.steps), 1),
            best_at_check=lowest.clone(),
            halved_at_check=zero == 0,
        )

    def loss_of(self, state: State, logits: torch.Tensor) -> torch.Tensor:
        """Loss to maximize: one value per image."""
        raise NotImplementedError

    def _evaluate(
            self,
            model: Callable,
            state: State,
            threat: ThreatModel,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`input_gradient` at the current point; zeros for the gradient if no image moves along it."""
        if not state.ends and not (threat.norm == 'L1' and apgd_l1.part_ends(state, self.steps) == {True}):
            return input_gradient(model, state['point'], partial(self.loss_of, state))
        with torch.no_grad():
            logits = model(state['point'])
            return torch.zeros_like(state['point']), logits, self.loss_of(state, logits)

    def step(self, model: Callable, state: State, threat: ThreatModel) -> None:
        gradient, logits, loss = self._evaluate(model, state, threat)
        fooled = logits.argmax(1) != state['y']
        for _ in range(self.queries - 1):
            more, _, more_loss = self._evaluate(model, state, threat)
            gradient, loss = gradient + more, loss + more_loss
            # under EOT one misclassified pass is not conclusive: keep the iterate with the highest mean loss
            fooled = torch.zeros_like(fooled)
        if threat.norm == 'L1':
            fooled = fooled & apgd_l1.is_within_eps(state['step'], self.steps)
        better = keep_best(state, state['point'], fooled, loss / self.queries)
        state['best_gradient'] = torch.where(better.view(-1, 1, 1, 1), gradient, state['best_gradient'])
        state['done'] = (state['score'] == float('inf')) | (state['step'] >= self.steps)
        if threat.norm == 'L1':
            apgd_l1.move(state, gradient, threat.eps, self.steps)
        else:
            self._move(state, gradient, loss / self.queries, threat)
        state['step'] = state['step'] + 1

    def _move(self, state: State, gradient: torch.Tensor, loss: torch.Tensor, threat: ThreatModel) -> None:
        self._check_step_size(state, loss)
        halved = state.pop('halved').view(-1, 1, 1, 1)
        point = torch.where(halved, state['best'], state['point'])
        gradient = torch.where(halved, state['best_gradient'], gradient)
        momentum = torch.where((state['step'] == 0).view(-1, 1, 1, 1), 0., point - state['previous'])
        share = torch.where(state['step'] == 0, 1., _MOMENTUM).to(point.dtype).view(-1, 1, 1, 1)
        state['previous'] = point
        ball = Ball.of_rows(state, threat)
        ahead = ball.project(point + threat.steepest(gradient) * state['step_size'].view(-1, 1, 1, 1))
        state['point'] = ball.project(point + (ahead - point) * share + momentum * (1 - share))

    def _check_step_size(self, state: State, loss: torch.Tensor) -> None:
        """Halve the step size by conditions 1 and 2 of the paper's section 3.2; sets state['halved']."""
        state['ascents'] = state['ascents'] + ((loss > state['last_loss']) & (state['step'] > 0))
        state['last_loss'] = loss
        since = state['since_check'] + 1
        due = since == state['interval']
        stalls = state['ascents'] <= self.rho * state['interval']
        no_better = ~state['halved_at_check'] & (state['best_at_check'] >= state['score'])
        halved = due & (stalls | no_better)
        state['step_size'] = torch.where(halved, state['step_size'] / 2, state['step_size'])
        state['halved_at_check'] = torch.where(due, halved, state['halved_at_check'])
        state['best_at_check'] = torch.where(due, state['score'], state['best_at_check'])
        shorter = (state['interval'] - max(int(.03 * self.steps), 1)).clamp_min(max(int(.06 * self.steps), 1))
        state['interval'] = torch.where(due, shorter, state['interval'])
        state['since_check'] = torch.where(due, 0, since)
        state['ascents'] = torch.where(due, 0, state['ascents'])
        state['halved'] = halved


_LOSSES: Dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    'ce': cross_entropy, 'dlr': dlr, 'gap': logit_gap, 'pm': probability_margin}
_TARGETED_LOSSES = {'dlr': dlr_targeted, 'gap': gap_targeted}


@register_attack
class APGD(_AutoPGD):
    """APGD with the cross-entropy, the DLR (at least 3 classes), the logit gap or the probability margin.

    The probability margin is the loss of PMA (Xie et al. 2024, `Towards Million-Scale Adversarial Robustness Evaluation
    With Stronger Individual Attacks` - https://arxiv.org/abs/2411.15210), here with APGD's step sizes.
    """
    name = 'apgd'
    variants = {f'apgd-{loss}': {'loss': loss} for loss in ('ce', 'dlr', 'gap', 'pm')}
    loss: str = setting(
        'ce', 'ce (cross-entropy), dlr (difference of logits ratio), gap (logit gap) or pm (probability margin)')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('loss', self.loss, _LOSSES)

    @property
    def classes_needed(self) -> int:
        return 3 if self.loss == 'dlr' else 2

    def loss_of(self, state: State, logits: torch.Tensor) -> torch.Tensor:
        target = state.get('soft', state['y']) if self.loss == 'ce' else state['y']
        return _LOSSES[self.loss](logits, target)


@register_attack
class APGDT(_AutoPGD):
    """Targeted APGD for each of the likeliest wrong classes, on the targeted DLR (at least 4 classes) or z_t - z_y."""
    name = 'apgd-t'
    variants = {'apgd-t-gap': {'loss': 'gap'}}
    targeted = True
    steerable = True
    num_targets: Optional[int] = setting(None, 'number of target classes, by descending logit (default: 9)')
    loss: str = setting('dlr', 'dlr (targeted difference of logits ratio) or gap (z_t - z_y)')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('loss', self.loss, _TARGETED_LOSSES)

    @property
    def classes_needed(self) -> int:
        return 4 if self.loss == 'dlr' else 2

    def loss_of(self, state: State, logits: torch.Tensor) -> torch.Tensor:
        return _TARGETED_LOSSES[self.loss](logits, state['y'], state['target'])
