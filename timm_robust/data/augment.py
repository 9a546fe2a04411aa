"""Views of an image for NoFrost*: texture-debiased, and deeply augmented, either offline or by a random network.

NoFrost - https://arxiv.org/abs/2207.01156; Hermann et al. 2020, `The Origins and Prevalence of Texture Bias` -
https://arxiv.org/abs/1911.09071; Hendrycks et al. 2021, `The Many Faces of Robustness` (DeepAugment, Noise2Net) -
https://arxiv.org/abs/2006.16241
"""
import random
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset
from timm.data.transforms import ToNumpy
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import (
    ColorJitter,
    Compose,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
)

from ..devices import without_wait
from ..errors import InputError
from .check import check_images, whole_datasets

__all__ = ['ViewsDataset', 'noise2net', 'texture_debiased']

_HIDDEN, _KERNELS = 16, (1, 3, 5, 7)  # channels inside the random network, one branch for each kernel size
_SHARE = (.375, .75)  # weight of the network's output in the mixture
_AT_ONCE = 32  # images per forward pass


def texture_debiased(img_size: Union[int, Sequence[int]], hflip: float = 0.5) -> Compose:
    """NoFrost's texture-debiased augmentation, from a PIL image to a uint8 array (C, H, W).

    A crop of 64 to 100 % of the area and a flip with probability `hflip`; then, with probability 0.5, strong colour
    jitter (probability 0.8) and conversion to grey (probability 0.2).
    """
    colours = [RandomApply([ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), RandomGrayscale(0.2)]
    return Compose([
        RandomResizedCrop(img_size, scale=(0.64, 1.)), RandomHorizontalFlip(hflip), RandomApply(colours, 0.5),
        ToNumpy()])


class _DeepFolders:
    """Images augmented offline, in folders that mirror a data set."""

    def __init__(self, folders: Sequence[str], dataset: Any, mode: Optional[str]):
        whole = [getattr(getattr(part, 'reader', None), 'samples', None) for part in whole_datasets(dataset)]
        if not all(whole) or not hasattr(dataset, 'filename'):
            raise InputError(
                'needs training data in a folder of image files', argument='deepaug_dirs', value=' '.join(folders))
        wanted = [self._name(dataset.filename(i, absolute=True)) for i in range(len(dataset))]
        self.files: List[List[str]] = []
        for folder in folders:
            try:
                own = create_dataset('', root=folder, split='train', input_img_mode=mode or 'RGB')
            except (RuntimeError, OSError, ValueError, AssertionError) as error:
                raise InputError(
                    f'holds no images ({type(error).__name__})', argument='deepaug_dirs', value=folder) from error
            files = {self._name(path): path for path in (
                own.filename(i, absolute=True) for i in range(len(own)))}
            missing = next((name for name in wanted if name not in files), None)
            if missing:
                raise InputError(
                    f'has no {missing}.*', 'it needs an image of the same class and name for each training image',
                    argument='deepaug_dirs', value=folder)
            check_images(own)
            self.files.append([files[name] for name in wanted])

    @staticmethod
    def _name(path: str) -> str:
        return '/'.join(Path(path).with_suffix('').parts[-2:])

    def __call__(self, index: int, mode: str) -> Image.Image:
        path = random.choice(self.files)[index]
        try:
            with Image.open(path) as image:
                return image.convert(mode)
        except OSError as error:
            raise InputError(
                f'unreadable image {path}', 'repair it or create it again', argument='deepaug_dirs') from error


class ViewsDataset(Dataset):
    """Returns each image as a tuple of views: with timm's transform, and augmented. The image is decoded once.

    timm's collate function concatenates the views of a batch: N clean images, then N of the next view.

    Args:
        dataset: A timm data set; its own transform is removed.
        img_size: Height and width of the views.
        deepaug_dirs: Folders of images augmented offline, each with the classes and names of the data set. For each
            image, one folder is drawn; the image from it gets the same transform as clean images.
        one_view: One augmented view for each image, drawn from the two kinds, instead of both.
        hflip: Probability of a flip of the texture-debiased view.

    Attributes:
        transform: timm's training transform, set by its loader.

    Raises:
        InputError: If the data is streamed, or a folder lacks an image.
    """

    def __init__(
            self,
            dataset: Any,
            img_size: Union[int, Sequence[int]],
            deepaug_dirs: Sequence[str] = (),
            one_view: bool = False,
            hflip: float = 0.5,
    ):
        if isinstance(dataset, IterableDataset):
            raise InputError(
                'needs a data set with an index; streaming data has none', argument='objective', value='nofrost_star')
        dataset.transform = None
        self.dataset, self.one_view = dataset, one_view
        self.debias = texture_debiased(img_size, hflip)
        mode = getattr(dataset, 'input_img_mode', None)
        self.deep = _DeepFolders(deepaug_dirs, dataset, mode) if deepaug_dirs else None
        self.transform: Callable = ToNumpy()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the data set, if it accepts one."""
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> Tuple[Tuple[Any, ...], Any]:
        image, target = self.dataset[index]
        views = [self.transform(image)]
        deep = self.deep
        if deep is not None and self.one_view and random.random() >= .5:
            deep = None
        if deep is None or not self.one_view:
            views.append(self.debias(image))
        if deep is not None:
            views.append(self.transform(deep(index, image.mode)))
        # timm's transforms end in tensors or arrays
        return tuple(torch.as_tensor(view, device='cpu') for view in views), target


def noise2net(pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Deep augmentation on the fly: each image passes through a different random network.

    After Noise2Net of Hendrycks et al. 2021: convolutions with normal weights in branches of growing kernel size, each
    fed by the one before. The output is rescaled to the image's mean and standard deviation in each channel and mixed
    with the image, with a weight between 3/8 and 3/4.

    Args:
        pixels: Images (N, C, H, W), pixels in [0, 1].
        seed: Seed of the networks; the same on every device.

    Returns:
        Images of the same shape, pixels in [0, 1], without a graph.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    count, channels, height, width = pixels.shape
    part = _HIDDEN // len(_KERNELS)

    def draw(inside: int, outside: int, kernel: int) -> torch.Tensor:
        weight = torch.randn(count, outside, inside, kernel, kernel, generator=generator, device='cpu')
        return without_wait(weight * (2 / (inside * kernel ** 2)) ** .5, pixels.device)

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = F.conv2d(
            x.reshape(1, -1, height, width), weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=len(weight))
        return out.view(len(weight), -1, height, width)

    def networks(x: torch.Tensor, first: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        hidden = convolve(x, first).relu()
        last, branches = hidden.new_zeros(()), []
        for weight, own in zip(weights, hidden.split(part, dim=1)):
            last = convolve(own + last, weight).relu()
            branches.append(last)
        return convolve(torch.cat(branches, 1), weights[-1])

    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        x = pixels.detach().float()
        weights = [
            draw(channels, _HIDDEN, 1), *(draw(part, part, kernel) for kernel in _KERNELS), draw(_HIDDEN, channels, 1)]
        # 16 channels of all images at once would take more memory than the rest of the step
        out = torch.cat([networks(*parts) for parts in zip(*(t.split(_AT_ONCE) for t in (x, *weights)))])
        mean, std = (f(x, dim=(2, 3), keepdim=True) for f in (torch.mean, torch.std))
        own_std = out.std(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        out = (out - out.mean(dim=(2, 3), keepdim=True)) / own_std * std + mean
        low, high = _SHARE
        share = low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator, device='cpu')
        return torch.lerp(x, out, without_wait(share, x.device)).clamp(0, 1).to(pixels.dtype)
