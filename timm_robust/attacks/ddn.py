"""Decoupled direction and norm: gradient steps on a sphere that shrinks if the point fools the network, else grows.

Rony et al. 2019, `Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and Defenses` -
https://arxiv.org/abs/1811.09600, algorithm 1. Unlike in the paper, images are not rounded to 256 levels.
"""
import torch

from ..errors import check_range
from ..settings import setting
from .losses import cross_entropy
from .minimum_norm import MinimumNorm, Seen
from .registry import register_attack
from .state import Batch, State
from .threat import ThreatModel, l2_norm

__all__ = ['DDN']


@register_attack
class DDN(MinimumNorm):
    """DDN on the cross-entropy; deterministic."""
    name = 'ddn'
    norms = ('L2',)
    gamma: float = setting(.05, 'relative change of the radius per step')
    first_norm: float = setting(1., 'initial radius in pixel units')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range('gamma', self.gamma, 0., 1., open_low=True)
        check_range('first_norm', self.first_norm, 0., open_low=True)

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        state = super().start(batch, threat)
        state['radius'] = batch.full(self.first_norm)
        return state

    def loss_of(self, state: State, logits: torch.Tensor) -> torch.Tensor:
        if 'target' in state:
            return -cross_entropy(logits, state['target'])
        return cross_entropy(logits, state.get('soft', state['y']))

    def move(self, state: State, threat: ThreatModel, seen: Seen) -> torch.Tensor:
        delta, radius = state['point'] - state['x'] + seen.ascent, state['radius']
        radius = radius + self.gamma * torch.where(seen.fools, -radius, radius)
        radius = state['radius'] = torch.minimum(radius, state['farthest'])
        return delta * (radius.view(-1, 1, 1, 1) / l2_norm(delta).clamp_min(1e-12))
