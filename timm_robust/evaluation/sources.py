"""Opens the images to evaluate on: a folder, a named data set, a data set object or tensors."""
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from ..attacks import check_batch, check_images
from ..data import (
    balanced_indices,
    check_classes,
    class_names,
    dataset_labels,
    listed_indices,
    whole_datasets,
)
from ..errors import InputError
from ..inputs import (
    Images,
    ImagesConfig,
    check_batch_size,
    open_images,
    pixel_loader,
)
from .accuracy import Batches
from .facts import DataFacts
from .journal import image_hashes
from .subject import Subject

__all__ = ['DataSource', 'Source', 'open_data']

DataSource = Union[str, Path, ImagesConfig, Tuple[torch.Tensor, Any], Dataset, torch.Tensor]

_logger = logging.getLogger(__name__)

_PROBED = 8
_NAMED_DATA = re.compile(r'(torch|tfds|hfds|hfids|wds)/')


class Source:
    """Images to evaluate on.

    Attributes:
        indices: Data set indices of the chosen images.
        facts: Facts about the data, for the report; without indices and labels.
        batch_size: Batch size.
        in_memory: Whether the images are tensors.
        resizes: Whether pictures are resized and cropped as the network expects.
    """
    indices: List[int]
    facts: DataFacts
    batch_size: int
    in_memory = False
    resizes = False

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        """Batches of pixels in [0, 1] and labels, for all chosen images or those at `positions`."""
        raise NotImplementedError

    def first(self, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """The first chosen images and their labels."""
        x, y = zip(*self.loader(range(min(count, len(self.indices)))))
        return torch.cat(x), torch.cat(y)

    def fingerprint(self) -> Tuple[Any, ...]:
        """Equal for the same choice of the same data: facts, indices, and hashes of images (in memory, of all)."""
        x, y = self.first(len(self.indices) if self.in_memory else _PROBED)
        return replace(self.facts, data_dir=''), self.indices, image_hashes(x.cpu(), y.cpu())


class _NamedSource(Source):
    """Images of a folder or named data set."""
    resizes = True

    def __init__(self, images: Images):
        self.images, self.indices, self.batch_size = images, images.indices, images.config.batch_size
        config = images.config
        names, labels = images.class_names, dataset_labels(images.dataset)
        self.facts = DataFacts(
            dataset=config.dataset or 'ImageFolder', data_dir=config.data_dir, split=images.split,
            subset=_subset_name(config, labels), num_images=len(images.dataset), class_sizes=_class_sizes(labels),
            class_names=tuple(names) if names else None, mismatch=images.mismatch)

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        return self.images.loader(positions)


class _TensorSource(Source):
    """Images in memory."""
    in_memory = True

    def __init__(self, x: torch.Tensor, y: Any, config: ImagesConfig, seed: int):
        check_images(x)
        if not len(x):
            raise InputError('holds no images', argument='data')
        self.x, self.y = x.detach().float(), check_batch(x, y).labels
        labels = self.y.cpu().numpy()
        self.indices = _choose(len(x), labels, config, seed)
        self.batch_size = config.batch_size
        self.facts = DataFacts(
            dataset='tensors', subset='' if _takes_all(config) else _subset_name(config, labels), num_images=len(x),
            class_sizes=_class_sizes(labels))

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        rows = self.indices if positions is None else [self.indices[i] for i in positions]
        for part in torch.tensor(rows, device=self.x.device).split(self.batch_size):
            yield self.x[part], self.y[part]


class _Pictures(Dataset):
    """A data set of pictures under a transform that `pixel_loader` sets."""

    def __init__(self, dataset: Any):
        self.dataset, self.targets = dataset, dataset_labels(dataset)
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        picture, label = self.dataset[index]
        return (self.transform(picture) if self.transform else picture), int(label)


class _DatasetSource(Source):
    """Images of a data set object: tensors in [0, 1], or pictures, which are preprocessed as the network expects."""

    def __init__(self, dataset: Any, config: ImagesConfig, seed: int, subject: Subject):
        self.dataset, self.config, self.device = dataset, config, subject.device
        self.preprocessing = None
        if isinstance(_first_pair(dataset)[0], Image.Image):
            if subject.preprocessing is None:
                raise InputError(
                    'holds pictures, but the model is not a timm model with known preprocessing',
                    'give the data set a transform that returns tensors in [0, 1]', argument='data')
            self.preprocessing, self.dataset = subject.preprocessing, _Pictures(dataset)
            self.resizes = True
        labels = dataset_labels(dataset)
        if config.subset == 'balanced':
            self.indices = _choose(len(dataset), labels, config, seed)
        else:
            self.indices = listed_indices(dataset, config.subset, config.num_examples)
        self.batch_size = config.batch_size
        names, network = class_names(dataset), subject.network
        mismatch = '' if network is None else '; '.join(filter(None, dict.fromkeys(check_classes(
            part, network.num_classes, network.class_names(class_names(part)),
            allow_mismatch=config.allow_class_mismatch, argument='data') for part in whole_datasets(dataset))))
        self.facts = DataFacts(
            dataset=type(dataset).__name__, subset='' if _takes_all(config) else _subset_name(config, labels),
            num_images=len(dataset), class_sizes=_class_sizes(labels),
            class_names=tuple(names) if names else None, mismatch=mismatch)

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        indices = self.indices if positions is None else [self.indices[i] for i in positions]
        if self.preprocessing is not None:
            return pixel_loader(
                self.dataset, indices, self.preprocessing, self.device, batch_size=self.batch_size,
                workers=self.config.workers, pin_mem=self.config.pin_mem)
        return self._tensors(indices)

    def _tensors(self, indices: List[int]) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for x, y in DataLoader(
                Subset(self.dataset, indices), batch_size=self.batch_size, num_workers=self.config.workers,
                generator=torch.Generator('cpu')):  # otherwise worker seeds would come from the caller's generator
            check_images(x)
            yield x.float(), torch.as_tensor(y, device='cpu')


def _first_pair(dataset: Any) -> Tuple[Any, Any]:
    """The first image of a data set object and its label; `InputError` if it does not return such pairs."""
    try:
        image, label = dataset[0]
        index = torch.as_tensor(label)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError('does not return pairs of an image and its class index', argument='data') from error
    if index.is_floating_point() or index.ndim:
        raise InputError(f'returns {label!r} as a label', 'a class index must be a whole number', argument='data')
    return image, label


def _subset_name(config: ImagesConfig, labels: Optional[np.ndarray]) -> str:
    """How images were chosen; 'random' if classes could not be balanced."""
    return 'random' if config.subset == 'balanced' and labels is None else config.subset


def _takes_all(config: ImagesConfig) -> bool:
    """Whether all images of a data set in memory are taken, in their order."""
    return config.subset == 'balanced' and config.num_examples is None


def _class_sizes(labels: Optional[np.ndarray]) -> Tuple[int, ...]:
    """The number of images of each class that occurs; empty if no labels are known."""
    return () if labels is None else tuple(np.unique(labels, return_counts=True)[1].tolist())


def _choose(size: int, labels: Any, config: ImagesConfig, seed: int) -> List[int]:
    """Indices of all images in their order, or of a class-balanced subset."""
    if config.num_examples is None:
        return list(range(size))
    return balanced_indices(labels, size, config.num_examples, seed)


def open_data(
        data: DataSource,
        subject: Subject,
        *,
        seed: int = 0,
        usual_examples: Optional[int] = None,
        **settings: Any,
) -> Source:
    """Open the images that a caller passed as `data`.

    Args:
        data: A folder or the name of a timm data set, an `ImagesConfig`, a pair of images (N, C, H, W) in [0, 1] and
            labels (N,), or a data set of pictures or of such tensors.
        subject: The network to evaluate.
        seed: Seed of the image subset.
        usual_examples: Default number of images of a folder or named data set; at most all of them are used.
        **settings: Fields of `ImagesConfig`, unless `data` is one.

    Raises:
        InputError: If the data cannot be opened or does not fit the network.
    """
    if isinstance(data, (str, Path)):
        named = _NAMED_DATA.match(str(data)) is not None and not Path(data).exists()
        where: Any = {'dataset' if named else 'data_dir': str(data)}
        data = ImagesConfig(**where, **settings)
    if isinstance(data, ImagesConfig):
        if subject.network is None:
            raise InputError(
                'the model is not a timm model with known preprocessing', 'pass (images, labels), or a data set with a '
                'transform that returns tensors in [0, 1]', argument='data')
        return _NamedSource(open_images(data, subject.network, seed=seed, usual_examples=usual_examples))
    if isinstance(data, (torch.Tensor, np.ndarray)):
        raise InputError('are missing', 'pass the class of each image', argument='labels')
    in_memory = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], (torch.Tensor, np.ndarray))
    for name in ('split', 'subset', 'allow_class_mismatch') if in_memory else ('split',):
        if name in settings:
            raise InputError('applies only to data given by name', 'remove it', argument=name, value=settings[name])
    config = ImagesConfig(**settings)
    check_batch_size(subject.model, config.batch_size)
    if in_memory:
        images = data[0] if isinstance(data[0], torch.Tensor) else torch.as_tensor(data[0], device='cpu')
        return _TensorSource(images, data[1], config, seed)
    if hasattr(data, '__getitem__') and hasattr(data, '__len__') and not isinstance(data, tuple):
        if not len(data):
            raise InputError('holds no images', argument='data')
        return _DatasetSource(data, config, seed, subject)
    raise InputError(
        f'is {type(data).__name__}', 'pass (images, labels), an indexable data set (for a loader, its data set), a '
        'folder or the name of a timm data set', argument='data')
