"""TRADES: a clean loss, and a bound on how far predictions move under attack.

Zhang et al. 2019, `Theoretically Principled Trade-off between Robustness and Accuracy` -
https://arxiv.org/abs/1901.08573
"""
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..attacks import crafting
from ..errors import InputError
from .base import RobustTask, top1

__all__ = ['TradesTask', 'kl_divergence']


def kl_divergence(output: torch.Tensor, adv_output: torch.Tensor) -> torch.Tensor:
    """KL(softmax(output) || softmax(adv_output)), mean over the batch, in float32 or better; both sides learn.

    Args:
        output, adv_output: Logits, shape (N, K).
    """
    # from log-probabilities on both sides: a probability of 0 contributes nothing, however large the logits are
    clean, adv = (F.log_softmax(z if z.dtype == torch.float64 else z.float(), dim=1) for z in (output, adv_output))
    return F.kl_div(adv, clean, reduction='batchmean', log_target=True)


class TradesTask(RobustTask):
    r"""L(x) + β KL(p(x) || p(x*)), where x* maximizes the divergence.

    Equation 5 of the paper with the authors' code: x* starts from the image and a little Gaussian noise (where the
    divergence has a gradient), p(x) stands still while it is crafted, and both sides learn from the divergence. L is
    any timm criterion; smoothing and soft targets act on it alone.

    Args:
        model, criterion: See `RobustTask`. The attack gets soft targets, p(x): their cross-entropy is the divergence
            and a constant.
        beta: β, not negative; 6 in the paper.
        **kwargs: Further arguments of `RobustTask`.

    Raises:
        InputError: If `beta` is negative.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            beta: float = 6.,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        if not beta >= 0:
            raise InputError(f"beta={beta} must not be negative; 6 is the paper's")
        self.beta = beta

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Images within eps whose predictions differ most from the clean ones."""
        with crafting(self.bare_model), torch.no_grad():
            clean = self.bare_model(input).float().softmax(dim=1)
        return self.attack_divergence(input, target, clean)

    def attack_divergence(self, input: torch.Tensor, target: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Adversarial images from clean probabilities (N, K)."""
        return self.run_attack(input, clean)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Craft, then compute the loss.

        Args:
            input: Clean images in `space`, shape (N, C, H, W).
            target: Class indices (N,) or soft targets (N, K).

        Returns:
            'loss'; 'output', the clean logits; 'clean_loss', 'adv_loss' (the divergence), 'clean_top1' and 'adv_top1'
            (percent), detached.
        """
        output, adv_output = self.forward_both(input, self.craft(input, target))
        clean_loss, divergence = self.criterion(output, target), kl_divergence(output, adv_output)
        self.step += 1
        return {
            'loss': clean_loss + self.beta * divergence,
            'output': output,
            'clean_loss': clean_loss.detach(),
            'adv_loss': divergence.detach(),
            'clean_top1': top1(output, target),
            'adv_top1': top1(adv_output, target),
        }
