"""No attack, so that a list of attacks can include clean accuracy."""
from typing import Any, Optional, Tuple

import torch

from .base import Attack
from .checks import Classifier, check_batch, check_classes, check_images, logits_of
from .context import attack_mode
from .losses import precise
from .registry import register_attack
from .state import AttackResult, Call
from .threat import ThreatModel

__all__ = ['Clean']


@register_attack
class Clean(Attack):
    """The clean images, unchanged."""
    name = 'clean'
    budget = None
    whole_batch = True

    def members(self, num_classes: Optional[int] = None, threat: Optional[ThreatModel] = None) -> Tuple[Attack, ...]:
        return ()

    def attack_images(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: ThreatModel,
            call: Call,
    ) -> AttackResult:
        """Find the misclassified images."""
        with attack_mode(model):
            check_images(images, call.space, model)
            checked = check_batch(images, labels)
            classifier = Classifier(model, dtype=images.dtype, check=lambda z: check_classes(checked, z.shape[1]))
            wrong = logits_of(classifier, images, call.batch_size).argmax(1) != checked.labels
        if call.progress is not None:
            call.progress(len(images))
        return AttackResult(precise(images.detach()), wrong, torch.ones_like(checked.labels))

    def craft(self, model: Any, images: torch.Tensor, labels: Any, threat: Any = None, **how: Any) -> torch.Tensor:
        """Return the images unchanged."""
        return images.detach()
