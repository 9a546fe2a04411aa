"""The images that a network is evaluated on: opened, selected, checked by decoding, and loaded with their labels."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import Dataset, IterableDataset, Subset

from ..data import (
    balanced_indices,
    check_classes,
    check_distinct,
    check_images,
    check_split,
    class_names,
    conflicting_labels,
    dataset_labels,
    image_channels,
    is_grey,
    listed_indices,
)
from ..errors import InputError, check_at_least
from ..settings import check_types, setting
from .network import Network, Preprocessing, check_batch_size

__all__ = [
    'DatasetConfig',
    'Images',
    'ImagesConfig',
    'choose_images',
    'open_dataset',
    'open_images',
    'pixel_loader',
    'split_of',
]

_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_TORCH_SPLITS = (
    'train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test',
    'testing')  # all but the first two mean test
_TORCH_BASIC = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Source of the data, named as in timm's scripts."""
    data_dir: Optional[str] = setting(None, 'path to dataset (root dir)', metavar='DIR', group='Dataset parameters')
    dataset: str = setting(
        '', 'dataset type + name ("<type>/<name>", e.g. torch/cifar10) (default: ImageFolder)', metavar='NAME')
    dataset_download: bool = setting(False, 'download torch/ and tfds/ datasets')
    class_map: str = setting('', 'path to class to idx mapping file', metavar='FILENAME')
    input_img_mode: Optional[str] = setting(None, 'image conversion mode (default: RGB, L for 1 channel)')
    input_key: Optional[str] = setting(None, 'dataset key for input images')
    target_key: Optional[str] = setting(None, 'dataset key for target labels')
    dataset_trust_remote_code: bool = setting(False, 'allow a huggingface dataset to run code from its repo')
    workers: int = setting(4, 'data loading processes', short='-j', metavar='N')
    pin_mem: bool = setting(False, 'pin CPU memory in the loader')

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least('workers', self.workers, 0)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DatasetConfig):
    """Images to evaluate on."""
    split: str = setting('validation', 'split', metavar='NAME')
    num_examples: Optional[int] = setting(
        None, 'number of images of the subset to evaluate (default: all)', metavar='N')
    subset: str = setting(
        'balanced', 'balanced (seeded, equally many per class), robustbench (its ImageNet images, if that package '
        'is installed) or a file of image names', metavar='NAME')
    batch_size: int = setting(128, 'batch size', short='-b', metavar='N')
    allow_class_mismatch: bool = setting(
        False, 'evaluate even if the classes of data and network differ; the report says so')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('batch_size', self.batch_size)
        if self.num_examples is not None:
            check_at_least('num_examples', self.num_examples)


def _check_torch_split(dataset: str, split: str) -> None:
    kind, _, name = dataset.partition('/')
    if kind.lower() == 'torch' and name.lower() in _TORCH_BASIC and split not in _TORCH_SPLITS:
        raise InputError(f'{dataset} has no such split', 'choose train or test', argument='split', value=split)


