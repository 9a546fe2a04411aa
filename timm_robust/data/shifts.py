"""Readers of benchmarks of distribution shift, each of which checks that a folder is what it is taken for."""
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from ..errors import InputError

__all__ = ['CIFAR_C', 'FOLDERS', 'Part', 'cifar_c', 'imagenet_c', 'imagenet_shift', 'synsets']

_STORED_SIZE = 224
_LOOKED_AT = 8


@dataclass(frozen=True)
class _Shift:
    """What a benchmark of the classes of ImageNet holds."""
    title: str
    num_images: int
    synset_file: str = 'imagenet_synsets.txt'


_SHIFTS = {
    # Hendrycks et al. 2021, https://arxiv.org/abs/2006.16241
    'r': _Shift('ImageNet-R', 30_000, 'imagenet_r_synsets.txt'),
    # Hendrycks et al. 2021, https://arxiv.org/abs/1907.07174
    'a': _Shift('ImageNet-A', 7_500, 'imagenet_a_synsets.txt'),
    # Wang et al. 2019, https://arxiv.org/abs/1905.13549
    'sketch': _Shift('ImageNet-Sketch', 50_889),
    # Geirhos et al. 2019, https://arxiv.org/abs/1811.12231
    'stylized': _Shift('Stylized ImageNet', 50_000),
}
_IMAGENET_C_IMAGES = 50_000  # of each corruption and severity; https://arxiv.org/abs/1903.12261

CIFAR_C = {'cifar10-c': 10, 'cifar100-c': 100}  # number of classes

FOLDERS = {
    'c': 'imagenet-c', 'r': 'imagenet-r', 'a': 'imagenet-a', 'sketch': 'imagenet-sketch',
    'stylized': 'imagenet-stylized', 'cifar10-c': 'CIFAR-10-C', 'cifar100-c': 'CIFAR-100-C'}


@dataclass
class Part:
    """One set of images with its accuracy.

    Attributes:
        key: Name of the benchmark; of corruptions 'NAME/CORRUPTION/SEVERITY'.
        open: Opens the images, as a data set with a `transform`.
        classes: Indices of the classes that count, None for all.
        stored_size: Height and width of images that are not to be cropped; None for those to be resized and cropped as
            the network's data configuration says.
        expected: Number of images in the published benchmark.
        size: Number of images there are, once it was opened.
    """
    key: str
    open: Callable[[], Any]
    classes: Optional[Tuple[int, ...]] = None
    stored_size: Optional[Tuple[int, int]] = None
    expected: Optional[int] = None
    size: int = 0


def synsets(file: str = 'imagenet_synsets.txt') -> List[str]:
    """WordNet ids of a list that timm ships, in the order of class indices."""
    return (resources.files('timm.data') / '_info' / file).read_text(encoding='utf-8').split()


def _wrong(name: str, problem: str, remedy: str = '') -> InputError:
    return InputError(problem, remedy, argument='benchmarks', value=name)


def _check_classes(name: str, title: str, folder: Path, wanted: Sequence[str]) -> None:
    if not folder.is_dir():
        raise _wrong(name, f'no folder {folder}', f'name the one of {title} with {name}=FOLDER')
    found = {p.name for p in folder.iterdir() if p.is_dir()}
    odd = sorted(found - set(wanted))[:1] or sorted(set(wanted) - found)[:1]
    if odd:
        what = 'is none of its classes' if odd[0] in found else 'is missing'
        raise _wrong(
            name, f'{folder} has {len(found)} folders, {title} one for each of {len(wanted)} classes: {odd[0]} {what}')


def _image_folder(folder: Path, mode: str) -> Any:
    index = {name: i for i, name in enumerate(synsets())}
    return create_dataset('', root=str(folder), class_map=index, input_img_mode=mode)


def imagenet_shift(name: str, folder: Path) -> List[Part]:
    """ImageNet-R and ImageNet-A (200 classes each), ImageNet-Sketch or Stylized ImageNet, one folder for each class.

    Args:
        name: 'r', 'a', 'sketch' or 'stylized'.
        folder: Where its class folders lie.

    Raises:
        InputError: If the folder does not hold exactly the classes of the benchmark.
    """
    shift, everything = _SHIFTS[name], synsets()
    wanted = synsets(shift.synset_file)
    _check_classes(name, shift.title, folder, wanted)
    classes = None if wanted == everything else tuple(everything.index(s) for s in wanted)
    return [Part(name, partial(_image_folder, folder, 'RGB'), classes, expected=shift.num_images)]


