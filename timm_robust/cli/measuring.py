"""What `diagnose`, `properties` and `statistics` share: flags, the network, the images and an output folder."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Tuple, Type, TypeVar

import torch

from ..attacks import ThreatModel
from ..errors import InputError
from ..evaluation import ThreatConfig
from ..evaluation.sources import Source, Subject, open_data, open_model
from ..inputs import ImagesConfig, NetworkConfig, check_seed
from ..settings import check_types, setting
from .arguments import Parser, apply_config, start_logging
from .flags import add_flags, from_flags
from .outputs import new_output

__all__ = ['MeasuringConfig', 'Measurement', 'measuring_parser', 'open_measurement']

T = TypeVar('T', bound='MeasuringConfig')


@dataclass(frozen=True, kw_only=True)
class MeasuringConfig:
    """Settings that all of these commands have."""
    seed: int = setting(0, 'seed of subset and noise', metavar='S')
    output: str = setting('', 'folder for results (default: ./output/COMMAND/TIME-MODEL)', metavar='DIR')

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)


@dataclass
class Measurement:
    """A network and images to measure it on.

    Attributes:
        threat: Threat model of the attacks.
        subject: The network.
        source: The images.
        images, labels: All of them, on the device.
        folder: Where results go; it is not made yet.
        name: Network and checkpoint, for people.
    """
    threat: ThreatModel
    subject: Subject
    source: Source
    images: torch.Tensor
    labels: torch.Tensor
    folder: Path
    name: str


def measuring_parser(
        command: str,
        description: str,
        config: Type[MeasuringConfig],
        files: str,
        num_examples: int,
) -> Parser:
    """The parser of a command that measures a network.

    Args:
        command: Name of the command.
        description: What it measures.
        config: Its settings.
        files: What it writes.
        num_examples: Images it measures on if nothing is said.
    """
    parser = Parser(
        prog=f'timm-robust {command}',
        description=f'{description} Writes {files}. Measures on {num_examples} images unless --num-examples says '
                    'otherwise.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for these flags')
    for cls in (ThreatConfig, config, ImagesConfig, NetworkConfig):
        add_flags(parser, cls)
    return parser


def read_flags(parser: Parser, config: Type[T], argv: List[str]) -> Tuple[Any, T]:
    """The flags of a command line, and the settings of the command in them."""
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    return args, from_flags(config, args)


def open_measurement(args: Any, config: MeasuringConfig, file_name: str, num_examples: int) -> Measurement:
    """Open all that the flags name.

    Raises:
        InputError: On bad values, and if the output folder already holds the file.
    """
    threat = from_flags(ThreatConfig, args).threat
    if threat.eps == 0:
        raise InputError('leaves an attack nothing to do', 'give an eps above 0', argument='eps', value=args.eps)
    network, images = from_flags(NetworkConfig, args), from_flags(ImagesConfig, args)
    folder = new_output(config.output, file_name, network.model)
    subject = open_model(network)
    source = open_data(images, subject, seed=config.seed, usual_examples=num_examples)
    x, y = source.first(len(source.indices))
    return Measurement(
        threat, subject, source, x.to(subject.device), y.to(subject.device), folder,
        ' '.join(filter(None, (network.model, network.checkpoint))))
