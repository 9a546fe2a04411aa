"""The network and the images that the commands which attack a network share."""
import argparse
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import create_loader
from torch.utils.data import IterableDataset, Subset

from ..attacks import ThreatModel
from ..attacks.threat import NORMS
from ..data import balanced_indices, check_images, check_labels, dataset_labels, listed_indices
from ..errors import InputError, check_at_least, check_choice
from ..hub.convert import Conversion, convert_state_dict, read_checkpoint
from ..hub.verify import verify_weights
from ..layers import BN_MODES, convert_aux_norm, has_batch_statistics, set_bn_mode, set_gamma
from ..models import NormalizedModel
from ..train.build import build_model, check_seed, resolve_data
from ..train.checkpoint import load_weights
from ..train.datasets import open_dataset
from .arguments import Parser, add_data_arguments, add_model_arguments

__all__ = [
    'Inputs',
    'add_image_arguments',
    'add_input_arguments',
    'add_threat_arguments',
    'build_surrogate',
    'images_for',
    'measuring_parser',
    'on_pixels',
    'open_converted',
    'open_images',
    'open_inputs',
    'open_network',
    'pixel_loader',
    'read_threat',
]


def add_threat_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags of the threat model."""
    group.add_argument('--norm', default='linf', metavar='NORM', help='linf or l2 (default: linf)')
    group.add_argument('--eps', default='8/255', help='perturbation size in pixel units on [0, 1] (default: 8/255)')
    group.add_argument('--bn-mode', default=None, metavar='MODE',
                       help='normalize by population, batch or (RobustNorm) mean statistics (default: of the model)')
    group.add_argument('--gamma', default=None, type=float, metavar='GAMMA',
                       help='share of the BatchNorm of adversarial images, in [0, 1], for a checkpoint of --objective '
                            'mbnat')
    group.add_argument('--surrogate', default='', metavar='MODEL',
                       help='another network of the same classes (a timm model, local-dir:PATH), for attacks crafted '
                            'on it')
    group.add_argument('--surrogate-checkpoint', default='', metavar='PATH', help='weights of the surrogate')
    group.add_argument('--seed', type=int, default=0, metavar='S', help='seed of subset and noise (default: 0)')


def add_image_arguments(parser: argparse.ArgumentParser, num_examples: Optional[int] = None) -> None:
    """Flags of data."""
    group = add_data_arguments(parser)
    group.add_argument('--split', default='validation', metavar='NAME', help='split (default: validation)')
    parser.set_defaults(usual_examples=num_examples)
    group.add_argument('--num-examples', type=int, default=None, metavar='N',
                       help=f"evaluate so many images of the subset (default: {num_examples or 'all'})")
    group.add_argument('--subset', default='balanced', metavar='NAME',
                       help='balanced (seeded, as many of each class), robustbench (its ImageNet images, where that '
                            'package is installed) or a file of image names (default: balanced)')


def add_input_arguments(parser: argparse.ArgumentParser, num_examples: Optional[int] = None) -> None:
    """Flags of data and model."""
    add_image_arguments(parser, num_examples)
    group = add_model_arguments(parser)
    group.add_argument('--checkpoint', default='', metavar='PATH', help='weights to load, safetensors or checkpoint')
    group.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=True,
                       help='prefer averaged weights of the checkpoint (default: yes)')


def measuring_parser(command: str, description: str, files: str, num_examples: int) -> Tuple[Parser, Any]:
    """The parser of a command that measures a network, and its group of flags of its own.

    Args:
        command: Name of the command.
        description: What it measures.
        files: What it writes; the first names its folder.
        num_examples: Images it measures on if nothing is said.
    """
    parser = Parser(prog=f'timm-robust {command}', description=description)
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for these flags')
    group = parser.add_argument_group(f'{command.capitalize()} parameters')
    add_threat_arguments(group)
    group.add_argument('--output', default='', metavar='DIR',
                       help=f"folder for {files} (default: ./output/{files.split('.')[0]}/TIME-MODEL)")
    add_input_arguments(parser, num_examples)
    return parser, group


def _gamma_flag(args: argparse.Namespace) -> str:
    swept = getattr(args, 'sweep', '') and not args.gamma  # the sweep implies a gamma of 0
    return '--sweep gamma' if swept else f'--gamma {args.gamma:g}'


def _check_gamma(args: argparse.Namespace) -> None:
    if not 0 <= args.gamma <= 1:
        raise InputError(
            f'{_gamma_flag(args)}: must be in [0, 1]; 0 is the BatchNorm of clean images, 1 that of adversarial ones')
    if not args.checkpoint:
        raise InputError(
            f'{_gamma_flag(args)}: mixes the two BatchNorms of a training checkpoint of --objective mbnat, give it '
            'with --checkpoint')
    if args.bn_mode not in (None, 'population'):
        raise InputError(
            f'--bn-mode {args.bn_mode}: does not go with {_gamma_flag(args)}, which mixes tracked '
            'statistics; leave it out')


def read_threat(args: argparse.Namespace) -> ThreatModel:
    """Threat model of the flags.

    Raises:
        InputError: Naming the flag.
    """
    check_choice('norm', args.norm, NORMS)
    if args.bn_mode is not None:
        check_choice('bn_mode', args.bn_mode, BN_MODES)
    check_at_least('batch_size', args.batch_size)
    check_seed(args.seed)
    if args.gamma is not None:
        _check_gamma(args)
    try:
        return ThreatModel(args.norm, args.eps)
    except InputError as error:
        raise InputError(f'--eps {args.eps}: {error}') from error


def pixel_loader(
        args: argparse.Namespace,
        dataset: Any,
        indices: List[int],
        data_config: Dict[str, Any],
        device: torch.device,
):
    """A loader of pixels in [0, 1] and labels, for some images of a data set whose `transform` it sets."""
    subset = Subset(dataset, indices)
    channels = data_config['input_size'][0]
    loader = create_loader(
        subset,
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        mean=(0.,) * channels,
        std=(1.,) * channels,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        persistent_workers=False,
    )
    # timm sets the transform on the subset, which does not apply it
    dataset.transform = subset.transform
    return loader


@dataclass
class Inputs:
    """A network and the images to attack it with.

    Attributes:
        model: The timm model.
        pixel_model: Takes pixels in [0, 1].
        data_config: timm's data configuration.
        dataset: The data set.
        indices: The chosen images.
        device: Where the network is.
    """
    model: nn.Module
    pixel_model: NormalizedModel
    data_config: Dict[str, Any]
    dataset: Any
    indices: List[int]
    device: torch.device
    args: argparse.Namespace

    def loader(self, positions: Optional[List[int]] = None):
        """A loader of pixels in [0, 1] and labels, for all chosen images or those at some positions."""
        indices = self.indices if positions is None else [self.indices[i] for i in positions]
        return pixel_loader(self.args, self.dataset, indices, self.data_config, self.device)

    def first(self, count: int):
        """The first chosen images and their labels, as tensors on the device."""
        count = min(count, len(self.indices))
        batches = [(x.to(self.device), y.to(self.device)) for x, y in self.loader(list(range(count)))]
        return tuple(torch.cat(part) for part in zip(*batches))

    @property
    def class_names(self) -> Optional[List[str]]:
        """Names of the classes, where the data set knows them."""
        index = getattr(getattr(self.dataset, 'reader', None), 'class_to_idx', {})
        return sorted(index, key=index.get) or getattr(self.dataset, 'classes', None)


def on_pixels(args: argparse.Namespace, model: nn.Module, data_config: Dict[str, Any], device) -> NormalizedModel:
    """A network behind its mean and std, in eval mode, where and as the flags say."""
    pixel_model = NormalizedModel(model, data_config['mean'], data_config['std'])
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    return pixel_model.to(device=device, memory_format=memory_format).eval()


def _add_aux_norm(args: argparse.Namespace, model: nn.Module) -> None:
    try:
        set_gamma(convert_aux_norm(model), args.gamma)
    except ValueError as error:
        raise InputError(f'{_gamma_flag(args)}: {error}') from error


def open_network(args: argparse.Namespace, device: torch.device) -> Tuple[NormalizedModel, Dict[str, Any]]:
    """Build the network and load its weights: on pixels, in eval mode, with timm's data configuration.

    Raises:
        InputError: Naming the flag.
    """
    args.pretrained = args.pretrained or not args.checkpoint  # as timm's validate.py: never random weights
    model = build_model(args)
    if not args.checkpoint:
        verify_weights(args.model)
    if args.gamma is not None:
        _add_aux_norm(args, model)
    if args.checkpoint:
        load_weights(model, args.checkpoint, use_ema=args.use_ema)
    if args.bn_mode:
        try:
            set_bn_mode(model, args.bn_mode)
        except ValueError as error:
            raise InputError(f'--bn-mode {args.bn_mode}: {error}') from error
    if args.batch_size == 1 and has_batch_statistics(model):
        raise InputError(
            '--batch-size 1: this network normalizes by the statistics of the batch, use a larger batch or '
            '--bn-mode population')
    data_config = resolve_data(args, model)
    return on_pixels(args, model, data_config, device), data_config


def open_converted(
        args: argparse.Namespace,
        path: str,
        flag: str,
        use_ema: bool = True,
) -> Tuple[nn.Module, Conversion]:
    """Build the network of --model in eval mode, with the weights of a checkpoint, and say what became of its keys.

    Raises:
        InputError: Naming the flag.
    """
    content = read_checkpoint(path, flag)
    args.pretrained = False
    model = build_model(args).eval()
    try:
        found = convert_state_dict(content, model, use_ema)
    except InputError as error:
        raise InputError(f'{flag} {path}: {error}') from error
    model.load_state_dict(found.state_dict)
    return model, found


def open_images(args: argparse.Namespace, num_classes: int, in_chans: int) -> Any:
    """The data of --dataset, --data-dir and --split, whose labels the network has."""
    dataset = open_dataset(args, args.split, in_chans)
    if isinstance(dataset, IterableDataset):
        raise InputError(f'--dataset {args.dataset}: streaming data has no index, use a data set with one')
    check_labels(None, dataset, num_classes)
    return dataset


def open_inputs(args: argparse.Namespace, device: torch.device) -> Inputs:
    """Build the network, load its weights, open the data and choose the images.

    Raises:
        InputError: Naming the flag.
    """
    return images_for(*open_network(args, device), args, device)


def images_for(
        pixel_model: NormalizedModel,
        data_config: Dict[str, Any],
        args: argparse.Namespace,
        device: torch.device,
) -> Inputs:
    """Open the data and choose the images for a network of `open_network`.

    Raises:
        InputError: Naming the flag.
    """
    model = pixel_model.model
    dataset = open_images(args, model.num_classes, data_config['input_size'][0])
    if args.num_examples is None and args.usual_examples is not None:
        args.num_examples = min(args.usual_examples, len(dataset))
    if args.subset == 'balanced':
        indices = balanced_indices(dataset_labels(dataset), len(dataset), args.num_examples, args.seed)
    else:
        indices = listed_indices(dataset, args.subset, args.num_examples)
    check_images(dataset, indices)
    return Inputs(model, pixel_model, data_config, dataset, indices, device, args)


def build_surrogate(args: argparse.Namespace, inputs: Inputs) -> Optional[NormalizedModel]:
    """The network of --surrogate on pixels, or None.

    Raises:
        InputError: If it cannot be built or its classes or input are not those of the model.
    """
    if not args.surrogate:
        if args.surrogate_checkpoint:
            raise InputError(f'--surrogate-checkpoint {args.surrogate_checkpoint}: name its model with --surrogate')
        return None
    own = argparse.Namespace(**{
        **vars(args), 'model': args.surrogate, 'pretrained': not args.surrogate_checkpoint, 'model_kwargs': {},
        'num_classes': args.num_classes or (inputs.model.num_classes if args.surrogate_checkpoint else None)})
    model = build_model(own)
    if args.surrogate_checkpoint:
        load_weights(model, args.surrogate_checkpoint, use_ema=args.use_ema)
    if model.num_classes != inputs.model.num_classes:
        raise InputError(
            f'--surrogate {args.surrogate}: has {model.num_classes} classes, the model {inputs.model.num_classes}')
    own.mean = own.std = None
    data_config = resolve_data(own, model, '--surrogate')
    if data_config['input_size'] != inputs.data_config['input_size']:
        raise InputError(
            f"--surrogate {args.surrogate}: takes {data_config['input_size']} images, the model "
            f"{inputs.data_config['input_size']}: give both --input-size")
    return on_pixels(args, model, data_config, inputs.device)
