"""Readers of distribution shift benchmarks; each checks that its folder matches the expected layout."""
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

__all__ = [
    'CIFAR_C', 'CORRUPTIONS_3D', 'FOLDERS', 'Part', 'cifar_10_1', 'cifar_c', 'imagenet_c', 'imagenet_shift', 'synsets']

_STORED_SIZE = 224
_LOOKED_AT = 8


@dataclass(frozen=True)
class _Shift:
    """Contents of a benchmark with ImageNet's classes."""
    title: str
    num_images: int
    synset_file: str = 'imagenet_synsets.txt'
    by_index: bool = False  # folders are class indices


_SHIFTS = {
    # Hendrycks et al. 2021, https://arxiv.org/abs/2006.16241
    'r': _Shift('ImageNet-R', 30_000, 'imagenet_r_synsets.txt'),
    # Hendrycks et al. 2021, https://arxiv.org/abs/1907.07174
    'a': _Shift('ImageNet-A', 7_500, 'imagenet_a_synsets.txt'),
    # Wang et al. 2019, https://arxiv.org/abs/1905.13549
    'sketch': _Shift('ImageNet-Sketch', 50_889),
    # Geirhos et al. 2019, https://arxiv.org/abs/1811.12231
    'stylized': _Shift('Stylized ImageNet', 50_000),
    # Recht et al. 2019, https://arxiv.org/abs/1902.10811; any of its three sets
    'v2': _Shift('ImageNet-V2', 10_000, by_index=True),
}
# Kar et al. 2022, https://arxiv.org/abs/2203.01441
CORRUPTIONS_3D = (
    'near_focus', 'far_focus', 'bit_error', 'color_quant', 'flash', 'fog_3d', 'h265_abr', 'h265_crf', 'iso_noise',
    'low_light', 'xy_motion_blur', 'z_motion_blur')
_CIFAR_10_1 = {'v6': 2_000, 'v4': 2_021}  # images; https://arxiv.org/abs/1806.00451
_IMAGENET_C_IMAGES = 50_000  # of each corruption and severity; https://arxiv.org/abs/1903.12261

CIFAR_C = {'cifar10-c': 10, 'cifar100-c': 100}  # number of classes

FOLDERS = {
    'c': 'imagenet-c', 'r': 'imagenet-r', 'a': 'imagenet-a', 'sketch': 'imagenet-sketch',
    'stylized': 'imagenet-stylized', 'v2': 'imagenetv2-matched-frequency-format-val', '3dcc': 'ImageNet-3DCC',
    'cifar10-c': 'CIFAR-10-C', 'cifar100-c': 'CIFAR-100-C', 'cifar10.1': 'CIFAR-10.1'}


@dataclass
class Part:
    """One set of images whose accuracy is measured separately.

    Attributes:
        key: Name of the benchmark; for corruptions 'NAME/CORRUPTION/SEVERITY'.
        open: Opens the images, as a data set with a `transform`.
        classes: Indices of the classes that are scored, None for all.
        stored_size: Height and width of images that are not cropped; None if images are resized and cropped by the
            network's data configuration.
        expected: Number of images in the published benchmark.
        size: Actual number of images, once opened.
    """
    key: str
    open: Callable[[], Any]
    classes: Optional[Tuple[int, ...]] = None
    stored_size: Optional[Tuple[int, int]] = None
    expected: Optional[int] = None
    size: int = 0


def synsets(file: str = 'imagenet_synsets.txt') -> List[str]:
    """WordNet ids of one of timm's lists, in the order of class indices."""
    return (resources.files('timm.data') / '_info' / file).read_text(encoding='utf-8').split()


def _wrong(name: str, problem: str, remedy: str = '') -> InputError:
    return InputError(problem, remedy, argument='benchmarks', value=name)


def _check_classes(name: str, title: str, folder: Path, wanted: Sequence[str]) -> None:
    if not folder.is_dir():
        raise _wrong(name, f'no folder {folder}', f'give the folder of {title} with {name}=FOLDER')
    found = {p.name for p in folder.iterdir() if p.is_dir()}
    odd = sorted(found - set(wanted))[:1] or sorted(set(wanted) - found)[:1]
    if odd:
        what = 'is not one of its classes' if odd[0] in found else 'is missing'
        raise _wrong(
            name,
            f'{folder} has {len(found)} folders, but {title} has {len(wanted)}, one for each class: {odd[0]} {what}')


def _image_folder(folder: Path, mode: str, classes: Sequence[str] = ()) -> Any:
    index = {name: i for i, name in enumerate(classes or synsets())}
    return create_dataset('', root=str(folder), class_map=index, input_img_mode=mode)


