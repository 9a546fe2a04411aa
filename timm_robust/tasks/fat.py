"""Friendly adversarial training (FAT), alone and in TRADES.

Zhang et al. 2020, `Attacks Which Do Not Kill Training Make Adversarial Learning Stronger` -
https://arxiv.org/abs/2002.11242
"""
import logging
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Optional, Sequence, Tuple, Type

import torch

from ..errors import InputError
from ..settings import setting
from .adversarial import SatTask, check_weight
from .attack import TrainingAttack
from .base import RobustTask
from .objective import Objective, register_objective
from .trades import TRADES, TradesTask, check_is_pgd

__all__ = ['FAT', 'FatTask', 'TradesFAT', 'TradesFatTask']

_logger = logging.getLogger(__name__)


def _tau_setting() -> Any:
    return setting(
        (), 'epochs at which tau, 0 at first, rises by one; an attack stops once its image has been '
        'misclassified tau + 1 times; 50 90 of 120 in the paper (default: never)',
        metavar='EPOCH', flat='fat_tau_epochs')


def _check_tau(epochs: Tuple[float, ...]) -> None:
    if not all(0 <= e < float('inf') for e in epochs):
        raise InputError('must be numbers of at least 0', argument='tau_epochs', value=epochs)


@register_objective
@dataclass(frozen=True, kw_only=True)
class FAT(Objective):
    """FAT: L(x*), where the attack on an image stops once it has been misclassified τ + 1 times."""
    name: ClassVar[str] = 'fat'
    prefix: ClassVar[str] = 'adv'
    compares_labels: ClassVar[bool] = True

    weight: float = setting(
        1., 'weight of the adversarial loss, in [0, 1]; 1 skips the clean pass', metavar='LAMBDA')
    tau_epochs: Tuple[float, ...] = _tau_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.weight)
        _check_tau(self.tau_epochs)

    def task_class(self) -> Type[RobustTask]:
        """`FatTask`."""
        return FatTask


@register_objective
@dataclass(frozen=True, kw_only=True)
class TradesFAT(TRADES):
    """TRADES-FAT: TRADES, where the attack on an image stops once it has been misclassified τ + 1 times."""
    name: ClassVar[str] = 'trades_fat'
    prefix: ClassVar[str] = 'trades'
    compares_labels: ClassVar[bool] = True

    tau_epochs: Tuple[float, ...] = _tau_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tau(self.tau_epochs)

    def task_class(self) -> Type[RobustTask]:
        """`TradesFatTask`."""
        return TradesFatTask


class _Friendly(RobustTask):
    """The attack on an image stops once it has been misclassified τ + 1 times; τ rises during training."""
    state_names = ('step', 'tau_steps')

    def __init__(self, *args: Any, tau_epochs: Sequence[float] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        _check_tau(tuple(tau_epochs))
        self.tau_steps = sorted(round(e * self.steps_per_epoch) for e in tau_epochs)

    @classmethod
    def check_attack(cls, attack: TrainingAttack) -> None:
        """Require PGD in eval mode."""
        super().check_attack(attack)
        check_is_pgd(cls, attack)

    @property
    def tau(self) -> int:
        """τ at this training step: how often an image may be misclassified before its attack stops."""
        return bisect_right(self.tau_steps, self.step)

    def run_attack(self, input: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Adversarial images of this step, with the τ of this step."""
        return super().run_attack(input, target, tau=self.tau, **kwargs)

    def load_task_state(self, state: Optional[Dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        """Restore the step counter and the schedule of τ."""
        asked = self.tau_steps
        super().load_task_state(state, *args, **kwargs)
        if self.tau_steps != asked:
            _logger.warning(f'τ rises at steps {self.tau_steps}, as in the resumed run, not at {asked}.')


class FatTask(_Friendly, SatTask):
    """FAT: L(x*), where the attack on an image stops once it has been misclassified τ + 1 times.

    The paper uses λ = 1, the default here; below 1 the clean loss is included, as in `SatTask`.

    Args:
        *args: The timm model and its criterion.
        weight: λ, the weight of the adversarial loss, in [0, 1].
        **kwargs: Further arguments of `RobustTask`; the attack must be PGD in eval mode. `tau_epochs` are the epochs
            at which τ, 0 at first, rises by one.
    """

    def __init__(self, *args: Any, weight: float = 1., **kwargs: Any):
        super().__init__(*args, weight=weight, **kwargs)


class TradesFatTask(_Friendly, TradesTask):
    """TRADES-FAT: TRADES, where the attack on an image stops once it has been misclassified τ + 1 times.

    Args:
        *args: The timm model and its criterion.
        tau_epochs: Epochs at which τ, 0 at first, rises by one.
        **kwargs: Further arguments of `TradesTask`; the attack must be PGD in eval mode.
    """

    def attack_divergence(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            clean: torch.Tensor,
            start_std: Optional[float],
    ) -> torch.Tensor:
        """Maximize the cross-entropy with clean probabilities (N, K); labels decide what is misclassified."""
        return self.run_attack(input, target, reference=clean, start_std=start_std)
