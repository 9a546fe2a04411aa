"""TRADES: the clean loss, plus a penalty on how far predictions move under attack.

Zhang et al. 2019, `Theoretically Principled Trade-off between Robustness and Accuracy` -
https://arxiv.org/abs/1901.08573
"""
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Optional, Type

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..attacks import attack_mode
from ..errors import InputError, check_range
from ..settings import setting
from .attack import TrainingAttack
from .base import RobustTask, crafting_model
from .objective import Objective, register_objective

__all__ = ['TRADES', 'TradesTask', 'kl_divergence']

_START_STD = 1e-3  # from the authors' code


@register_objective
@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """TRADES: L(x) + β KL(p(x) || p(x*))."""
    name: ClassVar[str] = 'trades'

    beta: float = setting(6., 'weight of the divergence', metavar='BETA')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range('beta', self.beta, 0, note='the paper uses 6')

    def task_class(self) -> Type[RobustTask]:
        """`TradesTask`."""
        return TradesTask


def kl_divergence(output: torch.Tensor, adv_output: torch.Tensor) -> torch.Tensor:
    """KL(softmax(output) || softmax(adv_output)), mean over the batch, in float32 or better; differentiable in both.

    Args:
        output, adv_output: Logits, shape (N, K).
    """
    # with log-probabilities on both sides, a probability of 0 contributes nothing, however large the logits are
    clean, adv = (F.log_softmax(z if z.dtype == torch.float64 else z.float(), dim=1) for z in (output, adv_output))
    return F.kl_div(adv, clean, reduction='batchmean', log_target=True)


class TradesTask(RobustTask):
    r"""L(x) + β KL(p(x) || p(x*)), where x* maximizes the divergence.

    Equation 5 of the paper, with the details of the authors' code: x* starts from x plus slight Gaussian noise (at x
    itself the gradient is zero), p(x) is constant while x* is crafted, and in training the gradient of the divergence
    flows through both p(x) and p(x*). L is any timm criterion; label smoothing and soft targets apply to L only.

    Args:
        model: The timm model.
        criterion: Any timm criterion.
        beta: β, not negative.
        **kwargs: Further arguments of `RobustTask`. The attack is PGD; with `random_start=True` it starts from a
            random point of the ball instead.

    Raises:
        InputError: If `beta` is negative, or the attack is not PGD in eval mode.
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
        self.beta = TRADES(beta=beta).beta

    @classmethod
    def check_attack(cls, attack: TrainingAttack) -> None:
        """Require PGD in eval mode, not started at the clean image."""
        check_is_pgd(cls, attack)
        if attack.random_start is False:
            raise InputError('the divergence of TRADES has a zero gradient at the clean image', 'leave it out',
                             argument='attack.random_start', value=False)

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Images within eps whose predictions differ most from those on the clean images."""
        model = crafting_model(self)
        with attack_mode(model), torch.no_grad():
            clean = model(input).float().softmax(dim=1)
        return self.attack_divergence(input, target, clean, None if self.attack.random_start else _START_STD)

    def attack_divergence(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            clean: torch.Tensor,
            start_std: Optional[float],
    ) -> torch.Tensor:
        """Maximize the cross-entropy with clean probabilities (N, K), which is the divergence plus a constant."""
        return self.run_attack(input, clean, start_std=start_std)

    def loss(self, input: torch.Tensor, adv: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The clean loss and the divergence.

        Args:
            input: Clean images in `space`, shape (N, C, H, W).
            adv: Adversarial images, likewise.
            target: Class indices (N,) or soft targets (N, K).

        Returns:
            'loss'; 'output', the clean logits; 'clean_loss', 'adv_loss' (the divergence), 'clean_top1' and 'adv_top1'
            (percent), detached.
        """
        output, adv_output = self.forward_both(input, adv)
        clean_loss, divergence = self.criterion(output, target), kl_divergence(output, adv_output)
        return {
            'loss': clean_loss + self.beta * divergence,
            'output': output,
            'clean_loss': clean_loss.detach(),
            'adv_loss': divergence.detach(),
            'clean_top1': self.top1(output, target),
            'adv_top1': self.top1(adv_output, target),
        }


def check_is_pgd(task: type, attack: TrainingAttack) -> None:
    """Reject an attack that is not PGD in eval mode."""
    if attack.attack != 'pgd':
        raise InputError(
            f'{task.__name__} crafts with PGD', 'leave it out', argument='attack.attack', value=attack.attack)
    if attack.bn_mode != 'eval':
        raise InputError(f'{task.__name__} crafts in eval mode', 'leave it out', argument='attack.bn_mode',
                         value=attack.bn_mode)