def imagenet_shift(name: str, folder: Path) -> List[Part]:
    """ImageNet-R and -A (200 classes each), -Sketch, -V2 or Stylized ImageNet, one folder for each class.

    Args:
        name: 'r', 'a', 'sketch', 'stylized' or 'v2'.
        folder: The folder of its class folders.

    Raises:
        InputError: If the folder does not hold exactly the classes of the benchmark.
    """
    shift, everything = _SHIFTS[name], synsets()
    wanted = [str(i) for i in range(len(everything))] if shift.by_index else synsets(shift.synset_file)
    _check_classes(name, shift.title, folder, wanted)
    if shift.by_index:  # in numeric order: 10 comes after 9, not after 1
        return [Part(name, partial(_image_folder, folder, 'RGB', wanted), expected=shift.num_images)]
    classes = None if wanted == everything else tuple(everything.index(s) for s in wanted)
    return [Part(name, partial(_image_folder, folder, 'RGB'), classes, expected=shift.num_images)]


def _stored(name: str, folder: Path) -> Any:
    dataset = _image_folder(folder, 'RGB')
    for i in range(0, len(dataset), max(len(dataset) // _LOOKED_AT, 1)):
        size = dataset[i][0].size
        if size != (_STORED_SIZE, _STORED_SIZE):
            raise _wrong(
                name, f'{dataset.filename(i, absolute=True)} has {size[0]}x{size[1]} pixels, but ImageNet-C has '
                f'{_STORED_SIZE}x{_STORED_SIZE}', 'give the original files')
    return dataset


def imagenet_c(
        folder: Path,
        corruptions: Sequence[str],
        severities: Sequence[int],
        name: str = 'c',
) -> List[Part]:
    """ImageNet-C or ImageNet-3DCC: folders CORRUPTION/SEVERITY/CLASS of images that are already cropped.

    ImageNet-C images have 224x224 pixels. ImageNet-3DCC images are resized as in RobustBench, without cropping.

    Args:
        folder: The folder of the corruptions' folders.
        corruptions: Corruptions to read.
        severities: Severities to read.
        name: 'c' or '3dcc'.

    Raises:
        InputError: If a folder is missing or does not hold exactly ImageNet's classes; on opening, if images do not
            have their published size.
    """
    parts, wanted, title = [], synsets(), 'ImageNet-C' if name == 'c' else 'ImageNet-3DCC'
    if not folder.is_dir():
        raise _wrong(name, f'no folder {folder}', f'give the folder of {title} with {name}=FOLDER')
    for corruption in corruptions:
        for severity in severities:
            own = folder / corruption / str(severity)
            if not own.is_dir():
                raise _wrong(
                    name, f'no folder {own}', f'unpack all of {title}, or select a part with `corruptions` and '
                    '`severities`')
            _check_classes(name, f'{title} ({corruption}, {severity})', own, wanted)
            opened = partial(_stored, name, own) if name == 'c' else partial(_image_folder, own, 'RGB')
            parts.append(Part(
                f'{name}/{corruption}/{severity}', opened, stored_size=(_STORED_SIZE,) * 2,
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
        folder: The folder of CORRUPTION.npy and labels.npy.
        corruptions: Corruptions to read.
        severities: Severities to read.

    Raises:
        InputError: If an array is missing or has another shape or type.
    """
    arrays = {}
    for file in ('labels', *corruptions):
        try:
            arrays[file] = np.load(folder / f'{file}.npy', mmap_mode='r')
        except (OSError, ValueError) as error:
            raise _wrong(
                name, f'no array {folder / file}.npy ({type(error).__name__})', f'give the folder of {FOLDERS[name]} '
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


def cifar_10_1(folder: Path) -> List[Part]:
    """CIFAR-10.1 (Recht et al. 2018): arrays of 2,000 new images (v6), or 2,021 (v4) if only those exist.

    Raises:
        InputError: If there is no pair of arrays, or one has another shape, type or number of images.
    """
    name = 'cifar10.1'
    version = next((v for v in _CIFAR_10_1 if (folder / f'cifar10.1_{v}_data.npy').is_file()), None)
    if version is None:
        raise _wrong(
            name, f'no array {folder}/cifar10.1_v6_data.npy', f'give the folder of CIFAR-10.1 with {name}=FOLDER')
    try:
        images, labels = (np.load(folder / f'cifar10.1_{version}_{kind}.npy') for kind in ('data', 'labels'))
    except (OSError, ValueError) as error:
        raise _wrong(name, f'no arrays of {version} in {folder} ({type(error).__name__})') from error
    if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8 or labels.shape != (len(images),):
        raise _wrong(
            name, f'{version} holds {images.dtype} of shape {images.shape} with labels of shape {labels.shape}, not '
            'uint8 of (N, 32, 32, 3) with one label each')
    if not np.issubdtype(labels.dtype, np.integer) or set(labels.tolist()) - set(range(10)):
        raise _wrong(name, f'{version} has labels other than 0 to 9')
    return [Part(name, partial(_Rows, images, labels), stored_size=(32, 32), expected=_CIFAR_10_1[version])]
