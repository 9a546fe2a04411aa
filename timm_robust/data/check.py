"""Check a data set before a long run: its splits, its classes, and every image that is used."""
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from ..errors import InputError

__all__ = [
    'check_classes',
    'check_distinct',
    'check_images',
    'check_labels',
    'check_split',
    'class_names',
    'dataset_labels',
    'dataset_size',
    'image_channels',
    'is_grey',
    'whole_datasets',
]

_MAX_CHECKED_FILES = 100_000
# modes that Pillow converts to 8-bit RGB or grey without loss of range; I and F hold more and are clipped to white
_MODES = ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'HSV')
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test', 'testing')


def _samples(dataset: Any) -> Optional[List[Tuple[str, int]]]:
    """(path, label) pairs of a data set that reads a folder, else None (samples of archives look different)."""
    samples = getattr(getattr(dataset, 'reader', dataset), 'samples', None)
    first = samples[0] if isinstance(samples, list) and samples else None
    return samples if isinstance(first, tuple) and isinstance(first[0], str) else None


def _root(dataset: Any) -> str:
    """The folder whose sub-folders are the classes."""
    return str(getattr(dataset, 'reader', dataset).root)


def dataset_size(dataset: Any) -> Optional[int]:
    """Number of images, None for streaming data, which has no index."""
    return None if isinstance(dataset, IterableDataset) else len(dataset)


