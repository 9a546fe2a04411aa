"""Outcomes of attacks, image by image, and accuracies computed from them."""
import math
from dataclasses import dataclass
from typing import Dict, Iterable, Optional, Tuple

from ..attacks import attack_from_dict, parse_attack
from ..errors import InputError
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
        correct: Number of correct images, or the sum of a share in [0, 1] for each image. Shares vary less than
            outcomes of 0 or 1, so the interval also holds for their mean.
        total: Number of images.
    """
    if not total:
        return 0., 100.
    share, z2 = correct / total, _Z ** 2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total ** 2))
    # exact at both ends, where rounding would give 1e-17
    return 100 * (centre - half) if correct else 0., 100 * (centre + half) if correct < total else 100.


@dataclass(frozen=True)
class AttackOutcome:
    """The outcome of one attack.

    Attributes:
        name: Name of the attack, 'pgd20'; in a report with several threat models 'pgd20 L2 0.5'.
        attack: All settings of the attack, from `Attack.to_dict`.
        threat: Threat model, None for clean images.
        effort: Budget per image: '20', '20 x 5' with restarts, '5000 queries', '4 attacks'.
        correct: By image, whether it is classified correctly both clean and after this attack; None where the attack
            was not run because an earlier one had succeeded.
        attacked: Number of images it was run on.
        seconds: Run time in seconds.
        members: For an ensemble, the settings of its attacks.
        passes: Forward passes behind each verdict; an image is correct if fewer than half of them misclassify it.
        error_rates: With several passes, by image, the share of them that misclassify its worst version, clean or
            adversarial.
        distances: For an attack that minimizes the norm, by image, the distance of the nearest adversarial image; 0
            where the clean image is misclassified, None where none was found or searched for.
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
    def label(self) -> str:
        """The attack, with settings other than those its name stands for: 'pgd20 (step_size 0.001)'."""
        try:
            own, usual = attack_from_dict(self.attack).to_dict(), parse_attack(self.attack_name).to_dict()
        except InputError:  # an attack of a plugin
            own, usual = self.attack, {'attack': self.attack.get('attack')}
        unusual = ', '.join(f'{key} {value}' for key, value in own.items() if usual.get(key) != value)
        return self.attack_name + (f' ({unusual})' if unusual else '')

    @property
    def is_clean(self) -> bool:
        """Whether the images are clean."""
        return self.threat is None

    @property
    def is_autoattack(self) -> bool:
        """Whether it is AutoAttack, whose accuracy is the one to quote."""
        return self.attack.get('attack') == 'autoattack'

    @property
    def includes_autoattack(self) -> bool:
        """Whether it includes AutoAttack, so that its accuracy is at most AutoAttack's."""
        return self.is_autoattack or self.is_best

    @property
    def is_best(self) -> bool:
        """Whether it is `best`: AutoAttack, then stronger attacks on the remaining images."""
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
        """Percent of images without an adversarial image within eps, by `distances`."""
        return percent(d is None or d > eps for d in self.distances)

    @property
    def single_pass_accuracy(self) -> Optional[float]:
        """Percent of passes that classify the attacked images correctly."""
        known = [1 - rate for rate in self.error_rates if rate is not None]
        return 100. * sum(known) / len(known) if known and self.complete else None

    @property
    def verdict_interval(self) -> Tuple[float, float]:
        """Lowest and highest accuracy in percent, counting images with an error rate near one half either way."""
        low = high = 0
        for rate in self.error_rates:
            least, most = wilson_interval((rate or 0.) * self.passes, self.passes)
            low, high = low + (most < 50), high + (least <= 50)
        return 100. * low / max(len(self.error_rates), 1), 100. * high / max(len(self.error_rates), 1)


@dataclass(frozen=True)
class EpsPoint:
    """A point of the curve over eps: number of images classified correctly, and of all images."""
    eps: float
    num_correct: int
    num_examples: int

    @property
    def accuracy(self) -> float:
        """Accuracy in percent."""
        return 100. * self.num_correct / self.num_examples


@dataclass(frozen=True)
class GammaPoint:
    """A point of the trade-off of two BatchNorms: number of images classified correctly, clean and under attack."""
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
