"""The network and the images that the commands which attack a network share."""
import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple, Type, TypeVar

import torch

from ..attacks import ThreatModel, make_threat
from ..errors import check_at_least
from ..inputs import (
    Images,
    ImagesConfig,
    Network,
    NetworkConfig,
    Preprocessing,
    build_network,
    check_batch_size,
    check_seed,
    open_images,
)
from ..inputs import build_surrogate as library_surrogate
from .arguments import Parser, add_data_arguments, add_model_arguments

__all__ = [
    'Inputs',
    'add_image_arguments',
    'add_input_arguments',
    'add_threat_arguments',
    'build_surrogate',
    'images_config',
    'images_for',
    'measuring_parser',
    'network_config',
    'open_converted',
    'open_inputs',
    'open_network',
    'read_threat',
]

T = TypeVar('T')


def add_threat_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags of the threat model."""
    group.add_argument('--norm', default='Linf', metavar='NORM', help='Linf or L2 (default: Linf)')
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
    group.add_argument('--allow-class-mismatch', action='store_true',
                       help='evaluate although the classes of the data are not those of the network')


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


def read_threat(args: argparse.Namespace) -> ThreatModel:
    """Threat model of the flags.

    Raises:
        InputError: Naming the flag.
    """
    check_at_least('batch_size', args.batch_size)
    check_seed(args.seed)
    network_config(args)
    return make_threat(args.norm, args.eps)


def _from_flags(cls: Type[T], args: argparse.Namespace, **changes: Any) -> T:
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}
    return cls(**{**values, **changes})


def network_config(args: argparse.Namespace, **changes: Any) -> NetworkConfig:
    """Settings of the network; `InputError` if they are none."""
    return _from_flags(NetworkConfig, args, **changes)


def images_config(args: argparse.Namespace) -> ImagesConfig:
    """Settings of the images; `InputError` if they are none."""
    return _from_flags(ImagesConfig, args)


@dataclass
class Inputs:
    """A network and the images to attack it with.

    Attributes:
        network: The network.
        images: The images.
        args: The flags.
    """
    network: Network
    images: Images
    args: argparse.Namespace

    @property
    def model(self) -> Any:
        """The timm model."""
        return self.network.model

    @property
    def pixel_model(self) -> Any:
        """Takes pixels in [0, 1]."""
        return self.network.pixel_model

    @property
    def data_config(self) -> Preprocessing:
        """timm's data configuration."""
        return self.network.preprocessing

    @property
    def dataset(self) -> Any:
        """The data set."""
        return self.images.dataset

    @property
    def indices(self) -> List[int]:
        """The chosen images."""
        return self.images.indices

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.device

    @property
    def class_names(self) -> Optional[List[str]]:
        """Names of the classes, where the data set knows them."""
        return self.images.class_names

    def loader(self, positions: Optional[List[int]] = None) -> Any:
        """A loader of pixels in [0, 1] and labels, for all chosen images or those at some positions."""
        return self.images.loader(positions)

    def first(self, count: int) -> Any:
        """The first chosen images and their labels, as tensors on the device."""
        return self.images.first(count)


def open_network(args: argparse.Namespace, device: torch.device) -> Network:
    """Build the network and load its weights.

    Raises:
        InputError: Naming the flag.
    """
    network = build_network(network_config(args), device)
    check_batch_size(network.model, args.batch_size)
    args.model_kwargs = network.config.model_kwargs  # with those of the run a checkpoint is from
    return network


def open_converted(args: argparse.Namespace, path: str, use_ema: bool = True) -> Network:
    """The network of --model with the weights of a checkpoint, on the CPU.

    Raises:
        InputError: Naming the path.
    """
    config = network_config(args, checkpoint=path, use_ema=use_ema, channels_last=False)
    return build_network(config, torch.device('cpu'))


def open_inputs(args: argparse.Namespace, device: torch.device) -> Inputs:
    """Build the network, load its weights, open the data and choose the images.

    Raises:
        InputError: Naming the flag.
    """
    return images_for(open_network(args, device), args)


def images_for(network: Network, args: argparse.Namespace) -> Inputs:
    """Open the data and choose the images for a network.

    Raises:
        InputError: Naming the flag.
    """
    images = open_images(images_config(args), network, seed=args.seed, usual_examples=args.usual_examples)
    args.num_examples = args.num_examples or len(images)
    return Inputs(network, images, args)


def build_surrogate(args: argparse.Namespace, inputs: Inputs) -> Any:
    """The network of --surrogate on pixels, or None.

    Raises:
        InputError: If it cannot be built or its classes or input are not those of the model.
    """
    if not (args.surrogate or args.surrogate_checkpoint):
        return None
    return library_surrogate(args.surrogate, inputs.network, args.surrogate_checkpoint).pixel_model
