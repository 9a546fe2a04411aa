"""AutoAttack: an ensemble of parameter-free attacks, each on the images that withstood those before it.

Croce & Hein 2020, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks` -
https://arxiv.org/abs/2003.01690, section 5; the versions and their parameters are those of the authors' code.
"""
from dataclasses import dataclass, replace
from typing import Any, Optional, Tuple

import torch

from ..errors import InputError, check_choice
from ..settings import setting
from .apgd import APGD, APGDT
from .base import Attack
from .checks import Classifier, check_batch, check_classes, check_images, logits_of
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


@dataclass(frozen=True, kw_only=True)
class Ensemble(Attack):
    """Several attacks in sequence; subclasses say which."""
    budget = None

    def all_members(self) -> Tuple[Attack, ...]:
        """The attacks, in order."""
        raise NotImplementedError

    def adapted(self, member: Attack, num_classes: int, threat: ThreatModel) -> Attack:
        """A member with the settings it has under a threat model."""
        return member

    def members(self, num_classes: int, threat: Optional[ThreatModel] = None) -> Tuple[Attack, ...]:
        members = self.all_members()
        for member in members:
            if num_classes < member.classes_needed:
                raise InputError(
                    f'needs {member.classes_needed} classes for {member}, the model has {num_classes}',
                    'run its other attacks by themselves', argument='attack', value=str(self))
        return members if threat is None else tuple(self.adapted(m, num_classes, threat) for m in members)

    def check(self, threat: ThreatModel, num_classes: Optional[int] = None) -> None:
        if num_classes is not None:
            self.members(num_classes)
        for member in self.all_members():
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
            An image that fools for each clean one, the clean image itself where none was found.

        Raises:
            InputError: See `Attack.run`; on `targets`, and on too few classes for one of the attacks.
        """
        self.check(threat)
        if call.targets is not None:
            raise InputError(f'{self} chooses its own', 'leave it out', argument='targets')
        tell = call.progress or (lambda count: None)
        with attack_mode(model):
            check_images(images, call.space, model)
            checked = check_batch(images, labels)
            y, x = checked.labels, precise(images.detach()).clone()
            if not len(x):
                return AttackResult(x, torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y))
            seeds = image_seeds(call.seed, len(x), x.device)
            classifier = Classifier(model, dtype=images.dtype, check=lambda z: check_classes(checked, z.shape[1]))
            wrong = logits_of(classifier, x, call.batch_size).argmax(1) != y
            found = AttackResult(x, wrong, torch.ones_like(y))
            tell(int(wrong.sum()))
            for member in self.members(classifier.num_classes, threat):
                left = (~found.fooled).nonzero().squeeze(1)
                if not len(left):
                    break
                result = member.attack_images(
                    model, images[left], y[left], threat, replace(
                        call, seed=seeds[left], progress=None, all_correct=True))
                fooled = logits_of(classifier, result.adversarial, call.batch_size).argmax(1) != y[left]
                found.queries[left] += result.queries
                fallen = left[fooled]
                x[fallen], found.fooled[fallen] = result.adversarial[fooled], True
                tell(len(fallen))
            tell(int((~found.fooled).sum()))
        return found


@register_attack
class AutoAttack(Ensemble):
    """AutoAttack. Targeted attacks steer towards 9 classes, or all wrong ones if there are fewer.

    Under L1 standard runs APGD-CE five times, and APGD-T steers towards 5 classes.
    """
    name = 'autoattack'
    aliases = ('aa', 'autoattack-standard')
    variants = {'autoattack-plus': {'version': 'plus'}, 'autoattack-rand': {'version': 'rand'}}
    version: str = setting(
        'standard', 'standard (APGD-CE, APGD-T, FAB-T, Square), plus (with restarts, APGD-DLR and untargeted FAB) or '
        'rand (for networks with noise inside)')
    num_targets: Optional[int] = setting(None, 'wrong classes its targeted attacks steer towards (default: 9)')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('version', self.version, _VERSIONS)

    def all_members(self) -> Tuple[Attack, ...]:
        targets = self.num_targets
        if self.version == 'rand':
            return APGD(eot_iter=20), APGD(loss='dlr', eot_iter=20)
        targeted = APGDT(num_targets=targets), FABT(num_targets=targets)
        if self.version == 'standard':
            return APGD(), *targeted, Square()
        return APGD(restarts=5), APGD(loss='dlr', restarts=5), FAB(restarts=5), Square(), *targeted

    def adapted(self, member: Attack, num_classes: int, threat: ThreatModel) -> Attack:
        if threat.norm != 'L1' or self.version != 'standard':
            return member
        if isinstance(member, APGDT) and self.num_targets is None:
            return replace(member, num_targets=min(5, num_classes - 1))
        return replace(member, restarts=5) if isinstance(member, APGD) else member
