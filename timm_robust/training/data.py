"""Training and validation data, by timm's factories."""
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.transforms import RandomCrop

from ..data import balanced_indices, check_images, check_labels, class_names, dataset_labels, dataset_size
from ..errors import InputError
from ..inputs import Preprocessing, Process, open_dataset
from ..tasks.objective import mixes_images
from .config import TrainConfig

__all__ = [
    'Loader',
    'Loaders',
    'TrainingData',
    'average_batch_size',
    'classes_of_data',
    'create_loaders',
    'open_training_data',
    'set_loader_epoch',
]

Loader = Union[DataLoader, PrefetchLoader]  # timm returns either


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
        train: Training data set.
        validation: Validation data set, or None.
        class_names: Names of the classes by index, if the data set knows them.
        fingerprint: Hash of training images, labels and held-out indices; '' for streaming data and on all but the
            primary process.
    """
    train: Any
    validation: Any
    class_names: Optional[List[str]]
    fingerprint: str


@dataclass(frozen=True)
class Loaders:
    """The loaders of a run; `robust` and `validation` are None if they are not used.

    Attributes:
        mixup_fn: Mixup on the device, if the loader does not do it.
    """
    train: Loader
    validation: Optional[Loader]
    robust: Optional[Loader]
    mixup_fn: Optional[Mixup]


class _Part(Subset):
    """Some images of a data set, with the attributes that timm's loader and our checks need."""
    dataset: Any

    @property
    def transform(self) -> Any:
        """The transform of the data set, which timm's loader sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, value: Any) -> None:
        self.dataset.transform = value

    @property
    def targets(self) -> List[int]:
        """Class index of each image."""
        labels = dataset_labels(self.dataset)
        return [] if labels is None else labels[list(self.indices)].tolist()

    @property
    def classes(self) -> Optional[List[str]]:
        """Names of the classes."""
        return class_names(self.dataset)

    @property
    def input_img_mode(self) -> Optional[str]:
        """Mode the images are converted to."""
        return getattr(self.dataset, 'input_img_mode', None)

    def filename(self, index: int, **kwargs: Any) -> str:
        """File of an image."""
        return self.dataset.filename(self.indices[index], **kwargs)


def _split(config: TrainConfig, train: Dataset) -> Tuple[List[int], List[int]]:
    """Indices of the images to train on, and of the held-out images."""
    labels = None if isinstance(train, IterableDataset) else dataset_labels(train)
    if labels is None:
        raise InputError('needs a data set with an index and known labels',
                         'name a split in `val_split`', argument='val_fraction', value=config.val_fraction)
    count = max(round(config.val_fraction * len(labels)), 1)
    held = sorted(balanced_indices(labels, len(labels), count, seed=config.seed))
    if len(np.unique(labels[held])) < len(np.unique(labels)):
        raise InputError(f'holds out {len(held)} images, fewer than there are classes', 'choose more',
                         argument='val_fraction', value=config.val_fraction)
    return np.setdiff1d(np.arange(len(labels)), held).tolist(), held


def _fingerprint(train: Any, hashes: List[str], held: List[int]) -> str:
    labels = dataset_labels(train)
    images: Sequence[object] = hashes or (
        [train.filename(i) for i in range(len(train))] if hasattr(train, 'filename') else [len(train)])
    content = [images, None if labels is None else labels.tolist(), held]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def classes_of_data(config: TrainConfig, in_chans: int) -> Optional[int]:
    """The number of classes of the training data, if the data set knows it."""
    names = class_names(open_dataset(config, config.train_split, in_chans))
    return len(names) if names else None


def open_training_data(config: TrainConfig, in_chans: int, num_classes: int, process: Process) -> TrainingData:
    """Open and check the data of a run.

    Args:
        config: Settings of the run.
        in_chans: Channels of the network.
        num_classes: Classes of the network.
        process: Only the primary process checks the images.

    Raises:
        InputError: If there is no such data, an image is broken, or the data does not fit the network.
    """
    def opened(name: str, **kwargs: Any) -> Dataset:
        try:
            return open_dataset(
                config, getattr(config, name), in_chans, batch_size=config.batch_size, seed=config.seed, **kwargs)
        except InputError as error:
            raise error.renamed({'split': name}) from error

    whole = opened(
        'train_split', is_training=True, repeats=config.epoch_repeats, num_samples=config.train_num_samples)
    for name in ('epoch_repeats', 'train_num_samples'):
        value = getattr(config, name)
        if value and not isinstance(whole, IterableDataset):
            raise InputError('is only for streamed data sets', 'remove it', argument=name, value=value)
    hashes = check_images(whole) if process.primary and dataset_size(whole) is not None else []
    train: Dataset = whole
    validation: Optional[Dataset] = None
    held: List[int] = []
    if config.val_fraction:
        kept, held = _split(config, whole)
        train, validation = _Part(whole, kept), _Part(opened('train_split'), held)
    elif config.val_split:
        validation = opened('val_split', num_samples=config.val_num_samples)
        if config.val_num_samples and not isinstance(validation, IterableDataset):
            raise InputError('is only for streamed data sets', 'remove it', argument='val_num_samples',
                             value=config.val_num_samples)
    check_labels(train, validation, num_classes)
    if validation is not None and not held and process.primary and dataset_size(validation) is not None:
        check_images(validation)
    size = dataset_size(train)
    largest = max(config.train_batch_sizes or (config.batch_size,))
    if size is not None and size < largest * process.world_size:
        raise InputError(
            f'the training data has {size} images for {process.world_size} process(es)',
            f'choose at most {size // process.world_size}',
            argument='train_batch_sizes' if config.train_batch_sizes else 'batch_size', value=largest)
    fingerprint = _fingerprint(whole, hashes, held) if process.primary and size is not None else ''
    return TrainingData(train, validation, class_names(whole), fingerprint)


def _mixup(config: TrainConfig, num_classes: int) -> Optional[Mixup]:
    """Mixup on the device, or in the loader's collate function if it prefetches."""
    if not mixes_images(config):
        return None
    kind = Mixup if config.no_prefetcher else FastCollateMixup
    return kind(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def _check_crop_padding(config: TrainConfig, train: Any, size: Tuple[int, int]) -> None:
    """Refuse padded crops of streaming data and of images that do not have the network's size."""
    if isinstance(train, IterableDataset):
        raise InputError('needs a data set with an index; streaming data has none', argument='crop_padding',
                         value=config.crop_padding)
    image = train[0][0]
    found = image.size[::-1] if hasattr(image, 'getbands') else tuple(image.shape[-2:])
    if tuple(found) != tuple(size):
        raise InputError(
            f'needs images of the input size {size[0]}x{size[1]}, but these are {found[0]}x{found[1]}',
            'remove it', argument='crop_padding', value=config.crop_padding)


def create_loaders(
        config: TrainConfig,
        data: TrainingData,
        preprocessing: Preprocessing,
        process: Process,
        num_classes: int,
        img_dtype: torch.dtype = torch.float32,
) -> Loaders:
    """Loaders for training, validation and robust validation.

    Raises:
        InputError: On settings that do not fit the data or the processes.
    """
    create = partial(
        create_loader,
        input_size=preprocessing['input_size'],
        mean=preprocessing['mean'],
        std=preprocessing['std'],
        use_prefetcher=not config.no_prefetcher,
        pin_memory=config.pin_mem,
        img_dtype=img_dtype,
        device=process.device,
        distributed=process.distributed,
        num_workers=config.workers,
        # persistent workers carry random state across epochs, which resuming could not restore
        persistent_workers=False,
    )
    if config.aug_repeats and not process.distributed:
        raise InputError('needs several processes (torchrun)', 'remove it', argument='aug_repeats',
                         value=config.aug_repeats)
    if config.crop_padding:
        _check_crop_padding(config, data.train, preprocessing['input_size'][1:])
    if config.train_img_sizes and isinstance(data.train, IterableDataset):
        raise InputError('needs a data set with an index; streaming data has none', argument='train_img_sizes',
                         value=config.train_img_sizes)
    mixup = _mixup(config, num_classes)
    in_loader = mixup if isinstance(mixup, FastCollateMixup) else None
    mixup_fn = mixup if in_loader is None else None
    train_set = config.objective.prepare_dataset(data.train, preprocessing['input_size'][1:], config.hflip)
    train = create(
        train_set,
        batch_size=config.batch_size,
        is_training=True,
        no_aug=config.no_aug,
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        train_crop_mode=config.train_crop_mode,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        color_jitter_prob=config.color_jitter_prob,
        grayscale_prob=config.grayscale_prob or 0.,
        gaussian_blur_prob=config.gaussian_blur_prob or 0.,
        auto_augment=config.aa,
        num_aug_repeats=config.aug_repeats,  # type: ignore[arg-type]  # may be a fraction
        interpolation=preprocessing['interpolation'] if config.no_aug else config.train_interpolation,
        worker_seeding=config.worker_seeding,
        collate_fn=in_loader,
        input_size_choices=config.train_img_sizes,
        batch_size_choices=config.train_batch_sizes,
        batch_choice_weights=config.train_size_probs,
        batch_choice_seed=config.seed,
        batch_choice_schedule=config.train_size_schedule,
        batch_schedule_epochs=config.epochs if config.train_size_schedule == 'progressive' else None,
        batch_schedule_spread=config.train_size_schedule_spread,
        batch_schedule_random_mix=config.train_size_random_mix,
    )
    if config.crop_padding:
        # replace RandomResizedCrop, the first of timm's training transforms
        train_set.transform.transforms[0] = RandomCrop(preprocessing['input_size'][1:], padding=config.crop_padding)
    if data.validation is None:
        return Loaders(train, None, None, mixup_fn)
    evaluation = partial(
        create,
        batch_size=config.validation_batch_size or config.batch_size,
        is_training=False,
        interpolation=preprocessing['interpolation'],
        crop_pct=preprocessing['crop_pct'],
        crop_mode=preprocessing['crop_mode'],
    )
    # the robust subset needs the transform, which this call sets on the whole validation set
    validation = evaluation(data.validation)
    robust = evaluation(robust_subset(
        data.validation, config.robust_eval_samples, config.seed)) if config.robust_eval_steps else None
    return Loaders(train, validation, robust, mixup_fn)


def _batch_sampler(loader: Any) -> Any:
    return getattr(loader, 'loader', loader).batch_sampler  # behind timm's prefetcher


def average_batch_size(loader: Loader) -> float:
    """Images per batch, averaged over scheduled resolutions."""
    sampler = _batch_sampler(loader)
    return getattr(sampler, 'average_batch_size', None) or sampler.batch_size


def set_loader_epoch(loader: Loader, epoch: int) -> None:
    """Set the epoch on the data set and the samplers of a loader."""
    for part in (loader.dataset, loader.sampler, _batch_sampler(loader)):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)


def robust_subset(validation: Dataset, num_examples: int, seed: int) -> Subset:
    """The class-balanced images of robust validation.

    Args:
        validation: Validation data set.
        num_examples: Maximum number of images.
        seed: Seed of the selection.

    Raises:
        InputError: If the data is streamed.
    """
    size = dataset_size(validation)
    if size is None:
        raise InputError('needs a data set with an index; streaming data has none', argument='robust_eval_steps')
    return Subset(validation, balanced_indices(
        dataset_labels(validation), size, min(num_examples, size), seed=seed))
