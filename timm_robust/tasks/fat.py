"""Friendly adversarial training, by itself and in TRADES.

Zhang et al. 2020, `Attacks Which Do Not Kill Training Make Adversarial Learning Stronger` -
https://arxiv.org/abs/2002.11242
"""
import logging
from bisect import bisect_right
from typing import Any, Dict, Optional, Sequence

import torch

from .adversarial import AdversarialTask
from .trades import TradesTask

__all__ = ['FriendlyTask', 'TradesFriendlyTask']

_logger = logging.getLogger(__name__)


class _Friendly:
    """A slack τ that rises with the steps of training, and an attack that takes it as `tau`."""
    state_names = ('step', 'tau_steps')

    def __init__(self, *args: Any, tau_steps: Sequence[int] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tau_steps = sorted(tau_steps)

    @property
    def tau(self) -> int:
        """Steps an attack goes on after it first fools the network, in this step of training."""
        return bisect_right(self.tau_steps, self.step)

    def run_attack(self, input: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Adversarial images of this step with its τ."""
        return super().run_attack(input, target, tau=self.tau, **kwargs)

    def load_task_state(self, state: Optional[Dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        """Restore the step counter and the schedule of τ."""
        asked = self.tau_steps
        super().load_task_state(state, *args, **kwargs)
        if self.tau_steps != asked:
            _logger.warning(f'τ rises at steps {self.tau_steps}, as in the run that goes on, not at {asked}.')


class FriendlyTask(_Friendly, AdversarialTask):
    """FAT: L(x*) on images that stop τ steps after they first fool the network.

    The paper has λ = 1, the default here; with less the clean loss has its share, as in `AdversarialTask`.

    Args:
        model, criterion: See `RobustTask`. The attack takes `tau`, such as `friendly_pgd`.
        tau_steps: Steps at which τ, 0 at first, rises by one.
        adv_weight: See `AdversarialTask`.
        **kwargs: Further arguments of `RobustTask`.
    """

    def __init__(self, *args: Any, adv_weight: float = 1., **kwargs: Any):
        super().__init__(*args, adv_weight=adv_weight, **kwargs)


class TradesFriendlyTask(_Friendly, TradesTask):
    """TRADES-FAT: TRADES on images that stop τ steps after they first fool the network.

    Args:
        model, criterion, beta: See `TradesTask`. The attack takes `tau` and `reference`, such as `friendly_pgd`.
        tau_steps: Steps at which τ, 0 at first, rises by one.
        **kwargs: Further arguments of `RobustTask`.
    """

    def attack_divergence(self, input: torch.Tensor, target: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Adversarial images from clean probabilities (N, K); labels say when an image fools."""
        return self.run_attack(input, target, reference=clean)