def _stored(name: str, folder: Path) -> Any:
    dataset = _image_folder(folder, 'RGB')
    for i in range(0, len(dataset), max(len(dataset) // _LOOKED_AT, 1)):
        size = dataset[i][0].size
        if size != (_STORED_SIZE, _STORED_SIZE):
            raise _wrong(
                name, f'{dataset.filename(i, absolute=True)} has {size[0]}x{size[1]} pixels, ImageNet-C is stored as '
                f'{_STORED_SIZE}x{_STORED_SIZE}', 'give the original files')
    return dataset


def imagenet_c(folder: Path, corruptions: Sequence[str], severities: Sequence[int]) -> List[Part]:
    """ImageNet-C: folders CORRUPTION/SEVERITY/CLASS of images that were cropped to 224x224 before.

    Raises:
        InputError: If a folder is missing or does not hold exactly ImageNet's classes; on opening, if images are not of
            their published size.
    """
    parts, wanted = [], synsets()
    if not folder.is_dir():
        raise _wrong('c', f'no folder {folder}', 'name the one of ImageNet-C with c=FOLDER')
    for corruption in corruptions:
        for severity in severities:
            own = folder / corruption / str(severity)
            if not own.is_dir():
                raise _wrong(
                    'c', f'no folder {own}', 'unpack all of ImageNet-C, or name what there is as `corruptions` and '
                    '`severities`')
            _check_classes('c', f'ImageNet-C ({corruption}, {severity})', own, wanted)
            parts.append(Part(
                f'c/{corruption}/{severity}', partial(_stored, 'c', own), stored_size=(_STORED_SIZE,) * 2,
                expected=_IMAGENET_C_IMAGES))
    return parts


class _Rows(Dataset):
    """Rows of an array of images (N, H, W, 3), as PIL images with their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.targets = images, labels
        self.transform: Callable = lambda image: image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def cifar_c(name: str, folder: Path, corruptions: Sequence[str], severities: Sequence[int]) -> List[Part]:
    """CIFAR-10-C or CIFAR-100-C: an array of 50,000 images for each corruption, 10,000 of each severity in turn.

    Args:
        name: 'cifar10-c' or 'cifar100-c'.
        folder: Where CORRUPTION.npy and labels.npy lie.
        corruptions: Which to read.
        severities: Which to read.

    Raises:
        InputError: If an array is missing or has another shape or type.
    """
    arrays = {}
    for file in ('labels', *corruptions):
        try:
            arrays[file] = np.load(folder / f'{file}.npy', mmap_mode='r')
        except (OSError, ValueError) as error:
            raise _wrong(
                name, f'no array {folder / file}.npy ({type(error).__name__})', f'name the folder of {FOLDERS[name]} '
                f'with {name}=FOLDER') from error
    labels = np.asarray(arrays.pop('labels')).astype(np.int64)
    count, wanted = len(labels) // 5, CIFAR_C[name]
    lowest, highest = np.min(labels), np.max(labels)
    if labels.ndim != 1 or len(labels) % 5 or lowest < 0 or highest != wanted - 1:
        raise _wrong(
            name, f'labels.npy has shape {labels.shape} and labels from {lowest} to {highest}, not those of {wanted} '
            'classes at five severities')
    parts: Dict[str, Part] = {}
    for corruption, images in arrays.items():
        if images.shape != (len(labels), 32, 32, 3) or images.dtype != np.uint8:
            raise _wrong(
                name, f'{corruption}.npy holds {images.dtype} of shape {images.shape}, not uint8 of '
                f'{(len(labels), 32, 32, 3)}')
        for severity in severities:
            rows = slice((severity - 1) * count, severity * count)
            key = f'{name}/{corruption}/{severity}'
            parts[key] = Part(
                key, partial(_Rows, images[rows], labels[rows]), stored_size=(32, 32), expected=10_000)
    return list(parts.values())
