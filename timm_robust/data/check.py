"""Look at a data set before hours are spent on it."""
from concurrent.futures import ThreadPoolExecutor
from typing import Optional, Sequence

import numpy as np
from PIL import Image

from ..errors import InputError

__all__ = ['check_images', 'check_labels', 'dataset_labels', 'image_channels', 'is_grey']

_MAX_CHECKED_FILES = 100_000


def _samples(dataset) -> Optional[list]:
    """(path, label) pairs of a data set that reads a folder, else None (archives have samples of another kind)."""
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    first = samples[0] if isinstance(samples, list) and samples else None
    return samples if isinstance(first, tuple) and isinstance(first[0], str) else None


def dataset_labels(dataset) -> Optional[np.ndarray]:
    """Class index of every image, shape (N,), or None where only reading the images would tell."""
    samples = _samples(dataset)
    labels = [s[1] for s in samples] if samples else getattr(dataset, 'targets', None)
    return None if labels is None else np.asarray(labels, dtype=np.int64)


def image_channels(dataset) -> Optional[int]:
    """Channels the data set delivers, or None if it converts images to what is asked for."""
    if getattr(dataset, 'input_img_mode', None):
        return None
    image = dataset[0][0]
    return len(image.getbands()) if isinstance(image, Image.Image) else image.shape[0]


def is_grey(dataset, num_looked_at: int = 16) -> bool:
    """Whether a folder holds grey images, by a look at some spread over it."""
    samples = _samples(dataset)
    if not samples:
        return False
    modes = []
    for path, _ in samples[::max(len(samples) // num_looked_at, 1)]:
        try:
            with Image.open(path) as image:
                modes.append(image.mode)
        except OSError:
            continue  # check_images names it
    return bool(modes) and all(mode in ('1', 'L', 'LA', 'I', 'I;16') for mode in modes)


def check_labels(train, validation, num_classes: int) -> None:
    """Refuse labels the model cannot produce, and classes missing in validation.

    Args:
        train: Training data set, or None.
        validation: Validation data set, or None.
        num_classes: Number of classes of the model.

    Raises:
        InputError: Naming the classes.
    """
    labels = {name: dataset_labels(d) for name, d in (('training', train), ('validation', validation)) if d is not None}
    for name, own in labels.items():
        if own is not None and own.max() >= num_classes:
            raise InputError(
                f'--num-classes {num_classes}: the {name} data has {own.max() + 1} classes, '
                f'pass --num-classes {own.max() + 1}')
    if train is None or validation is None:
        return
    maps = [getattr(getattr(d, 'reader', None), 'class_to_idx', None) for d in (train, validation)]
    if None not in maps and maps[0] != maps[1]:
        missing, extra = sorted(set(maps[0]) - set(maps[1])), sorted(set(maps[1]) - set(maps[0]))
        what = f'lacks class {missing[0]!r}' if missing else f'has class {extra[0]!r} that training lacks'
        raise InputError(
            f'--val-split: validation {what} ({len(maps[0])} classes in training, {len(maps[1])} in validation), '
            'so class indices would not match: give both the same class folders, or pass --class-map')
    if labels.get('training') is not None and labels.get('validation') is not None:
        missing = np.setdiff1d(labels['training'], labels['validation'])
        if len(missing):
            raise InputError(
                f'--val-split: validation has no image of class {missing[0]}, give it images of every class')


def check_images(dataset, indices: Optional[Sequence[int]] = None) -> None:
    """Open every image file of a folder and read its header.

    timm puts a neighbour's image and label in the place of one it cannot read. That is no use in an evaluation, so
    broken files are found first. Folders of more than 100,000 files are left to timm.

    Args:
        dataset: A timm data set.
        indices: The images that count, all by default.

    Raises:
        InputError: Naming the first file that cannot be read.
    """
    samples = _samples(dataset)
    if samples is None:
        return
    paths = [samples[i][0] for i in (range(len(samples)) if indices is None else indices)]
    if len(paths) > _MAX_CHECKED_FILES:
        return

    def broken(path: str) -> Optional[str]:
        try:
            with Image.open(path) as image:
                # a header can be whole over missing pixels; small files are read to the end
                image.load() if image.size[0] * image.size[1] <= 64 * 64 else image.verify()
        except (OSError, SyntaxError, ValueError) as error:
            return f'{path} ({type(error).__name__})'
        return None

    with ThreadPoolExecutor() as pool:
        for found in pool.map(broken, paths, chunksize=256):
            if found:
                raise InputError(f'--data-dir: unreadable image {found}: mend or delete the file')
