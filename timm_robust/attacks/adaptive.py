"""The attack for networks that normalize by the current batch: the whole batch moves, and its statistics with it."""
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
    """PGD on a whole batch at once, on the cross-entropy and on the logit gap, with gradients through the statistics.

    An attack per image means nothing where a prediction depends on the neighbours. Here the attacker holds the whole
    batch: of all iterates of all runs the batch in which most images fool the network at once is returned. The outcome
    holds for this batch alone. In the spirit of Tramer et al. 2020, `On Adaptive Attacks to Adversarial Example
    Defenses` - https://arxiv.org/abs/2002.08347
    """
    name = 'adaptive'
    aliases = ('adaptive-batch',)
    image_by_image = False
    whole_batch = True
    steps: int = setting(100, 'number of gradient steps of each run')
    step_size: Optional[float] = setting(None, 'length of a step in pixel units (default: by steps)')
    restarts: int = setting(1, 'number of runs with each loss')

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
        """Move the batch; arguments of `GradientAttack.craft`."""
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
        """Attack the images as one batch. A `fast_model` has other statistics and is not used.

        Raises:
            InputError: On bad arguments, and on `targets` and a `batch_size` other than the number of images.
        """
        if call.targets is not None:
            raise InputError(f'{self} does not steer towards a class', 'leave it out', argument='targets')
        if call.batch_size not in (None, len(images)):
            raise InputError(
                f'{self} moves all {len(images)} images as one batch', 'leave it out', argument='batch_size',
                value=call.batch_size)
        adv = self.craft(model, images, labels, threat, space=call.space, seed=call.seed)
        with attack_mode(model):
            classifier = Classifier(model, dtype=images.dtype)
            fooled = logits_of(classifier, adv).argmax(1) != check_batch(images, labels).labels
        if call.progress is not None:
            call.progress(len(images))
        # for each loss and restart every step and a last look, and a look at the outcome
        spent = 2 * (self.restarts * (self.steps + 1) + 1)
        return AttackResult(adv, fooled, torch.full_like(fooled, spent, dtype=torch.int64))
