"""Fast Adaptive Boundary attack: walks along the decision boundary to its point nearest the image.

Croce & Hein 2020, `Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack` -
https://arxiv.org/abs/1907.02044, algorithm 1.
"""
from typing import Callable, Optional, Tuple

import torch

from ..errors import InputError
from .context import input_gradient
from .losses import hard_labels
from .noise import normal, uniform
from .search import Jobs, Search, State, keep_best, run_search
from .threat import ThreatModel

__all__ = ['FABSearch', 'fab', 'fab_t', 'project_onto_hyperplane']

_NEWTON_STEPS = 40


def project_onto_hyperplane(points: torch.Tensor, w: torch.Tensor, b: torch.Tensor, norm: str) -> torch.Tensor:
    """Shortest move of points onto a hyperplane within the box [0, 1].

    Solves min |d| subject to <w, p + d> = b and 0 <= p + d <= 1. Where the box does not reach the hyperplane, the
    corner nearest to it is approached. With residual c = b - <w, p> the solution is
    d_i = sign(c w_i) min(s g_i, room_i), g = 1 for Linf and |w| for L2; the length s is the root of a concave
    piecewise linear function, which Newton's method reaches from below.

    Args:
        points: Shape (N, D), in [0, 1].
        w: Normals, shape (N, D).
        b: Offsets, shape (N,).
        norm: 'linf' or 'l2'.

    Returns:
        The move d, shape (N, D).
    """
    residual = b - (w * points).sum(1)
    w = w * torch.where(residual < 0, -1., 1.).to(w.dtype)[:, None]
    residual = residual.abs()[:, None]
    room = torch.where(w > 0, 1 - points, points)
    weight = w.abs()
    pace = torch.ones_like(w) if norm == 'linf' else weight
    slope = weight * pace
    length = residual / slope.sum(1, keepdim=True).clamp_min(1e-30)
    for _ in range(_NEWTON_STEPS):
        ahead = length * pace
        reached = (weight * torch.minimum(ahead, room)).sum(1, keepdim=True)
        remaining = (slope * (ahead < room)).sum(1, keepdim=True)
        missing = residual - reached
        step = torch.where(
            remaining > 0, missing / remaining.clamp_min(1e-30), torch.full_like(missing, float('inf')))
        # a box that does not reach the hyperplane lets the length grow for ever: every move is at its end by then
        step = torch.where(missing > 1e-6 * residual, step.clamp(0, 1e12), 0.)
        if not step.any():
            break
        length = length + step
    return w.sign() * torch.minimum(length * pace, room)


def _size(delta: torch.Tensor, norm: str) -> torch.Tensor:
    return delta.abs().amax(1) if norm == 'linf' else delta.norm(dim=1)