def dataset_labels(dataset: Any) -> Optional[np.ndarray]:
    """Class index of every image, shape (N,), or None if it is only known by reading the images."""
    if isinstance(dataset, Subset):
        inside = dataset_labels(dataset.dataset)
        return None if inside is None else inside[list(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        found = [labels for labels in map(dataset_labels, dataset.datasets) if labels is not None]
        return np.concatenate(found) if len(found) == len(dataset.datasets) else None
    samples = _samples(dataset)
    labels = [s[1] for s in samples] if samples else getattr(dataset, 'targets', None)
    if labels is None:
        labels = getattr(getattr(dataset, 'reader', None), 'targets', None)  # timm's reader of archives
    return None if labels is None else np.asarray(labels, dtype=np.int64)


def whole_datasets(dataset: Any) -> List[Any]:
    """The data sets behind torch's subsets and concatenations."""
    if isinstance(dataset, Subset):
        return whole_datasets(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [whole for part in dataset.datasets for whole in whole_datasets(part)]
    return [dataset]


def class_names(dataset: Any) -> Optional[List[str]]:
    """Names of the classes by index, if the data set, or the first of several, knows them."""
    dataset = whole_datasets(dataset)[0]
    reader = getattr(dataset, 'reader', None)
    index = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    if isinstance(index, dict) and index:
        names = {i: name for name, i in index.items() if isinstance(i, int) and isinstance(name, str)}
        return [names.get(i, '') for i in range(max(names) + 1)] if names else None
    classes = getattr(dataset, 'classes', None)
    return [str(c) for c in classes] if classes else None


def image_channels(dataset: Any) -> Optional[int]:
    """Channels of the images, or None if the data set converts them to the requested mode."""
    if getattr(dataset, 'input_img_mode', None):
        return None
    image = dataset[0][0]
    return len(image.getbands()) if isinstance(image, Image.Image) else image.shape[0]


def is_grey(dataset: Any, num_looked_at: int = 16) -> bool:
    """Whether a folder holds grey images, judging by a sample spread over it."""
    samples = _samples(dataset)
    if not samples:
        return False
    modes = []
    for path, _ in samples[::max(len(samples) // num_looked_at, 1)]:
        try:
            if os.path.isfile(path):
                with Image.open(path) as image:
                    modes.append(image.mode)
        except (OSError, Image.DecompressionBombError):
            continue  # check_images will report it
    return bool(modes) and all(mode in ('1', 'L', 'LA') for mode in modes)


def check_split(dataset: Any, split: str) -> None:
    """Refuse a missing split, for which timm would read all the other splits together.

    Args:
        dataset: A timm data set.
        split: The requested name.

    Raises:
        InputError: Naming the splits that exist.
    """
    samples = _samples(dataset)
    if not samples:
        return
    root = Path(_root(dataset))
    first: Dict[str, str] = {}
    for path, _ in samples:
        parts = Path(path).relative_to(root).parts
        if len(parts) < 3:
            continue
        # a class in two places, or below a folder named like a split
        if first.setdefault(parts[-2], parts[0]) != parts[0] or parts[0].lower() in _SPLITS:
            found = ', '.join(sorted(p.name for p in root.iterdir() if p.is_dir())[:6])
            raise InputError(f'{root} has no such folder', f'choose one of {found}', argument='split', value=split)


def _empty_class(dataset: Any, names: Sequence[str]) -> str:
    """A class folder without images; timm skips it, which shifts the index of every later class."""
    root, kinds = _root(dataset), get_img_extensions(as_set=True)
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(d for d in inside if not d.startswith(('.', '__')))
        parts = Path(folder).relative_to(root).parts
        if parts and not inside and not set(parts) & set(names) and not any(
                os.path.splitext(f)[1].lower() in kinds for f in files):
            return folder
    return ''


def _compare(dataset: Any, num_classes: int, names: Optional[Sequence[str]]) -> Tuple[str, str]:
    """How the classes of a data set and a network differ, and the remedy; two empty texts if they match."""
    own, labels, samples = class_names(dataset), dataset_labels(dataset), _samples(dataset)
    mapping = 'give the same class folders, or the index of each class in `class_map`'
    if samples and own is not None:
        empty = _empty_class(dataset, own)
        if empty:
            kinds = ', '.join(get_img_extensions())
            return f'the class folder {empty} has no readable images ({kinds})', 'fill it or remove it'
    if own is not None and len(own) != num_classes:
        return f'the data has {len(own)} classes, but the network has {num_classes}', mapping
    if own is not None and names is not None:
        differ = next((i for i, (a, b) in enumerate(zip(own, names)) if a != b), None)
        if differ is not None:
            return f'class {differ} of the data is {own[differ]!r}, but {names[differ]!r} in the network', mapping
    missing = np.setdiff1d(np.arange(num_classes), labels) if labels is not None else np.empty(0, int)
    if len(missing):
        name = repr(own[missing[0]]) if own else missing[0]
        more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        return f'the data has no images of class {name}{more}', 'add them'
    return '', ''


def check_classes(
        dataset: Any,
        num_classes: int,
        names: Optional[Sequence[str]] = None,
        *,
        allow_mismatch: Optional[bool] = None,
        argument: str = 'data_dir',
) -> str:
    """Compare the classes of a data set with those of a network, by number and, if both have names, by name.

    Args:
        dataset: A data set.
        num_classes: Classes of the network.
        names: Their names, if known.
        allow_mismatch: Return what differs instead of refusing; a label the network does not have is always refused.
            None if the caller has no such option.
        argument: Name of the data in errors.

    Returns:
        What differs, or ''.

    Raises:
        InputError: Naming the first class that differs.
    """
    labels, samples = dataset_labels(dataset), _samples(dataset)
    if samples and any(os.path.dirname(path) == _root(dataset) for path, _ in samples):
        raise InputError(
            f'{_root(dataset)} holds images directly', 'give its parent, with one folder for each class',
            argument=argument)
    if labels is not None and len(labels) and labels.min() < 0:
        raise InputError(f'the data has the label {labels.min()}', 'give each image the index of a class',
                         argument=argument)
    problem, remedy = _compare(dataset, num_classes, names)
    if labels is not None and len(labels) and labels.max() >= num_classes:
        raise InputError(problem or f'the data has {labels.max() + 1} classes, but the network has {num_classes}',
                         remedy or 'choose a network with that many', argument=argument)
    if problem and not allow_mismatch:
        choice = ', or pass `allow_class_mismatch`' if allow_mismatch is False else ''
        raise InputError(problem, remedy + choice, argument=argument)
    return problem


def check_labels(train: Any, validation: Any, num_classes: int) -> None:
    """Check that training and validation data have the same classes, as many as the network, in separate folders.

    Args:
        train: Training data set.
        validation: Validation data set, or None.
        num_classes: Number of classes of the model.

    Raises:
        InputError: Naming the classes.
    """
    labels, own = dataset_labels(train), class_names(train)
    count = len(own) if own is not None else None if labels is None else int(labels.max()) + 1
    if count not in (None, num_classes):
        raise InputError(
            f'the training data has {count} classes', f'pass `num_classes={count}`',
            argument='num_classes', value=num_classes)
    check_classes(train, num_classes)
    if validation is None:
        return
    theirs = class_names(validation)
    if own is not None and theirs is not None and own != theirs:
        missing, extra = sorted(set(own) - set(theirs)), sorted(set(theirs) - set(own))
        what = f'lacks class {missing[0]!r}' if missing else (
            f'has class {extra[0]!r} that training lacks' if extra else 'has its classes in a different order')
        raise InputError(
            f'validation {what} ({len(own)} classes in training, {len(theirs)} in validation), so class indices '
            'would not match', 'give both the same class folders, or pass `class_map`', argument='val_split')
    check_classes(validation, num_classes, argument='val_split')
    roots = [os.path.realpath(_root(d)) if _samples(d) else None for d in (train, validation)]
    if roots[0] is not None and roots[0] == roots[1]:
        raise InputError(
            f'{roots[0]} would be both training and validation data',
            "give a folder for each split, or `val_split=''` to train without validation", argument='val_split')


def _name(dataset: Any, index: int) -> str:
    samples = _samples(dataset)
    if samples:
        return samples[index][0]
    return dataset.filename(index) if hasattr(dataset, 'filename') else f'number {index}'


def _stored(dataset: Any, index: int) -> Any:
    """An image as stored: the bytes of its file, or the item of a data set without files."""
    samples = _samples(dataset)
    if samples:
        path = samples[index][0]
        if not os.path.isfile(path):  # opening a pipe would wait for a writer
            raise OSError('is not a file')
        return Path(path).read_bytes()
    if isinstance(dataset, ImageDataset):
        return dataset.reader[index][0].read()
    return dataset[index][0]


def _digest(image: Any) -> str:
    """Hash of an image; a file is also decoded completely."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            if opened.mode not in _MODES:
                raise InputError(
                    f'has mode {opened.mode}, not 8-bit RGB or grey', 'convert it to 8 bits per channel')
            opened.load()
        return hashlib.sha256(image).hexdigest()
    array = image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    return hashlib.sha256(f'{array.dtype} {array.shape}'.encode() + array.tobytes()).hexdigest()


def check_distinct(dataset: Any, indices: Sequence[int]) -> None:
    """Refuse a folder in which links repeat files: an evaluation would count them twice.

    Raises:
        InputError: Naming the second path of the first such file.
    """
    samples, seen = _samples(dataset), set()
    for path in [samples[i][0] for i in indices] if samples else []:
        real = os.path.realpath(path)
        if real in seen:
            raise InputError(f'{path} is the same file as another image', 'remove the link', argument='data_dir')
        seen.add(real)


def conflicting_labels(dataset: Any, indices: Sequence[int], hashes: Sequence[str]) -> str:
    """Describe images that occur under two labels, one of which is counted as wrong; '' if there are none.

    Args:
        dataset: A data set.
        indices: The images that are used.
        hashes: Hash of each, from `check_images`.
    """
    labels, first = dataset_labels(dataset), dict(zip(reversed(hashes), reversed(indices)))
    pairs = [(first[digest], i) for i, digest in zip(indices, hashes)]
    found = [(a, b) for a, b in pairs if labels is not None and labels[a] != labels[b]]
    if not found:
        return ''
    a, b = (_name(dataset, i) for i in found[0])
    return f'{len(found)} images also occur under another label, such as {a} as {b}: one of them is counted as wrong'


def _unchanged(image: Any) -> Any:
    return image


def check_images(dataset: Any, indices: Optional[Sequence[int]] = None) -> List[str]:
    """Decode images completely, and hash them.

    timm replaces an image it cannot read by a neighbouring image and its label. That would falsify an evaluation, so
    broken files are found first.

    Args:
        dataset: A data set; its transform is ignored.
        indices: The images that are used. By default all are checked, or none if there are more than 100,000.

    Returns:
        Hash of each image as stored.

    Raises:
        InputError: Naming the first image that cannot be decoded or has more than 8 bits per channel.
    """
    if indices is None:
        indices = range(len(dataset)) if len(dataset) <= _MAX_CHECKED_FILES else []
    transform, single = getattr(dataset, 'transform', None), _samples(dataset) is None

    def look(index: int) -> str:
        try:
            return _digest(_stored(dataset, index))
        except InputError as error:
            raise InputError(f'image {_name(dataset, index)} {error.problem}', error.remedy, argument='data_dir'
                             ) from error
        except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
            raise InputError(f'unreadable image {_name(dataset, index)} ({type(error).__name__})',
                             'repair or delete the file', argument='data_dir') from error

    if transform is not None:
        dataset.transform = _unchanged
    try:
        # archives are read through one open file, which threads cannot share
        with ThreadPoolExecutor(1 if single else None) as pool:
            return list(pool.map(look, indices))
    finally:
        if transform is not None:
            dataset.transform = transform
