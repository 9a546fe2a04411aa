"""Outcomes of attacks, image by image, and the accuracies in them."""
import math
from dataclasses import dataclass
from typing import Dict, Iterable, Optional, Tuple

from ..settings import check_types
from .facts import ThreatFacts

__all__ = ['AttackOutcome', 'EpsPoint', 'GammaPoint', 'RobustAccuracy', 'percent', 'wilson_interval']

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def percent(outcome: Iterable[Optional[bool]]) -> float:
    """Share of True in percent."""
    outcome = list(outcome)
    return 100. * sum(map(bool, outcome)) / max(len(outcome), 1)


def wilson_interval(correct: float, total: int) -> Tuple[float, float]:
    """95 % confidence interval of a share, in percent (Wilson 1927, https://doi.org/10.2307/2276774).

    Args:
        correct: Images that count, or the sum of their shares: a share varies less than an image that counts or not, so
            the interval holds for its mean too.
        total: All images.
    """
    if not total:
        return 0., 100.
    share, z2 = correct / total, _Z ** 2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total ** 2))
    # exact at both ends, where rounding would leave 1e-17
    return 100 * (centre - half) if correct else 0., 100 * (centre + half) if correct < total else 100.


@dataclass(frozen=True)
class AttackOutcome:
    """What one attack came to.

    Attributes:
        name: The attack as it is written, 'pgd20'; in a report of several threat models 'pgd20 L2 0.5'.
        attack: All its settings, as `Attack.to_dict` gives them.
        threat: Threat model, None for clean images.
        effort: What it spent on an image: '20', '20 x 5' with restarts, '5000 queries', '4 attacks'.
        correct: By image, classified correctly when clean and after this attack; None where it was not run because an
            attack before it had succeeded.
        attacked: Images it was run on.
        seconds: Time spent.
        members: Of an ensemble, the settings of its attacks.
        passes: Passes of the network behind each verdict: correct is an image that is misclassified in less than half.
        distances: By image, of an attack that minimizes the norm, how far the nearest image that fools is; 0 where the
            clean one is misclassified, None where none was found or looked for.
        error_rates: By image, where there are several, the share in which its worst image is misclassified.
    """
    name: str
    attack: Dict[str, object]
    threat: Optional[ThreatFacts]
    effort: str
    correct: Tuple[Optional[bool], ...]
    attacked: int = 0
    seconds: float = 0.
    members: Tuple[Dict[str, object], ...] = ()
    passes: int = 1
    error_rates: Tuple[Optional[float], ...] = ()
    distances: Tuple[Optional[float], ...] = ()

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def attack_name(self) -> str:
        """The attack without its threat model."""
        return self.name.removesuffix(f' {self.threat}')

    @property
    def is_clean(self) -> bool:
        """Whether nothing was done to the images."""
        return self.threat is None

    @property
    def is_autoattack(self) -> bool:
        """Whether it is AutoAttack, whose accuracy is the one to quote."""
        return self.attack.get('attack') == 'autoattack'

    @property
    def includes_autoattack(self) -> bool:
        """Whether its accuracy is at most AutoAttack's."""
        return self.is_autoattack or self.is_best

    @property
    def is_best(self) -> bool:
        """Whether it is AutoAttack and all that is known to break what it leaves."""
        return self.attack.get('attack') == 'best'

    @property
    def complete(self) -> bool:
        """Whether it has an outcome for every image."""
        return None not in self.correct

    @property
    def accuracy(self) -> Optional[float]:
        """Percent of images classified correctly under this attack; None unless `complete`."""
        return percent(self.correct) if self.complete else None

    @property
    def interval(self) -> Optional[Tuple[float, float]]:
        """Wilson's 95 % interval of `accuracy`."""
        return wilson_interval(sum(map(bool, self.correct)), len(self.correct)) if self.complete else None

    def accuracy_at(self, eps: float) -> float:
        """Percent of images that nothing within eps was found for, by `distances`."""
        return percent(d is None or d > eps for d in self.distances)

    @property
    def single_pass_accuracy(self) -> Optional[float]:
        """Percent of passes in which the images, as the attack left them, are classified correctly."""
        known = [1 - rate for rate in self.error_rates if rate is not None]
        return 100. * sum(known) / len(known) if known and self.complete else None

    @property
    def verdict_interval(self) -> Tuple[float, float]:
        """Lowest and highest accuracy in percent, as images whose error rate may be above or below half count."""
        low = high = 0
        for rate in self.error_rates:
            least, most = wilson_interval((rate or 0.) * self.passes, self.passes)
            low, high = low + (most < 50), high + (least <= 50)
        return 100. * low / max(len(self.error_rates), 1), 100. * high / max(len(self.error_rates), 1)


@dataclass(frozen=True)
class EpsPoint:
    """A point of the curve over eps: images classified correctly among all."""
    eps: float
    num_correct: int
    num_examples: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100. * self.num_correct / self.num_examples


@dataclass(frozen=True)
class GammaPoint:
    """A point of the trade-off of two BatchNorms: images classified correctly when clean and under attack."""
    gamma: float
    num_clean: int
    num_robust: int
    num_examples: int

    @property
    def clean(self) -> float:
        """Clean accuracy in percent."""
        return 100. * self.num_clean / self.num_examples

    @property
    def robust(self) -> float:
        """Robust accuracy in percent."""
        return 100. * self.num_robust / self.num_examples


@dataclass(frozen=True)
class RobustAccuracy:
    """The robust accuracy to quote, in percent, and the attacks behind it."""
    accuracy: float
    interval: Tuple[float, float]
    attacks: Tuple[str, ...]
