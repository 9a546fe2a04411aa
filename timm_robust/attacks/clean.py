"""No attack: clean images, so that they can stand in a list of attacks."""
from typing import Any, Callable, Optional, Tuple, Union

import torch

from .ball import PIXELS, InputSpace
from .base import Attack
from .checks import Classifier, check_batch, check_images, logits_of
from .context import attack_mode
from .registry import register_attack
from .state import AttackResult
from .threat import Seed, ThreatModel

__all__ = ['Clean']


@register_attack
class Clean(Attack):
    """The images as they are."""
    name = 'clean'
    budget = None
    whole_batch = True

    def members(self, num_classes: int) -> Tuple[Attack, ...]:
        return ()

    def run(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: Union[str, ThreatModel, None] = None,
            *,
            seed: Seed = 0,
            space: Optional[InputSpace] = None,
            targets: Any = None,
            batch_size: Optional[int] = None,
            fast_model: Optional[Callable] = None,
            progress: Optional[Callable[[int], None]] = None,
    ) -> AttackResult:
        """Which images are misclassified; arguments of `Attack.run`."""
        with attack_mode(model):
            check_images(images, space, model)
            checked = check_batch(images, labels)
            wrong = logits_of(Classifier(model, PIXELS, images.dtype), images, batch_size).argmax(1) != checked.labels
        if progress is not None:
            progress(len(images))
        return AttackResult(images.detach(), wrong, torch.ones_like(checked.labels))

    def craft(self, model: Any, images: torch.Tensor, labels: Any, threat: Any = None, **how: Any) -> torch.Tensor:
        """The images."""
        return images.detach()
