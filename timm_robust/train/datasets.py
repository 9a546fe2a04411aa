"""Training and validation data from command line arguments, by timm's factories."""
import argparse
import dataclasses
import hashlib
import json
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup, create_loader
from torch.utils.data import IterableDataset, Subset
from torchvision.transforms import RandomCrop

from ..data import balanced_indices, check_images, check_labels, class_names, dataset_labels
from ..errors import InputError
from ..inputs import DatasetConfig, open_dataset

__all__ = ['create_datasets', 'create_loaders']


class Part(Subset):
    """Some images of a data set, behind what timm's loader and our checks ask a data set for."""

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
        return dataset_labels(self.dataset)[self.indices].tolist()

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


def _split_off(args: argparse.Namespace, train, twin) -> Tuple[Part, Part, str]:
    """Training data without its validation images, these from a twin of it, and a hash of which they are."""
    fraction = args.val_fraction
    labels = None if isinstance(train, IterableDataset) or args.epoch_repeats else dataset_labels(train)
    if labels is None:
        raise InputError('needs a data set with an index and known labels, whose images are read once an epoch',
                         'name a split in `val_split`', argument='val_fraction', value=fraction)
    check_images(train)
    held = sorted(balanced_indices(labels, len(labels), max(round(fraction * len(labels)), 1), seed=args.seed))
    kept = np.setdiff1d(np.arange(len(labels)), held).tolist()
    if len(np.unique(labels[held])) < len(np.unique(labels)):
        raise InputError(f'holds out {len(held)} images, fewer than there are classes', 'choose more',
                         argument='val_fraction', value=fraction)
    names = [train.filename(i) for i in held] if hasattr(train, 'filename') else held
    digest = hashlib.sha256(json.dumps([len(labels), names]).encode()).hexdigest()
    return Part(train, kept), Part(twin, held), f'{len(held)} {digest}'


def create_datasets(args: argparse.Namespace, in_chans: int, num_classes: int):
    """Training and validation data sets, checked (validation is None without --val-split)."""
    config = DatasetConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(DatasetConfig)})
    common = dict(in_chans=in_chans, batch_size=args.batch_size, seed=args.seed)
    train = open_dataset(
        config, args.train_split, is_training=True, repeats=args.epoch_repeats, num_samples=args.train_num_samples,
        **common)
    validation, args.val_images = None, ''
    if args.val_fraction:
        twin = open_dataset(config, args.train_split, **common)
        train, validation, args.val_images = _split_off(args, train, twin)
    elif args.val_split:
        validation = open_dataset(config, args.val_split, num_samples=args.val_num_samples, **common)
    check_labels(train, validation, num_classes)
    for dataset in filter(None, (train, validation)):
        check_images(dataset)
    if not isinstance(train, IterableDataset) and len(train) < args.batch_size * args.world_size:
        raise InputError(
            f'--batch-size {args.batch_size}: the training data has {len(train)} images for {args.world_size} '
            f'process(es), choose at most {len(train) // args.world_size}')
    return train, validation


def _check_crop_padding(args: argparse.Namespace, train, input_size: Sequence[int]) -> None:
    """Refuse a padded crop of streaming data and of images that are not of the network's size."""
    if isinstance(train, IterableDataset):
        raise InputError('needs a data set with an index, streaming data has none', argument='crop_padding')
    image = train[0][0]
    size = image.size[::-1] if hasattr(image, 'getbands') else tuple(image.shape[-2:])
    if tuple(size) != tuple(input_size[1:]):
        raise InputError(
            f'shifts images of the size of the network, {input_size[1]}x{input_size[2]}; these are '
            f'{size[0]}x{size[1]}', 'leave it out', argument='crop_padding', value=args.crop_padding)


def create_loaders(
        args: argparse.Namespace,
        train,
        validation,
        data_config: Dict[str, Any],
        device: torch.device,
        num_classes: int,
        img_dtype: torch.dtype = torch.float32,
):
    """Loaders for training, validation and robust validation, and the mixup function where no prefetcher does it."""
    common = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        use_prefetcher=not args.no_prefetcher,
        pin_memory=args.pin_mem,
        img_dtype=img_dtype,
        device=device,
        distributed=args.distributed,
        num_workers=args.workers,
        # workers that outlive an epoch carry its random state on, and resuming would not repeat it
        persistent_workers=False,
    )
    if args.aug_repeats and not args.distributed:
        raise InputError(f'--aug-repeats {args.aug_repeats:g}: is for several processes (torchrun), leave it out')
    if args.crop_padding:
        _check_crop_padding(args, train, data_config['input_size'])
    mixup_fn = collate_fn = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        mixup_args = dict(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
        if args.no_prefetcher:
            mixup_fn = Mixup(**mixup_args)
        else:
            collate_fn = FastCollateMixup(**mixup_args)
    loader_train = create_loader(
        train,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        worker_seeding=args.worker_seeding,
        collate_fn=collate_fn,
        **common,
    )
    if args.crop_padding:
        # in the place of RandomResizedCrop, the first of timm's training transforms
        train.transform.transforms[0] = RandomCrop(data_config['input_size'][1:], padding=args.crop_padding)
    if validation is None:
        return loader_train, None, None, mixup_fn
    evaluation = partial(
        create_loader,
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **common,
    )
    loader_eval, loader_robust = evaluation(validation), None
    if args.robust_eval_steps:
        if isinstance(validation, IterableDataset):
            raise InputError('--robust-eval-steps: needs a data set with an index, streaming data has none')
        size = len(validation)
        indices = balanced_indices(
            dataset_labels(validation), size, min(args.robust_eval_samples, size), seed=args.seed)
        loader_robust = evaluation(Subset(validation, indices))
    return loader_train, loader_eval, loader_robust, mixup_fn
