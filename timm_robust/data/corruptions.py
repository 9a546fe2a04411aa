"""Common corruptions on the fly: the functions of `imagecorruptions-imaug`, with noise seeded per image.

Hendrycks and Dietterich 2019, `Benchmarking Neural Network Robustness to Common Corruptions and Perturbations` -
https://arxiv.org/abs/1903.12261
"""
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Callable, Mapping, Tuple

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset

from ..errors import InputError
from .check import dataset_labels

__all__ = ['COMMON_CORRUPTIONS', 'CORRUPTIONS', 'SEVERITIES', 'CorruptedDataset', 'check_library', 'corrupt']

COMMON_CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'snow',
    'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate', 'jpeg_compression')
CORRUPTIONS = (*COMMON_CORRUPTIONS, 'speckle_noise', 'gaussian_blur', 'spatter', 'saturate')
SEVERITIES = (1, 2, 3, 4, 5)

_SMALLEST = 32  # size that the library accepts
_HAS_OWN_GENERATOR = ('impulse_noise', 'glass_blur')
_NOISES = ('gaussian_noise', 'shot_noise', 'impulse_noise', 'speckle_noise')


def check_library() -> None:
    """Raise `InputError` if the library is not installed; its predecessor `imagecorruptions` fails on current NumPy."""
    try:
        version('imagecorruptions-imaug')
    except PackageNotFoundError as error:
        raise InputError(
            'needs the package imagecorruptions-imaug', "pip install 'timm-robust[corruptions]'", argument='benchmarks',
            value='corruptions') from error


def corrupt(image: Image.Image, corruption: str, severity: int, seed: int) -> Image.Image:
    """An image under one of the corruptions of ImageNet-C, with ImageNet-C's constants.

    CIFAR-10-C was made with other, milder constants. An image below 32 pixels is padded with its edge pixels
    before the corruption and cropped afterwards.

    Args:
        image: RGB or grey.
        corruption: One of `CORRUPTIONS`.
        severity: From 1 to 5.
        seed: Seed of the randomness; numpy's global generator is not changed.

    Returns:
        An image of the same size and mode.
    """
    from imagecorruptions import corrupt as corrupt_pixels
    state = np.random.get_state()
    numpy_seed, own_seed = np.random.SeedSequence(
        [seed, CORRUPTIONS.index(corruption), severity]).generate_state(2).tolist()
    pixels = np.asarray(image)
    (height, width), padding = pixels.shape[:2], [(max(_SMALLEST - n, 0) // 2, -(-max(_SMALLEST - n, 0) // 2))
                                                  for n in pixels.shape[:2]]
    pixels = np.pad(pixels, [*padding, *[(0, 0)] * (pixels.ndim - 2)], mode='edge')
    try:
        np.random.seed(numpy_seed)
        changed = corrupt_pixels(
            pixels, severity=severity, corruption_name=corruption,
            **({'seed': own_seed} if corruption in _HAS_OWN_GENERATOR else {}))
    finally:
        np.random.set_state(state)
    (top, _), (left, _) = padding
    changed = changed[top:top + height, left:left + width]
    if image.mode == 'L' and corruption in _NOISES:
        changed = changed[..., 0]  # the mean of three draws would be weaker noise
    return Image.fromarray(changed).convert(image.mode)


class CorruptedDataset(Dataset):
    """The images of a data set, resized and cropped for a network and then corrupted.

    An image's noise depends only on `seed` and its index, not on subsets, batches or processes.

    Args:
        dataset: Returns (PIL image, label) by index.
        data_config: timm's data configuration, which says how images are resized and cropped first.
        corruption: One of `CORRUPTIONS`.
        severity: From 1 to 5.
        seed: Seed of the noise.

    Attributes:
        transform: Applied after the corruption.
    """

    def __init__(self, dataset: Any, data_config: Mapping[str, Any], corruption: str, severity: int, seed: int):
        self.dataset = dataset
        self.corruption, self.severity, self.seed = corruption, severity, seed
        self.targets = dataset_labels(dataset)
        self.transform: Callable = lambda image: image
        crop = create_transform(
            data_config['input_size'], interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'],
            crop_mode=data_config['crop_mode'], use_prefetcher=True)
        self.crop = crop.transforms[:-1]  # without the conversion to an array
        # the first call imports and compiles for seconds; do it before forking workers, which would repeat it
        corrupt(Image.new('RGB', (_SMALLEST, _SMALLEST)), corruption, severity, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        self.dataset.transform = None
        image, label = self.dataset[index]
        for step in self.crop:
            image = step(image)
        seed = self.seed * 0x9E3779B1 + index
        return self.transform(corrupt(image, self.corruption, self.severity, seed)), label
