"""Training on clean and adversarial images: SAT, NoFrost and Madry's adversarial training, which share one loss.

Papers:
* `Removing Batch Normalization Boosts Adversarial Training` (NoFrost), eq. 1 - https://arxiv.org/abs/2207.01156
* `Explaining and Harnessing Adversarial Examples` - https://arxiv.org/abs/1412.6572
* `Towards Deep Learning Models Resistant to Adversarial Attacks` - https://arxiv.org/abs/1706.06083
"""
import logging
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn

from ..errors import check_range
from ..settings import setting
from .base import RobustTask
from .objective import Objective, register_objective

__all__ = ['Madry', 'MadryTask', 'NoFrost', 'NoFrostTask', 'SAT', 'SatTask', 'check_weight']

_logger = logging.getLogger(__name__)


def check_weight(weight: float) -> None:
    """Reject a λ outside [0, 1]."""
    check_range('weight', weight, 0, 1, note='0.5 is NoFrost, 1 is Madry')


@register_objective
@dataclass(frozen=True, kw_only=True)
class SAT(Objective):
    """Standard adversarial training: (1 - λ) L(x) + λ L(x*)."""
    name: ClassVar[str] = 'sat'
    prefix: ClassVar[str] = 'adv'

    weight: float = setting(
        .5, 'weight of the adversarial loss, in [0, 1]; 1 skips the clean pass', metavar='LAMBDA')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.weight)

    def task_class(self) -> Type[RobustTask]:
        """`SatTask`."""
        return SatTask


@register_objective
@dataclass(frozen=True, kw_only=True)
class NoFrost(SAT):
    """NoFrost: SAT's loss on a normalizer-free network."""
    name: ClassVar[str] = 'nofrost'

    def task_class(self) -> Type[RobustTask]:
        """`NoFrostTask`."""
        return NoFrostTask


@register_objective
@dataclass(frozen=True, kw_only=True)
class Madry(Objective):
    """Madry's adversarial training: L(x*) alone."""
    name: ClassVar[str] = 'madry'

    def task_class(self) -> Type[RobustTask]:
        """`MadryTask`."""
        return MadryTask


class SatTask(RobustTask):
    r"""(1 - λ) L(x) + λ L(x*) on clean images x and adversarial images x* crafted from them.

    NoFrost's eq. 1 with its λ = 0.5. With λ = 1 the clean pass is skipped. L is any timm criterion; label smoothing and
    soft targets apply to both terms.

    Args:
        model: The timm model.
        criterion: Any timm criterion.
        weight: λ, the weight of the adversarial loss, in [0, 1].
        **kwargs: Further arguments of `RobustTask`.

    Raises:
        InputError: If `weight` is outside [0, 1].
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            weight: float = 0.5,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        check_weight(weight)
        self.weight = weight

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adversarial images for a batch, in the network's input space; the clean images if λ = 0."""
        return self.run_attack(input, target) if self.weight else input

    def _outputs(
            self,
            input: torch.Tensor,
            adv: torch.Tensor,
    ) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        if self.weight == 0:
            return self.trainable_module(input), None
        if self.weight == 1:
            return None, self.trainable_module(adv)
        return self.forward_both(input, adv)

    def loss(self, input: torch.Tensor, adv: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The weighted loss.

        Args:
            input: Clean images in `space`, shape (N, C, H, W).
            adv: Adversarial images, likewise.
            target: Class indices (N,) or soft targets (N, K).

        Returns:
            'loss'; 'output', the clean logits (adversarial logits if λ = 1); 'adv_loss' and 'adv_top1' (percent) unless
            λ = 0, and 'clean_loss' and 'clean_top1' (percent) unless λ = 1, all detached.
        """
        result: Dict[str, torch.Tensor] = {}
        terms = []
        output, adv_output = self._outputs(input, adv)
        if output is not None:
            clean_loss = self.criterion(output, target)
            terms.append((1 - self.weight) * clean_loss)
            result.update(output=output, clean_loss=clean_loss.detach(), clean_top1=self.top1(output, target))
        if adv_output is not None:
            adv_loss = self.criterion(adv_output, target)
            terms.append(self.weight * adv_loss)
            result.setdefault('output', adv_output)
            result.update(adv_loss=adv_loss.detach(), adv_top1=self.top1(adv_output, target))
        return dict(result, loss=sum(terms))


def warn_of_batch_statistics(task: RobustTask) -> None:
    """Warn if a network uses batch statistics, since NoFrost is for normalizer-free networks."""
    if task.mixes_batch:
        _logger.warning(
            f'{type(task.bare_model).__name__} uses batch statistics, but NoFrost is for normalizer-free networks; on '
            'others it is the same as SAT')


class NoFrostTask(SatTask):
    """NoFrost: `SatTask` on a normalizer-free network; warns about any other."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        warn_of_batch_statistics(self)


class MadryTask(SatTask):
    """Madry's adversarial training: L(x*), `SatTask` at λ = 1."""

    def __init__(self, model: nn.Module, criterion: Optional[Callable] = None, **kwargs: Any):
        super().__init__(model, criterion, weight=1., **kwargs)
