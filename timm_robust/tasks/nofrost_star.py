"""NoFrost*: NoFrost with augmented images in addition to clean and adversarial ones.

`Removing Batch Normalization Boosts Adversarial Training` - https://arxiv.org/abs/2207.01156
"""
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, List, Optional, Sequence, Type

import torch
import torch.nn as nn

from ..data.augment import ViewsDataset, noise2net
from ..devices import without_wait
from ..errors import InputError
from ..settings import setting
from .adversarial import warn_of_batch_statistics
from .base import RobustTask
from .objective import Objective, RunSettings, mixes_images, register_objective

__all__ = ['NoFrostStar', 'NoFrostStarTask']

_OTHER_STREAM = 0x5DEECE66D  # keeps the draw independent of the weights of Noise2Net


@register_objective
@dataclass(frozen=True, kw_only=True)
class NoFrostStar(Objective):
    """NoFrost*: the mean loss of clean, augmented and adversarial images."""
    name: ClassVar[str] = 'nofrost_star'

    terms: Optional[int] = setting(
        None, "terms of nofrost_star: 3 (the paper's: clean, augmented, adversarial) or 4 (the authors' code: clean, "
        'deeply augmented, texture-debiased, adversarial) (default: 4 with deeply augmented images, else 3)',
        metavar='N', flat='star_terms')
    deepaug_dirs: List[str] = setting(
        [], 'precomputed deeply augmented images of nofrost_star: folders with the same classes and file names as the '
        'training data; one folder is chosen at random for each image', metavar='DIR', flat='deepaug_dirs')
    noise2net: bool = setting(
        False, 'deeply augment images of nofrost_star on the fly, with random networks', flat='noise2net')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deepaug_dirs and self.noise2net:
            raise InputError('replaces `deepaug_dirs`', 'leave one of them out', argument='noise2net', value=True)
        if self.terms is None:
            object.__setattr__(self, 'terms', 4 if self.deepaug_dirs or self.noise2net else 3)
        _check_terms(self.terms)
        if self.terms == 4 and not (self.deepaug_dirs or self.noise2net):
            raise InputError('needs deeply augmented images', 'pass `deepaug_dirs` or `noise2net`',
                             argument='terms', value=4)

    def task_class(self) -> Type[RobustTask]:
        """`NoFrostStarTask`."""
        return NoFrostStarTask

    def task_kwargs(self) -> Dict[str, Any]:
        """All settings except the folders, which the data set uses."""
        return {'terms': self.terms, 'noise2net': self.noise2net}

    def prepare_dataset(self, dataset: Any, img_size: Sequence[int], hflip: float) -> Any:
        """A data set that returns several views of each image."""
        return ViewsDataset(dataset, img_size, self.deepaug_dirs, one_view=self.terms == 3, hflip=hflip)

    def check_run(self, run: RunSettings) -> None:
        """Reject settings that replace timm's own collate function."""
        super().check_run(run)
        sizes = getattr(run, 'train_img_sizes', None)  # older scripts do not have it
        if sizes:
            raise InputError('nofrost_star crops its views to one size', 'leave it out', argument='train_img_sizes',
                             value=sizes)
        argument = 'mixup' if mixes_images(run) else 'no_prefetcher' if run.no_prefetcher else ''
        if argument:
            raise InputError("nofrost_star collates its views with timm's own collate function",
                             'leave it out', argument=argument)


def _check_terms(terms: Optional[int]) -> None:
    if terms not in (3, 4):
        raise InputError("must be 3 (the paper) or 4 (the authors' code)", argument='terms', value=terms)


class NoFrostStarTask(RobustTask):
    r"""(L(x) + L(x̂) + L(x*)) / 3 on clean images x, augmented images x̂ and adversarial images x* crafted from x.

    With two kinds of augmented images the loss is the mean of four terms, as in the authors' code. With `noise2net` the
    task generates one kind itself; with three terms it replaces the other kind with probability 1/2 for each image.

    Args:
        model: The timm model.
        criterion: Any timm criterion.
        terms: Terms of the loss, 3 or 4.
        noise2net: Deeply augment clean images with random networks.
        **kwargs: Further arguments of `RobustTask`.

    Attributes:
        views: Number of views of each image in a batch. A batch holds N clean images, then N of the next view and so
            on, as `ViewsDataset` and timm's collate function deliver them.

    Raises:
        InputError: If `terms` is not 3 or 4, and in `forward` if `views` does not divide the batch.
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
        _check_terms(terms)
        self.terms, self.noise2net = terms, noise2net
        self.views = 2 if terms == 3 or noise2net else 3
        warn_of_batch_statistics(self)

    def _augmented(self, clean: torch.Tensor, given: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if not self.noise2net:
            return given
        deep = self.space.normalize(noise2net(self.space.to_pixels(clean).clamp(0, 1), self.step_seed()))
        if self.terms == 4:
            return [*given, deep]
        generator = torch.Generator('cpu').manual_seed(self.step_seed() ^ _OTHER_STREAM)
        drawn = torch.rand(len(clean), 1, 1, 1, generator=generator, device='cpu')
        chosen = without_wait(drawn, clean.device) < .5
        return [torch.where(chosen, deep, given[0])]

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adversarial images for the clean images in a batch of views."""
        if len(input) % self.views:
            raise InputError(f'views={self.views} does not divide a batch of {len(input)}',
                             'pass all views of each image')
        count = len(input) // self.views
        return self.run_attack(input[:count], target[:count])

    def loss(self, input: torch.Tensor, adv: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The mean loss of clean, augmented and adversarial images.

        Args:
            input: Views in `space`, shape (views · N, C, H, W), the clean images first.
            adv: Adversarial images, shape (N, C, H, W).
            target: Class indices (views · N,) or soft targets (views · N, K), the same for every view.

        Returns:
            'loss'; 'output', the logits of the N clean images; 'clean_loss', 'augmented_loss' (mean over the kinds of
            augmentation), 'adv_loss', 'clean_top1' and 'adv_top1' (percent), detached.
        """
        clean, *given = input.chunk(self.views)
        target = target[:len(clean)]
        augmented = self._augmented(clean, given)
        outputs = self.forward_together(clean, *augmented, adv)
        losses = [self.criterion(output, target) for output in outputs]
        return {
            'loss': sum(losses) / len(losses),
            'output': outputs[0],
            'clean_loss': losses[0].detach(),
            'augmented_loss': torch.stack([x.detach() for x in losses[1:-1]]).sum() / len(augmented),
            'adv_loss': losses[-1].detach(),
            'clean_top1': self.top1(outputs[0], target),
            'adv_top1': self.top1(outputs[-1], target),
        }
