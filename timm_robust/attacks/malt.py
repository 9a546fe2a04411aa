"""MALT: targeted APGD towards the classes with the nearest linearized decision boundaries.

Melamed et al. 2024, `MALT Powers Up Adversarial Attacks` - https://arxiv.org/abs/2407.02240, algorithm 1.
"""
from typing import Callable, Optional

import torch

from ..settings import setting
from .apgd import APGDT
from .checks import logits_of, wrong_classes
from .context import input_gradients
from .losses import precise
from .registry import register_attack
from .threat import ThreatModel

__all__ = ['MALT']

_CANDIDATES = 100  # likeliest wrong classes to take gradients for, as in the paper


@register_attack
class MALT(APGDT):
    """APGD-T towards the wrong classes c with the smallest (z_y - z_c) / |grad (z_y - z_c)|, in the dual norm."""
    name = 'malt'
    variants = {'malt-gap': {'loss': 'gap'}}
    num_targets: Optional[int] = setting(None, 'number of target classes, by distance (default: 9)')

    def choose_targets(
            self,
            model: Callable,
            x: torch.Tensor,
            y: torch.Tensor,
            threat: ThreatModel,
            batch_size: Optional[int],
    ) -> torch.Tensor:
        logits = logits_of(model, x, batch_size)
        count = wrong_classes(logits, y, self.num_targets).shape[1]
        candidates = wrong_classes(logits, y, min(max(_CANDIDATES, count), logits.shape[1] - 1))
        distances = []
        for images, goals in zip(x.split(batch_size or len(x)), torch.cat([y[:, None], candidates], 1).split(
                batch_size or len(x))):
            def gaps(z: torch.Tensor, goals: torch.Tensor = goals) -> torch.Tensor:
                z = precise(z).gather(1, goals)
                return z[:, :1] - z[:, 1:]

            _, gap, gradients = input_gradients(model, images, gaps)
            slopes = torch.stack([threat.dual_size(gradient) for gradient in gradients], 1)
            distances.append(gap / slopes.clamp_min(1e-12))
        return candidates.gather(1, torch.cat(distances).topk(count, dim=1, largest=False).indices)
