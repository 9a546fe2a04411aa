"""AutoAttack, followed by attacks that succeed on some of the images it fails on."""
from typing import Optional, Tuple

from .apgd import APGD
from .autoattack import AutoAttack, Ensemble
from .base import Attack
from .malt import MALT
from .registry import register_attack
from .threat import ThreatModel

__all__ = ['Best']


@register_attack
class Best(Ensemble):
    """AutoAttack, then MALT and APGD on the probability margin (PMA) on the remaining images; slower, never weaker.

    If an evaluation also lists `autoattack`, the shared attacks run only once.
    """
    name = 'best'

    @property
    def first(self) -> Ensemble:
        return AutoAttack()

    def members(self, num_classes: Optional[int] = None, threat: Optional[ThreatModel] = None) -> Tuple[Attack, ...]:
        loss = 'dlr' if num_classes is None or num_classes >= 4 else 'gap'
        return *self.first.members(num_classes, threat), MALT(loss=loss), APGD(loss='pm')
