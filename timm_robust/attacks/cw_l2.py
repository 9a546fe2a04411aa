"""Carlini & Wagner's L2 attack: the smallest perturbation that fools, by Adam in tanh space.

Carlini & Wagner 2017, `Towards Evaluating the Robustness of Neural Networks` - https://arxiv.org/abs/1608.04644,
section VI.
"""
from typing import Callable

import torch
import torch.nn.functional as F

from ..errors import InputError
from .context import input_gradient
from .losses import hard_labels, logit_gap
from .search import Jobs, Search, State, keep_best, run_search
from .threat import ThreatModel, l2_norm

__all__ = ['CWL2Search', 'cw_l2']

_BETA_1, _BETA_2, _ADAM_EPS = .9, .999, 1e-8
_TANH_EDGE = 1 - 1e-6  # keeps pixels of exactly 0 and 1 at a finite place in tanh space
_HIGHEST_CONST = 1e10


class CWL2Search(Search):
    """C&W's L2 attack on a pool of images; arguments of `cw_l2`."""

    def __init__(
            self,
            threat: ThreatModel,
            steps: int,
            step_size: float,
            binary_search_steps: int,
            initial_const: float,
            confidence: float,
            abort_early: bool,
    ):
        if threat.norm != 'l2':
            raise InputError(f"norm={threat.norm!r}: cw_l2 is an L2 attack, use norm='l2' (cw_linf is its Linf form)")
        for name, value in (('steps', steps), ('binary_search_steps', binary_search_steps)):
            if value < 1:
                raise InputError(f'{name}={value} must be at least 1')
        for name, value in (('step_size', step_size), ('initial_const', initial_const)):
            if not value > 0:
                raise InputError(f'{name}={value} must be positive')
        self.threat = threat
        self.steps = steps
        self.step_size = step_size
        self.rounds = binary_search_steps
        self.initial_const = initial_const
        self.confidence = confidence
        self.patience = max(steps // 10, 1) if abort_early else steps + 1

    def start(self, jobs: Jobs) -> State:
        one = torch.ones(len(jobs.x), dtype=jobs.x.dtype, device=jobs.x.device)
        zero = torch.zeros(len(jobs.x), dtype=torch.int64, device=jobs.x.device)
        origin = torch.atanh((2 * jobs.x - 1) * _TANH_EDGE)
        return jobs.state(
            y=hard_labels(jobs.y),
            origin=origin,
            w=origin.clone(),
            first_moment=torch.zeros_like(origin),
            second_moment=torch.zeros_like(origin),
            const=one * self.initial_const,
            low=one * 0,
            high=one * _HIGHEST_CONST,
            round=zero,
            round_fooled=zero > 0,
            loss_at_check=one * float('inf'),
        )

    def step(self, model: Callable, state: State) -> None:
        tanh = state['w'].tanh()
        point = (tanh + 1) / 2

        def hinge(logits: torch.Tensor) -> torch.Tensor:
            return state['const'] * F.relu(self.confidence - logit_gap(logits, state['y']))

        gradient, logits, penalty = input_gradient(model, point, hinge)
        delta = point - state['x']
        distance = l2_norm(delta).flatten()
        fools = logit_gap(logits, state['y']) > max(self.confidence, 0)
        state['round_fooled'] = state['round_fooled'] | fools
        keep_best(state, point, fools & (distance <= self.threat.eps), state['rank'])

        step = state['step'] + 1
        gradient = (gradient + 2 * delta) * (1 - tanh.square()) / 2
        self._adam(state, gradient, step)
        loss = penalty + distance.square()
        check = step % self.patience == 0
        stuck = check & (loss > state['loss_at_check'] * .9999)
        state['loss_at_check'] = torch.where(check, loss, state['loss_at_check'])
        state['step'] = step
        self._next_round(state, (step >= self.steps) | stuck)
        state['done'] = (state['rank'] == float('inf')) | (state['round'] >= self.rounds)

    def _adam(self, state: State, gradient: torch.Tensor, step: torch.Tensor) -> None:
        power = step.to(gradient.dtype).view(-1, 1, 1, 1)
        first = _BETA_1 * state['first_moment'] + (1 - _BETA_1) * gradient
        second = _BETA_2 * state['second_moment'] + (1 - _BETA_2) * gradient.square()
        state['first_moment'], state['second_moment'] = first, second
        scale = (second / (1 - _BETA_2 ** power)).sqrt() + _ADAM_EPS
        state['w'] = state['w'] - self.step_size * first / (1 - _BETA_1 ** power) / scale

    @staticmethod
    def _next_round(state: State, over: torch.Tensor) -> None:
        """The next weight: halfway to the last that failed, or ten times as much while none has fooled."""
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


def cw_l2(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 10000,
        step_size: float = .01,
        binary_search_steps: int = 9,
        initial_const: float = 1e-3,
        confidence: float = 0.,
        abort_early: bool = True,
        **kwargs,
) -> torch.Tensor:
    """Carlini & Wagner's L2 attack.

    The defaults are the publication's, which take hours; the RobustNorm paper used 10 steps and 3 rounds.

    Args:
        model: Maps images to logits.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True class indices, shape (N,).
        threat: L2 and eps; an image is fooled, and leaves, once the distance is at most eps. For the attack without a
            bound choose an eps no perturbation reaches (the square root of C·H·W).
        steps: Adam steps in each round.
        step_size: Learning rate of Adam, in tanh space.
        binary_search_steps: Rounds of the search for the weight of the misclassification loss.
        initial_const: First weight.
        confidence: Lead of a wrong class, in logits, to aim for.
        abort_early: End a round once the loss has not fallen for a tenth of its steps.
        **kwargs: `space`, `batch_size`, `search_model` and `progress` of `apgd_ce`; a `seed` is without effect.

    Returns:
        Images like x: one that fools within eps of x, x itself where none was found.

    Raises:
        InputError: On bad arguments, a norm other than L2, and if x is not in [0, 1] although no `space` is given.
    """
    attack = CWL2Search(threat, steps, step_size, binary_search_steps, initial_const, confidence, abort_early)
    return run_search(attack, model, x, y, **kwargs).adv