def open_dataset(
        config: DatasetConfig,
        split: str,
        in_chans: int,
        *,
        is_training: bool = False,
        batch_size: int = 1,
        seed: int = 0,
        **kwargs: Any,
) -> Dataset:
    """Call `timm.data.create_dataset`, but refuse mistakes that timm would silently work around.

    Args:
        config: Source of the data.
        split: Name of the split.
        in_chans: Channels of the network.
        is_training: Whether the data is for training.
        batch_size: Batch size, for streaming data.
        seed: Seed, for streaming data.
        **kwargs: Further arguments of `create_dataset`.

    Raises:
        InputError: If the data cannot be opened, has no such split, or its channels do not fit.
    """
    where = ' '.join(filter(None, (config.data_dir, config.dataset))) or 'no data'
    argument = 'dataset' if config.dataset and not config.data_dir else 'data_dir'

    def wrong(problem: str, remedy: str, argument: str = argument, value: Any = where) -> InputError:
        return InputError(problem, remedy, argument=argument, value=value)

    _check_torch_split(config.dataset, split)
    if config.dataset and config.dataset.partition('/')[0].lower() not in _PREFIXES:
        raise wrong('has no type that timm knows', f"begin it with {'/, '.join(_PREFIXES)}/, or leave it out for a "
                    'folder of images', 'dataset', config.dataset)
    mode = config.input_img_mode or ('RGB' if in_chans == 3 else 'L')
    try:
        bands = Image.getmodebands(mode)
    except KeyError as error:
        raise wrong('is no mode of PIL', 'for example RGB or L', 'input_img_mode', mode) from error
    if bands != in_chans:
        raise wrong(f'the network has {in_chans} channel(s), but {mode} images have {bands}',
                    'choose a mode with as many', 'input_img_mode', mode)
    if not config.dataset and (Path(split).name != split or split == '..'):
        raise wrong('leads out of the data folder', 'give the name of a folder inside it', 'split', split)
    create: Any = create_dataset  # its type hints are narrower than what it accepts
    try:
        dataset = create(
            config.dataset,
            root=config.data_dir,
            split=split,
            is_training=is_training,
            class_map=config.class_map,
            download=config.dataset_download,
            batch_size=batch_size,
            seed=seed,
            input_img_mode=mode,
            input_key=config.input_key,
            target_key=config.target_key,
            trust_remote_code=config.dataset_trust_remote_code,
            **kwargs,
        )
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError, KeyError, ImportError) as error:
        reason = ' '.join(str(error).split()).split('. Supported image extensions')[0]
        raise wrong(
            f'no {split!r} data ({reason or type(error).__name__})',
            'give a folder with one sub-folder of images per class, or a data set name as `dataset`') from error
    check_split(dataset, split)
    if hasattr(dataset, '_max_retries'):
        dataset._max_retries = 1  # or timm would replace an unreadable image by a neighbour and its label
    channels = None if isinstance(dataset, IterableDataset) else image_channels(dataset)
    if channels is not None and channels != in_chans:
        raise wrong(
            f'the images of {where} have {channels} channel(s)', f'pass `in_chans={channels}`', 'in_chans', in_chans)
    if in_chans == 3 and not config.input_img_mode and is_grey(dataset):
        raise wrong(
            f'the images of {where} are grey',
            "pass `in_chans=1`, or `input_img_mode='RGB'` to let attacks change the three equal channels independently",
            'in_chans', in_chans)
    return dataset


def split_of(dataset: Any, config: ImagesConfig) -> Optional[str]:
    """The split that was read; None for a folder of classes, which timm reads whatever the split."""
    root = getattr(getattr(dataset, 'reader', None), 'root', None)
    whole = not config.dataset and root and config.data_dir and Path(root) == Path(config.data_dir)
    return None if whole else config.split


class _CheckedLoader:
    """A loader that checks its labels against the labels of the data set."""

    def __init__(self, loader: Any, labels: Optional[Sequence[int]]):
        self.loader, self.labels = loader, labels

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        done, batches = 0, iter(self.loader)
        while True:
            with torch.random.fork_rng(devices=[]):  # the loader draws a seed for its workers
                batch = next(batches, None)
            if batch is None:
                return
            x, y = batch
            if self.labels is not None and y.tolist() != list(self.labels[done:done + len(y)]):
                raise InputError(
                    f'the loader delivers wrong labels for images {done} to {done + len(y) - 1} of this evaluation: a '
                    'file has changed or become unreadable', argument='data_dir')
            done += len(y)
            yield x, y


def pixel_loader(
        dataset: Any,
        indices: Sequence[int],
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        batch_size: int,
        workers: int = 0,
        pin_mem: bool = False,
) -> _CheckedLoader:
    """Batches of pixels in [0, 1] and labels, for some images of a data set; sets the data set's `transform`."""
    subset: Any = Subset(dataset, list(indices))
    channels = preprocessing['input_size'][0]
    loader = create_loader(
        subset,
        input_size=preprocessing['input_size'],
        batch_size=batch_size,
        interpolation=preprocessing['interpolation'],
        crop_pct=preprocessing['crop_pct'],
        crop_mode=preprocessing['crop_mode'],
        mean=(0.,) * channels,
        std=(1.,) * channels,
        num_workers=workers,
        pin_memory=pin_mem,
        device=device,
        persistent_workers=False,
    )
    # timm sets the transform on the subset, which does not apply it
    dataset.transform = subset.transform
    labels = dataset_labels(dataset)
    return _CheckedLoader(loader, None if labels is None else labels[list(indices)].tolist())


