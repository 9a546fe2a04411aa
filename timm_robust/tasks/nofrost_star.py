"""NoFrost*: NoFrost with augmented images beside clean and adversarial ones.

`Removing Batch Normalization Boosts Adversarial Training` - https://arxiv.org/abs/2207.01156
"""
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn

from ..data.augment import noise2net
from ..errors import InputError
from .base import RobustTask, top1

__all__ = ['NoFrostStarTask']

_OTHER_STREAM = 0x5DEECE66D  # the draw must not follow the weights of Noise2Net


class NoFrostStarTask(RobustTask):
    r"""(L(x) + L(x̂) + L(x*)) / 3 on clean images x, augmented images x̂ and adversarial images x* crafted from x.

    With two kinds of augmented images it is the mean of four terms, as in the authors' code. With `noise2net` one kind
    is made here; if only three terms are wanted it takes the place of half of the batch's other kind.

    Args:
        model, criterion: See `RobustTask`.
        terms: Terms of the loss, 3 or 4.
        noise2net: Whether to augment clean images by networks drawn at random.
        **kwargs: Further arguments of `RobustTask`.

    Attributes:
        views: Views of each image in a batch, from terms and noise2net: N clean images, N of the next view and so on,
            as `ViewsDataset` and timm's collate function deliver them.

    Raises:
        InputError: If terms is another number, and in `forward` if a batch is not of whole views.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            terms: int = 3,
            noise2net: bool = False,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        if terms not in (3, 4):
            raise InputError(f'terms={terms}: must be 3 or 4')
        self.terms, self.noise2net = terms, noise2net
        self.views = 2 if terms == 3 or noise2net else 3

    def _augmented(self, clean: torch.Tensor, given: list) -> list:
        if not self.noise2net:
            return given
        deep = self.space.normalize(noise2net(self.space.to_pixels(clean).clamp(0, 1), self.step_seed()))
        if self.terms == 4:
            return [*given, deep]
        generator = torch.Generator().manual_seed(self.step_seed() ^ _OTHER_STREAM)
        chosen = torch.rand(len(clean), 1, 1, 1, generator=generator).to(clean.device) < .5
        return [torch.where(chosen, deep, given[0])]

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Craft, then compute the mean of the losses.

        Args:
            input: Views in `space`, shape (views · N, C, H, W), the clean images first.
            target: Class indices (views · N,) or soft targets (views · N, K), the same for every view.

        Returns:
            'loss'; 'output', the N clean logits; 'clean_loss', 'augmented_loss' (mean over the kinds) and 'adv_loss',
            'clean_top1' and 'adv_top1' (percent), detached.
        """
        if len(input) % self.views:
            raise InputError(f'views={self.views} does not divide a batch of {len(input)}: deliver whole views')
        clean, *given = input.chunk(self.views)
        target = target[:len(clean)]
        augmented = self._augmented(clean, given)
        adv = self.run_attack(clean, target)
        outputs = self.forward_together(clean, *augmented, adv)
        losses = [self.criterion(output, target) for output in outputs]
        self.step += 1
        return {
            'loss': sum(losses) / len(losses),
            'output': outputs[0],
            'clean_loss': losses[0].detach(),
            'augmented_loss': sum(x.detach() for x in losses[1:-1]) / len(augmented),
            'adv_loss': losses[-1].detach(),
            'clean_top1': top1(outputs[0], target),
            'adv_top1': top1(outputs[-1], target),
        }
