"""Training on clean and adversarial images: SAT, NoFrost and Madry's adversarial training.

Papers:
* `Removing Batch Normalization Boosts Adversarial Training` (NoFrost), eq. 1 - https://arxiv.org/abs/2207.01156
* `Explaining and Harnessing Adversarial Examples` - https://arxiv.org/abs/1412.6572
* `Towards Deep Learning Models Resistant to Adversarial Attacks` - https://arxiv.org/abs/1706.06083
"""
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn

from ..errors import InputError
from .base import RobustTask, top1

__all__ = ['AdversarialTask']


class AdversarialTask(RobustTask):
    r"""(1 - λ) L(x) + λ L(x*) on clean images x and adversarial images x* crafted from them.

    NoFrost's eq. 1 with its λ = 0.5: called NoFrost on a normalizer-free network and SAT on one with BatchNorm. With
    λ = 1, Madry's adversarial training, the clean pass is left out. L is any timm criterion; smoothing and soft
    targets act on both terms.

    Args:
        model, criterion: See `RobustTask`.
        adv_weight: λ, the weight of the adversarial loss, in [0, 1].
        **kwargs: Further arguments of `RobustTask`.

    Raises:
        InputError: If `adv_weight` is outside [0, 1].
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            adv_weight: float = 0.5,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        if not 0 <= adv_weight <= 1:
            raise InputError(f'adv_weight={adv_weight} must be in [0, 1]; 0.5 is NoFrost, 1 is Madry')
        self.adv_weight = adv_weight

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adversarial images for a batch, in the network's input space."""
        return self.run_attack(input, target)

    def _outputs(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
    ) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        if self.adv_weight == 0:
            return self.trainable_module(input), None
        adv = self.craft(input, target)
        if self.adv_weight == 1:
            return None, self.trainable_module(adv)
        return self.forward_both(input, adv)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Craft, then compute the weighted loss.

        Args:
            input: Clean images in `space`, shape (N, C, H, W).
            target: Class indices (N,) or soft targets (N, K).

        Returns:
            'loss'; 'output', the clean logits (adversarial ones if λ = 1); 'adv_loss' and 'adv_top1' (percent) unless
            λ = 0, 'clean_loss' and 'clean_top1' unless λ = 1, detached.
        """
        result = {}
        terms = []
        output, adv_output = self._outputs(input, target)
        if output is not None:
            clean_loss = self.criterion(output, target)
            terms.append((1 - self.adv_weight) * clean_loss)
            result.update(output=output, clean_loss=clean_loss.detach(), clean_top1=top1(output, target))
        if adv_output is not None:
            adv_loss = self.criterion(adv_output, target)
            terms.append(self.adv_weight * adv_loss)
            result.setdefault('output', adv_output)
            result.update(adv_loss=adv_loss.detach(), adv_top1=top1(adv_output, target))
        self.step += 1
        return dict(result, loss=sum(terms))
