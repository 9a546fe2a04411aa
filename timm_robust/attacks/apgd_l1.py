"""APGD for L1: sparse steps, at first within a larger eps.

Croce & Hein 2021, `Mind the box: l1-APGD for sparse adversarial attacks on image classifiers` -
https://arxiv.org/abs/2103.01208, algorithm 1. The number of pixels a step changes follows the sparsity of the best
perturbation so far. As in section 3.2, 30 % of the steps are within 3 eps, 30 % within 2 eps and the rest within eps.
Each part starts at the projected best point of the previous part; that projection counts as a step.
"""
from typing import Set, TypeVar

import torch

from . import noise
from .state import Batch, State
from .threat import project_onto_l1, sparse_signs

__all__ = ['is_within_eps', 'move', 'part_ends', 'start']

_Step = TypeVar('_Step', int, torch.Tensor)
_PARTS = 3
_SHORTER, _SHORTEST = 1.5, 10.  # the step size is divided by _SHORTER, down to the part's eps / _SHORTEST
_SPARSER = .95  # the best perturbation counts as sparser if its number of pixels falls below this share


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _part(step: _Step, steps: int) -> _Step:
    """The part a step belongs to, 0 to 2."""
    length = min(-(-3 * steps // 10), steps // 2)
    return 1 * (step >= length) + (step >= 2 * length)


def part_ends(state: State, steps: int) -> Set[bool]:
    """Whether this step is the last of a part: the answers for all images, or both if the host does not know."""
    return {_part(age + 1, steps) > _part(age, steps) for age in set(state.ages)} or {False, True}


def is_within_eps(step: torch.Tensor, steps: int) -> torch.Tensor:
    """Whether a step is in the last part, the only one within eps itself, shape (N,)."""
    return _part(step, steps) == _PARTS - 1


def _project(point: torch.Tensor, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return (x + project_onto_l1(point - x, -x, 1 - x, eps)).clamp(0, 1)


def _changed(point: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Number of pixels that differ, shape (N,)."""
    return (point - x).sign_().abs_().flatten(1).sum(1)


def start(batch: Batch, eps: float, steps: int) -> State:
    """Gaussian noise projected onto the ball of the first part."""
    x, zero = batch.x, batch.full(0, torch.int64)
    size = (_PARTS - _part(zero, steps)) * batch.full(eps)
    drawn = noise.normal(batch.seeds, 0, x[0].numel()) if len(x) else torch.zeros_like(x)
    point = _project(x + drawn.to(x.dtype).view(x.shape), x, size)
    return batch.state(
        point=point, best_gradient=torch.zeros_like(x), step_size=size, changed=_changed(point, x),
        since_check=zero - 1)


def move(state: State, gradient: torch.Tensor, eps: float, steps: int) -> None:
    """Move from the point just evaluated to the next one, given the gradient there."""
    x, point = state['x'], state['point']
    part, following = _part(state['step'], steps), _part(state['step'] + 1, steps)
    size = (_PARTS - part).to(x.dtype) * eps
    # the sparsity of the best point decides how many pixels the next steps change
    state['since_check'] = state['since_check'] + 1
    length = torch.where(part < _PARTS - 1, -(-3 * steps // 10), steps - 2 * -(-3 * steps // 10))
    due = state['since_check'] == (length / 25).long().clamp_min(1)
    changed = _changed(state['best'], x)
    sparser = due & (changed < _SPARSER * state['changed'])
    shorter = torch.where(due, (state['step_size'] / _SHORTER).clamp_min(size / _SHORTEST), state['step_size'])
    state['step_size'] = torch.where(sparser, size, shorter)
    state['changed'] = torch.where(due, changed, state['changed'])
    state['since_check'] = torch.where(due, 0, state['since_check'])
    point = torch.where(_rows(sparser), state['best'], point)
    gradient = torch.where(_rows(sparser), state['best_gradient'], gradient)

    count = (state['changed'] / _SHORTER).ceil().long().clamp(1, x[0].numel())
    ahead = point + _rows(state['step_size']) * sparse_signs(gradient, count)
    if part_ends(state, steps) == {False}:
        state['point'] = _project(ahead, x, size)
        return
    # at the end of a part, project its best point onto the smaller ball and reset its score
    turns = following > part
    size = (_PARTS - following).to(x.dtype) * eps
    state['point'] = _project(torch.where(_rows(turns), state['best'], ahead), x, size)
    state['best'] = torch.where(_rows(turns), state['point'], state['best'])
    state['score'] = torch.where(turns, float('-inf'), state['score'])
    state['step_size'] = torch.where(turns, size, state['step_size'])
    state['changed'] = torch.where(turns, _changed(state['point'], x), state['changed'])
    state['since_check'] = torch.where(turns, -1, state['since_check'])
