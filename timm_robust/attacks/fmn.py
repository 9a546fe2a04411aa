"""Fast minimum-norm attack: gradient steps in a ball that shrinks if the point fools the network, else grows.

Pintor et al. 2021, `Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints` -
https://arxiv.org/abs/2102.12827, algorithm 1.
"""
import torch

from ..errors import check_range
from ..settings import setting
from .losses import gap_targeted, logit_gap
from .minimum_norm import MinimumNorm, Seen
from .registry import register_attack
from .state import Batch, State
from .threat import ThreatModel, l2_norm

__all__ = ['FMN']

_SMALLEST = .02  # gamma in the last step, relative to its initial value


@register_attack
class FMN(MinimumNorm):
    """FMN on the logit gap; deterministic."""
    name = 'fmn'
    norms = ('Linf', 'L2')
    alpha: float = setting(1., 'initial step size, as an L2 norm in pixel units; decays to a hundredth')
    gamma: float = setting(.05, 'initial relative change of the radius; decays to a fiftieth')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range('alpha', self.alpha, 0., open_low=True)
        check_range('gamma', self.gamma, 0., 1., open_low=True)

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        state = super().start(batch, threat)
        state.update(radius=batch.full(float('inf')), nearest=state['farthest'].clone(),
                     found=torch.zeros_like(state['done']))
        return state

    def loss_of(self, state: State, logits: torch.Tensor) -> torch.Tensor:
        if 'target' in state:
            return gap_targeted(logits, state['y'], state['target'])
        return logit_gap(logits, state['y'])

    def move(self, state: State, threat: ThreatModel, seen: Seen) -> torch.Tensor:
        delta, fools, radius = state['point'] - state['x'], seen.fools, state['radius']
        distance = threat.size(delta)
        state['found'] = state['found'] | fools
        state['nearest'] = torch.where(fools, torch.minimum(distance, state['nearest']), state['nearest'])
        gamma = self.gamma * (_SMALLEST + (1 - _SMALLEST) * seen.cosine.flatten())
        # Until a point fools the network, the radius reaches slightly beyond the linearized boundary. The paper stops
        # right at it, so that no point would ever cross the boundary of a linear network.
        slope = threat.dual_size(seen.gradient).clamp_min(1e-12)
        ahead = (distance + seen.loss.abs() / slope) * (1 + _SMALLEST * self.gamma)
        radius = torch.where(
            fools, torch.minimum(radius * (1 - gamma), state['nearest']),
            torch.where(state['found'], radius * (1 + gamma), ahead))
        radius = state['radius'] = torch.minimum(radius, state['farthest'])
        delta, bound = delta + self.alpha * seen.ascent, radius.view(-1, 1, 1, 1)
        if threat.box:
            return torch.clamp(delta, -bound, bound)
        # scaled onto the sphere, as in adv-lib: projection onto the ball, as in the paper, gave larger perturbations
        return delta * (bound / l2_norm(delta).clamp_min(1e-12))
