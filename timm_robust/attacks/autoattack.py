"""AutoAttack: an ensemble of parameter-free attacks, run in sequence, each on the remaining images.

Croce & Hein 2020, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks` -
https://arxiv.org/abs/2003.01690, section 5. Versions and parameters follow the authors' code.
"""
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Optional, Tuple

import torch

from ..errors import InputError, check_choice
from ..settings import setting
from .apgd import APGD, APGDT
from .base import Attack
from .checks import Classifier, check_batch, check_classes, check_images, error_rates, logits_of
from .context import attack_mode
from .fab import FAB, FABT
from .losses import precise
from .noise import image_seeds
from .registry import register_attack
from .square import Square
from .state import AttackResult, Call
from .threat import ThreatModel

__all__ = ['AutoAttack', 'Ensemble']

_VERSIONS = ('standard', 'plus', 'rand')
_MANY = 1000  # assumed number of classes if it is unknown


@dataclass(frozen=True, kw_only=True)
class Ensemble(Attack):
    """Several attacks run in sequence; subclasses define `members`."""
    budget = None

    @property
    def first(self) -> Optional['Ensemble']:
        """The ensemble whose attacks this one runs first, if any."""
        return None

    def members(self, num_classes: Optional[int] = None, threat: Optional[ThreatModel] = None) -> Tuple[Attack, ...]:
        raise NotImplementedError

    @property
    def passes(self) -> int:
        return max(member.passes for member in self.members())

    def check(self, threat: ThreatModel, num_classes: Optional[int] = None) -> None:
        for member in self.members(num_classes, threat):
            member.check(threat, num_classes)

    def attack_images(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: ThreatModel,
            call: Call,
    ) -> AttackResult:
        """Attack each image until one attack succeeds.

        Returns:
            An adversarial image for each clean one, or the clean image itself if none was found. For a randomized
            network (version rand) it is the image with the highest error rate over several passes; it counts as fooled
            if at least half of them misclassify it. A single pass would also count chance successes
            (https://github.com/fra31/auto-attack/pull/105).

        Raises:
            InputError: On `targets`, and as in `Attack.run`.
        """
        self.check(threat)
        if call.targets is not None:
            raise InputError(f'{self} chooses its own targets', 'leave it out', argument='targets')
        tell = call.progress or (lambda count: None)
        with attack_mode(model):
            check_images(images, call.space, model)
            checked = check_batch(images, labels)
            y, x = checked.labels, precise(images.detach()).clone()
            if not len(x):
                return AttackResult(x, torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y))
            seeds = image_seeds(call.seed, len(x), x.device)
            classifier = Classifier(model, dtype=images.dtype, check=lambda z: check_classes(checked, z.shape[1]))

            def ask(images: torch.Tensor) -> torch.Tensor:
                return logits_of(classifier, images, call.batch_size)

            rates = error_rates(partial(ask, x), y, self.passes)
            found = AttackResult(x, rates >= .5, torch.ones_like(y), rates if self.passes > 1 else None)
            tell(int(found.fooled.sum()))
            for member in self.members(classifier.num_classes, threat):
                left = (~found.fooled).nonzero().squeeze(1)
                if not len(left):
                    break
                result = member.attack_images(
                    model, images[left], y[left], threat, replace(
                        call, seed=seeds[left], progress=None, all_correct=True))
                now = error_rates(partial(ask, result.adversarial), y[left], self.passes)
                found.queries[left] += result.queries
                better = now > rates[left]
                x[left[better]], rates[left[better]] = result.adversarial[better], now[better]
                found.fooled = rates >= .5
                tell(int(found.fooled[left].sum()))
            tell(int((~found.fooled).sum()))
        return found


@register_attack
class AutoAttack(Ensemble):
    """AutoAttack. Targeted attacks use 9 target classes, or all wrong classes if there are fewer.

    The DLR needs at least 3 classes and the targeted DLR at least 4; the authors' code leaves this to its users. Here,
    with fewer classes, the same attacks maximize a logit gap, whose scale does not affect APGD's steps: APGD-T uses
    z_t - z_y, and in plus and rand with 2 classes APGD uses max_{j != y} z_j - z_y. A single output z counts as the two
    logits [0, z].

    For L1, the standard version runs APGD-CE five times, and APGD-T with 5 target classes.
    """
    name = 'autoattack'
    aliases = ('aa', 'autoattack-standard')
    variants = {'autoattack-plus': {'version': 'plus'}, 'autoattack-rand': {'version': 'rand'}}
    version: str = setting(
        'standard', 'standard (APGD-CE, APGD-T, FAB-T, Square), plus (with restarts, APGD-DLR and untargeted FAB) or '
        'rand (for randomized networks)')
    num_targets: Optional[int] = setting(None, 'number of target classes of the targeted attacks (default: 9)')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('version', self.version, _VERSIONS)

    def members(self, num_classes: Optional[int] = None, threat: Optional[ThreatModel] = None) -> Tuple[Attack, ...]:
        count, targets = num_classes or _MANY, self.num_targets
        l1 = self.version == 'standard' and threat is not None and threat.norm == 'L1'
        margin = 'dlr' if count >= 3 else 'gap'
        if self.version == 'rand':
            return APGD(eot_iter=20), APGD(loss=margin, eot_iter=20)
        apgd_t = APGDT(
            num_targets=min(5, count - 1) if l1 and targets is None else targets, loss='dlr' if count >= 4 else 'gap')
        if self.version == 'standard':
            return APGD(restarts=5 if l1 else 1), apgd_t, FABT(num_targets=targets), Square()
        return (
            APGD(restarts=5), APGD(loss=margin, restarts=5), FAB(restarts=5), Square(), apgd_t,
            FABT(num_targets=targets))
