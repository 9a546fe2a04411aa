"""Fast Adaptive Boundary attack: walks along the decision boundary towards the point nearest to the image.

Croce & Hein 2020, `Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack` -
https://arxiv.org/abs/1907.02044, algorithm 1.
"""
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

import torch

from ..errors import check_at_least, check_range
from ..settings import setting
from .base import Attack
from .context import input_gradient, input_gradients
from .losses import precise
from .registry import register_attack
from .state import Batch, State, keep_best
from .threat import ThreatModel

__all__ = ['FAB', 'FABT', 'project_onto_hyperplane']

_NEWTON_STEPS = 40


def project_onto_hyperplane(points: torch.Tensor, w: torch.Tensor, b: torch.Tensor, norm: str) -> torch.Tensor:
    """The shortest move of each point onto its hyperplane that stays within the box [0, 1].

    Solves min |d| subject to <w, p + d> = b and 0 <= p + d <= 1. If the box does not reach the hyperplane, the points
    move to the corner nearest to it. With residual c = b - <w, p> the solution is
    d_i = sign(c w_i) min(s g_i, room_i), g = 1 for Linf and |w| for L2; the length s is the root of a concave
    piecewise linear function, which Newton's method reaches from below. For L1 the pixels with the largest |w| move to
    the end of their range, the last one only as far as needed.

    Args:
        points: Shape (N, D), in [0, 1].
        w: Normals, shape (N, D).
        b: Offsets, shape (N,).
        norm: 'Linf', 'L2' or 'L1'.

    Returns:
        The move d, shape (N, D).
    """
    residual = b - (w * points).sum(1)
    w = w * torch.where(residual < 0, -1., 1.).to(w.dtype)[:, None]
    residual = residual.abs()[:, None]
    room = torch.where(w > 0, 1 - points, points)
    weight = w.abs()
    if norm == 'L1':
        order = weight.argsort(dim=1, descending=True)
        sorted_weight = weight.gather(1, order)
        gains = sorted_weight * room.gather(1, order)
        missing = residual - (gains.cumsum(1) - gains)
        moves = torch.minimum(gains, missing.clamp_min(0)) / sorted_weight.clamp_min(1e-30)
        return w.sign() * torch.zeros_like(w).scatter(1, order, moves)
    pace, slope = (torch.ones_like(residual), weight) if norm == 'Linf' else (weight, weight.square())
    length = residual / slope.sum(1, keepdim=True).clamp_min(1e-30)
    on_cpu = points.device.type == 'cpu'
    for _ in range(_NEWTON_STEPS):
        ahead = length * pace
        reached = (weight * torch.minimum(ahead, room)).sum(1, keepdim=True)
        remaining = (slope * (ahead < room)).sum(1, keepdim=True)
        missing = residual - reached
        step = torch.where(
            remaining > 0, missing / remaining.clamp_min(1e-30), torch.full_like(missing, float('inf')))
        # capped, since the length grows without bound if the box does not reach the hyperplane
        step = torch.where(missing > 1e-6 * residual, step.clamp(0, 1e12), 0.)
        # steps of length 0 change nothing; checking for them would force a GPU sync
        if on_cpu and not step.any():
            break
        length = length + step
    return w.sign() * torch.minimum(length * pace, room)


@dataclass(frozen=True, kw_only=True)
class _Boundary(Attack):
    """Base of FAB and FAB-T.

    Each iteration evaluates the network once, which shows whether the point fools it and linearizes the boundary there.
    If the point fools the network, the walk steps back towards the image and continues along that linearized boundary
    (the reference evaluates the network again after stepping back).
    """
    norms = ('Linf', 'L2', 'L1')
    steerable = True
    needs_float32 = True  # for the distance to the boundary
    steps: int = setting(100, 'number of iterations')
    alpha_max: float = setting(
        .1, 'maximum weight of the step from the clean image; the step from the current point gets the rest')
    eta: float = setting(1.05, 'step length relative to the distance to the boundary')
    beta: float = setting(.9, 'share of the distance to the clean image to keep after a point fools the network')
    restarts: int = setting(1, 'number of runs; all but the first start at a distance of eps / 2')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('steps', self.steps)
        check_at_least('restarts', self.restarts)
        check_range('alpha_max', self.alpha_max, 0., 1.)
        check_range('beta', self.beta, 0., 1.)
        check_range('eta', self.eta, 1.)

    @property
    def run_length(self) -> int:
        return self.steps + 1

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        x = batch.x
        direction = threat.direction(batch.seeds, 0, x[0].numel()).view(x.shape)
        radius = ((batch.restart > 0) * threat.eps / 2).view(-1, 1, 1, 1)
        return batch.state(point=(x + (direction * radius).to(x.dtype)).clamp(0, 1))

    def boundary(
            self,
            model: Callable,
            state: State,
            threat: ThreatModel,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (N, K), gap of the target or nearest class to the true one (N,), and its gradient (N, D)."""
        y = state['y'][:, None]
        if 'target' in state:
            def gap_of_target(logits: torch.Tensor) -> torch.Tensor:
                logits = precise(logits)
                return (logits.gather(1, state['target'][:, None]) - logits.gather(1, y)).squeeze(1)

            w, logits, gap = input_gradient(model, state['point'], gap_of_target)
            return logits, gap, w.flatten(1)
        logits, gaps, gradients = input_gradients(
            model, state['point'], lambda z: precise(z) - precise(z).gather(1, y))
        nearest = torch.full_like(gaps[:, 0], float('inf'))
        gap, w = torch.zeros_like(nearest), torch.zeros_like(state['point']).flatten(1)
        for k, whole in enumerate(gradients):
            gradient, own_gap = whole.flatten(1), gaps[:, k]
            distance = own_gap.abs() / threat.dual_size(whole).clamp_min(1e-12)
            closer = (distance < nearest) & (y[:, 0] != k)
            nearest, gap = torch.where(closer, distance, nearest), torch.where(closer, own_gap, gap)
            w = torch.where(closer[:, None], gradient, w)
        return logits, gap, w

    def step(self, model: Callable, state: State, threat: ThreatModel) -> None:
        logits, gap, w = self.boundary(model, state, threat)
        point, image = state['point'].flatten(1), state['x'].flatten(1)
        fools = logits.argmax(1) != state['y']
        allowed = threat.size(point - image) <= threat.eps
        keep_best(state, state['point'], fools & allowed, state['score'])
        state['done'] = (state['score'] == float('inf')) | (state['step'] >= self.steps)

        b = (w * point).sum(1) - gap
        point = torch.where(fools[:, None], image + self.beta * (point - image), point)
        from_point, from_image = project_onto_hyperplane(
            torch.cat([point, image]), w.repeat(2, 1), b.repeat(2), threat.norm).chunk(2)
        near, far = (threat.size(d).clamp_min(1e-8)[:, None] for d in (from_point, from_image))
        alpha = (near / (near + far)).clamp(0, self.alpha_max)
        moved = (point + self.eta * from_point) * (1 - alpha) + (image + self.eta * from_image) * alpha
        state['point'] = moved.clamp(0, 1).view(state['x'].shape)
        state['step'] = state['step'] + 1


@register_attack
class FAB(_Boundary):
    """FAB towards the nearest class; each step computes the gradient of every logit."""
    name = 'fab'


@register_attack
class FABT(_Boundary):
    """Targeted FAB: one run for each of the likeliest wrong classes, one gradient per step.

    Croce & Hein 2020, https://arxiv.org/abs/2003.01690, section 4.
    """
    name = 'fab-t'
    targeted = True
    num_targets: Optional[int] = setting(None, 'number of target classes, by descending logit (default: 9)')