class FABSearch(Search):
    """FAB on a pool of images; arguments of `fab`.

    One evaluation an iteration: whether a point fools, and the boundary there, come from the same forward pass. Where a
    point fools, the walk goes back towards the image and on along the boundary as seen from that point (the reference
    evaluates the network again to see it from the point it went back to).
    """
    needs_float32 = True  # for the distance to the boundary

    def __init__(
            self,
            threat: ThreatModel,
            steps: int = 100,
            alpha_max: float = .1,
            eta: float = 1.05,
            beta: float = .9,
    ):
        if steps < 1:
            raise InputError(f'steps={steps} must be at least 1')
        self.threat = threat
        self.steps = steps
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta

    def start(self, jobs: Jobs) -> State:
        x, size = jobs.x, jobs.x[0].numel()
        if self.threat.norm == 'linf':
            direction = uniform(jobs.seeds, 0, size) * 2 - 1
        else:
            direction = normal(jobs.seeds, 0, size)
        direction = (direction / _size(direction, self.threat.norm)[:, None].clamp_min(1e-12)).view(x.shape)
        # the first run starts at the image, the others half an eps away
        radius = ((jobs.restart > 0) * self.threat.eps / 2).view(-1, 1, 1, 1)
        return jobs.state(y=hard_labels(jobs.y), point=(x + (direction * radius).to(x.dtype)).clamp(0, 1))

    def _boundary(self, model: Callable, state: State) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (N, K), lead of a wrong class over the true one (N,) and its gradient (N, D)."""
        y = state['y'][:, None]
        if 'target' in state:
            def lead(logits: torch.Tensor) -> torch.Tensor:
                return (logits.gather(1, state['target'][:, None]) - logits.gather(1, y)).squeeze(1)

            gradient, logits, gap = input_gradient(model, state['point'], lead)
            return logits, gap, gradient.flatten(1)
        with torch.enable_grad():
            point = state['point'].detach().requires_grad_(True)
            logits = model(point)
            leads = logits - logits.gather(1, y)
        # one class after the other: the gradients of all would not fit in memory
        nearest = torch.full_like(leads[:, 0], float('inf'))
        gap, w = torch.zeros_like(nearest), torch.zeros_like(point).flatten(1)
        for k in range(leads.shape[1]):
            gradient, = torch.autograd.grad(leads[:, k].sum(), point, retain_graph=k + 1 < leads.shape[1])
            gradient, lead = gradient.flatten(1), leads[:, k].detach()
            dual = gradient.abs().sum(1) if self.threat.norm == 'linf' else gradient.norm(dim=1)
            distance = lead.abs() / dual.clamp_min(1e-12)
            closer = (distance < nearest) & (y[:, 0] != k)
            nearest, gap = torch.where(closer, distance, nearest), torch.where(closer, lead, gap)
            w = torch.where(closer[:, None], gradient, w)
        return logits.detach(), gap.detach(), w.detach()

    def step(self, model: Callable, state: State) -> None:
        norm, eps = self.threat.norm, self.threat.eps
        logits, gap, w = self._boundary(model, state)
        point, image = state['point'].flatten(1), state['x'].flatten(1)
        fools = logits.argmax(1) != state['y']
        allowed = _size(point - image, norm) <= eps
        keep_best(state, state['point'], fools & allowed, state['rank'])
        state['done'] = (state['rank'] == float('inf')) | (state['step'] >= self.steps)

        b = (w * point).sum(1) - gap
        point = torch.where(fools[:, None], image + self.beta * (point - image), point)
        from_point, from_image = project_onto_hyperplane(
            torch.cat([point, image]), w.repeat(2, 1), b.repeat(2), norm).chunk(2)
        near, far = (_size(d, norm).clamp_min(1e-8)[:, None] for d in (from_point, from_image))
        alpha = (near / (near + far)).clamp(0, self.alpha_max)
        moved = (point + self.eta * from_point) * (1 - alpha) + (image + self.eta * from_image) * alpha
        state['point'] = moved.clamp(0, 1).view(state['x'].shape)
        state['step'] = state['step'] + 1


def fab(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 100,
        alpha_max: float = .1,
        eta: float = 1.05,
        beta: float = .9,
        **kwargs,
) -> torch.Tensor:
    """FAB towards the nearest class: the gradient of every logit in each step.

    Args:
        model, x, y: See `apgd_ce`.
        threat: Norm and eps; an image is fooled once the distance is at most eps.
        steps: Number of iterations.
        alpha_max: Largest share of the step that goes from the clean image instead of the current point.
        eta: Extrapolation beyond the boundary.
        beta: Share of the way from the image that is left after a point fools.
        **kwargs: `restarts`, `space`, `batch_size`, `search_model`, `progress` and `seed` of `apgd_ce`.

    Returns:
        Images like x: the nearest that fools within eps of x, x itself where there is none.

    Raises:
        InputError: See `apgd_ce`.
    """
    return run_search(FABSearch(threat, steps, alpha_max, eta, beta), model, x, y, **kwargs).adv


def fab_t(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        num_targets: Optional[int] = None,
        steps: int = 100,
        alpha_max: float = .1,
        eta: float = 1.05,
        beta: float = .9,
        **kwargs,
) -> torch.Tensor:
    """FAB-T: one run towards each of the likeliest wrong classes, one gradient a step; arguments of `fab`.

    Croce & Hein 2020, https://arxiv.org/abs/2003.01690, section 4.

    Args:
        model, x, y, threat, steps, alpha_max, eta, beta, **kwargs: See `fab`.
        num_targets: Number of targets by descending logit; by default 9, or all wrong classes if there are fewer.
    """
    attack = FABSearch(threat, steps, alpha_max, eta, beta)
    return run_search(attack, model, x, y, targeted=True, num_targets=num_targets, **kwargs).adv
