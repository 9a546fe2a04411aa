"""Carlini & Wagner's L2 attack: finds a minimal perturbation with Adam in tanh space.

Carlini & Wagner 2017, `Towards Evaluating the Robustness of Neural Networks` - https://arxiv.org/abs/1608.04644,
section VI.
"""
from typing import Callable

import torch
import torch.nn.functional as F

from ..errors import check_at_least, check_range
from ..settings import setting
from .base import Attack
from .context import input_gradient
from .losses import logit_gap
from .registry import register_attack
from .state import Batch, State, keep_best
from .threat import ThreatModel, l2_norm

__all__ = ['CWL2']

_BETA_1, _BETA_2, _ADAM_EPS = .9, .999, 1e-8
_TANH_EDGE = 1 - 1e-6  # keeps pixels of exactly 0 and 1 finite in tanh space
_HIGHEST_CONST = 1e10


@register_attack
class CWL2(Attack):
    """Carlini & Wagner's L2 attack; deterministic.

    The defaults are the paper's and take hours; the RobustNorm paper used 10 steps and 3 rounds. An image is done once
    it fools the network within eps. To attack without a bound, pass `threat.unbounded(shape)`.
    """
    name = 'cw-l2'
    norms = ('L2',)
    steps: int = setting(10000, 'Adam steps in each round')
    learning_rate: float = setting(.01, 'learning rate of Adam, in tanh space')
    binary_search_steps: int = setting(9, 'rounds of the binary search for the weight of the misclassification loss')
    initial_const: float = setting(1e-3, 'initial weight of the misclassification loss')
    confidence: float = setting(0., 'logit margin of the wrong class to aim for')
    abort_early: bool = setting(True, 'end a round once the loss has not fallen for a tenth of its steps')

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('steps', 'binary_search_steps'):
            check_at_least(name, getattr(self, name))
        for name in ('learning_rate', 'initial_const'):
            check_range(name, getattr(self, name), 0., open_low=True)

    @property
    def run_length(self) -> int:
        return self.steps * self.binary_search_steps

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        zero = batch.full(0, torch.int64)
        origin = torch.atanh((2 * batch.x - 1) * _TANH_EDGE)
        return batch.state(
            origin=origin,
            w=origin.clone(),
            first_moment=torch.zeros_like(origin),
            second_moment=torch.zeros_like(origin),
            const=batch.full(self.initial_const),
            low=batch.full(0.),
            high=batch.full(_HIGHEST_CONST),
            round=zero,
            round_fooled=zero > 0,
            loss_at_check=batch.full(float('inf')),
        )

    def step(self, model: Callable, state: State, threat: ThreatModel) -> None:
        tanh = state['w'].tanh()
        point = (tanh + 1) / 2

        def hinge(logits: torch.Tensor) -> torch.Tensor:
            loss = F.relu(self.confidence - logit_gap(logits, state['y']))
            return loss if logits.dtype == torch.float16 else state['const'] * loss

        gradient, logits, penalty = input_gradient(model, point, hinge)
        if logits.dtype == torch.float16:
            # multiplied after the backward pass, where a large weight would overflow
            gradient, penalty = gradient * state['const'].view(-1, 1, 1, 1), penalty * state['const']
        delta = point - state['x']
        distance = l2_norm(delta).flatten()
        fools = logit_gap(logits, state['y']) > max(self.confidence, 0)
        state['round_fooled'] = state['round_fooled'] | fools
        keep_best(state, point, fools & (distance <= threat.eps), state['score'])

        step = state['step'] + 1
        gradient = (gradient + 2 * delta) * (1 - tanh.square()) / 2
        self._adam(state, gradient, step)
        loss = penalty + distance.square()
        patience = max(self.steps // 10, 1) if self.abort_early else self.steps + 1
        check = step % patience == 0
        stuck = check & (loss > state['loss_at_check'] * .9999)
        state['loss_at_check'] = torch.where(check, loss, state['loss_at_check'])
        state['step'] = step
        self._next_round(state, (step >= self.steps) | stuck)
        state['done'] = (state['score'] == float('inf')) | (state['round'] >= self.binary_search_steps)

    def _adam(self, state: State, gradient: torch.Tensor, step: torch.Tensor) -> None:
        power = step.to(gradient.dtype).view(-1, 1, 1, 1)
        first = _BETA_1 * state['first_moment'] + (1 - _BETA_1) * gradient
        second = _BETA_2 * state['second_moment'] + (1 - _BETA_2) * gradient.square()
        state['first_moment'], state['second_moment'] = first, second
        scale = (second / (1 - _BETA_2 ** power)).sqrt() + _ADAM_EPS
        state['w'] = state['w'] - self.learning_rate * first / (1 - _BETA_1 ** power) / scale

    @staticmethod
    def _next_round(state: State, over: torch.Tensor) -> None:
        """Choose the next weight: bisect once a round has succeeded, multiply by ten until then."""
        const, fooled = state['const'], state['round_fooled']
        high = torch.where(over & fooled, torch.minimum(state['high'], const), state['high'])
        low = torch.where(over & ~fooled, torch.maximum(state['low'], const), state['low'])
        following = torch.where(high < _HIGHEST_CONST, (low + high) / 2, const * 10)
        image = over.view(-1, 1, 1, 1)
        state.update(
            high=high,
            low=low,
            const=torch.where(over, following, const),
            round=state['round'] + over,
            round_fooled=fooled & ~over,
            step=torch.where(over, 0, state['step']),
            loss_at_check=torch.where(over, float('inf'), state['loss_at_check']),
            w=torch.where(image, state['origin'], state['w']),
            first_moment=torch.where(image, 0., state['first_moment']),
            second_moment=torch.where(image, 0., state['second_moment']),
        )
