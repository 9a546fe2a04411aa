"""Adaptive attack on networks with batch statistics: perturbs the whole batch at once."""
from typing import Any, Optional, Union

import torch

from ..errors import InputError, check_at_least
from ..settings import setting
from .ball import InputSpace
from .base import Attack
from .checks import Classifier, check_batch, logits_of
from .context import attack_mode
from .losses import cross_entropy, logit_gap
from .pgd import PGD
from .registry import register_attack
from .state import AttackResult, Call
from .threat import Seed, ThreatModel

__all__ = ['Adaptive']


@register_attack
class Adaptive(Attack):
    """PGD on a whole batch with the cross-entropy and the logit gap, and with gradients through the batch statistics.

    If a prediction depends on the other images of the batch, attacking single images is meaningless. Here the attacker
    controls the whole batch. The attack returns the iterate, over all runs, in which the most images fool the network
    at once. The result holds for this batch only. In the spirit of Tramer et al. 2020, `On Adaptive Attacks to
    Adversarial Example Defenses` - https://arxiv.org/abs/2002.08347
    """
    name = 'adaptive'
    aliases = ('adaptive-batch',)
    image_by_image = False
    whole_batch = True
    steps: int = setting(100, 'number of gradient steps per run')
    step_size: Optional[float] = setting(None, 'step size in pixel units (default: derived from steps)')
    restarts: int = setting(1, 'number of runs per loss')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('steps', self.steps)
        check_at_least('restarts', self.restarts)

    def craft(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: Union[str, ThreatModel],
            *,
            space: Optional[InputSpace] = None,
            seed: Seed = 0,
            bn_mode: str = 'eval',
    ) -> torch.Tensor:
        """Perturb the batch; takes the arguments of `GradientAttack.craft`."""
        best, most, classifier = images.detach(), -1, Classifier(model, dtype=images.dtype)
        attack = PGD(steps=self.steps, step_size=self.step_size, restarts=self.restarts)
        for loss_fn in (cross_entropy, logit_gap):
            adv = attack.craft(
                model, images, labels, threat, space=space, seed=seed, bn_mode=bn_mode, loss_fn=loss_fn,
                keep='most_fooled')
            with attack_mode(model, bn_mode):
                fooled = int((logits_of(classifier, adv).argmax(1) != check_batch(images, labels).labels).sum())
            if fooled > most:
                best, most = adv, fooled
        return best

    def attack_images(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: ThreatModel,
            call: Call,
    ) -> AttackResult:
        """Attack the images as one batch. `fast_model` is ignored, since its batch statistics differ.

        Raises:
            InputError: On bad arguments, on `targets`, and on a `batch_size` other than the number of images.
        """
        if call.targets is not None:
            raise InputError(f'{self} cannot target a class', 'leave it out', argument='targets')
        if call.batch_size not in (None, len(images)):
            raise InputError(
                f'{self} attacks all {len(images)} images as one batch', 'leave it out', argument='batch_size',
                value=call.batch_size)
        adv = self.craft(model, images, labels, threat, space=call.space, seed=call.seed)
        with attack_mode(model):
            classifier = Classifier(model, dtype=images.dtype)
            fooled = logits_of(classifier, adv).argmax(1) != check_batch(images, labels).labels
        if call.progress is not None:
            call.progress(len(images))
        # per loss: steps + 1 evaluations for each restart, and one to count the images that fool the network
        spent = 2 * (self.restarts * (self.steps + 1) + 1)
        return AttackResult(adv, fooled, torch.full_like(fooled, spent, dtype=torch.int64))