@dataclass
class Images:
    """Images to evaluate on.

    Attributes:
        dataset: The data set.
        indices: The chosen images.
        hashes: Hash of each image as stored.
        preprocessing: timm's data config.
        device: Device of the batches.
        config: Settings of selection and loading.
        class_names: Names of the classes by index, if the data set knows them.
        mismatch: How the classes of data and network differ, and images with two labels; '' if neither.
    """
    dataset: Any
    indices: List[int]
    hashes: List[str]
    preprocessing: Preprocessing
    device: torch.device
    config: ImagesConfig
    class_names: Optional[List[str]] = None
    mismatch: str = ''

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def split(self) -> Optional[str]:
        """The split that was read; None for a folder of classes without splits."""
        return split_of(self.dataset, self.config)

    def loader(self, positions: Optional[Sequence[int]] = None) -> _CheckedLoader:
        """Batches of pixels in [0, 1] and labels, for all chosen images or for those at some positions."""
        indices = self.indices if positions is None else [self.indices[i] for i in positions]
        return pixel_loader(
            self.dataset, indices, self.preprocessing, self.device, batch_size=self.config.batch_size,
            workers=self.config.workers, pin_mem=self.config.pin_mem)

    def first(self, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """The first chosen images and their labels, as tensors on the device."""
        batches = [
            (x.to(self.device), y.to(self.device)) for x, y in self.loader(range(min(count, len(self.indices))))]
        x, y = zip(*batches)
        return torch.cat(x), torch.cat(y)


def choose_images(
        dataset: Any,
        config: ImagesConfig,
        network: Network,
        *,
        seed: int = 0,
        usual_examples: Optional[int] = None,
) -> Images:
    """Choose images of a data set for a network, and check each of them.

    Args:
        dataset: A data set with an index.
        config: Settings of the selection.
        network: The network.
        seed: Seed of the selection.
        usual_examples: Number of images if the config does not set it, at most all; None for all.

    Raises:
        InputError: If the classes do not match the network, or an image cannot be decoded.
    """
    check_batch_size(network.model, config.batch_size)
    names = class_names(dataset)
    mismatch = check_classes(
        dataset, network.num_classes, network.class_names(names), allow_mismatch=config.allow_class_mismatch)
    count = config.num_examples
    if count is None and usual_examples is not None:
        count = min(usual_examples, len(dataset))
    if config.subset == 'balanced':
        indices = balanced_indices(dataset_labels(dataset), len(dataset), count, seed)
    else:
        indices = listed_indices(dataset, config.subset, count)
    check_distinct(dataset, indices)
    hashes = check_images(dataset, indices)
    mismatch = '; '.join(filter(None, (mismatch, conflicting_labels(dataset, indices, hashes))))
    return Images(
        dataset, indices, hashes, network.preprocessing, network.device, config, names, mismatch)


def open_images(
        config: ImagesConfig,
        network: Network,
        *,
        seed: int = 0,
        usual_examples: Optional[int] = None,
) -> Images:
    """Open a data set and choose images for a network.

    Args:
        config: The data and the selection.
        network: The network.
        seed: Seed of the selection.
        usual_examples: See `choose_images`.

    Raises:
        InputError: If the data cannot be opened, its classes do not match the network, or an image cannot be decoded.
    """
    dataset = open_dataset(
        config, config.split, network.preprocessing['input_size'][0], batch_size=config.batch_size, seed=seed)
    if isinstance(dataset, IterableDataset):
        raise InputError('streaming data has no index', 'use a data set with one', argument='dataset',
                         value=config.dataset)
    return choose_images(dataset, config, network, seed=seed, usual_examples=usual_examples)
