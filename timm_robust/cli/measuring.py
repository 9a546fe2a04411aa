"""Shared code of `diagnose`, `properties` and `statistics`: flags, network, images and results file."""
import dataclasses
import shlex
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Collection, Dict, List, Tuple, Type, TypeVar

import torch

from ..attacks import ThreatModel
from ..errors import InputError
from ..evaluation import RunFacts, ThreatConfig, versions
from ..evaluation.plan import threat_facts
from ..evaluation.sources import open_data
from ..evaluation.subject import Subject, open_model
from ..inputs import ImagesConfig, NetworkConfig, check_seed, write_json
from ..layers import has_batch_statistics
from ..settings import check_types, from_flat, setting, to_mapping
from .arguments import SettingsParser, start_logging
from .flags import add_flags
from .outputs import new_folder

__all__ = ['Measurement', 'MeasuringConfig', 'measuring_parser', 'open_measurement']

T = TypeVar('T', bound='MeasuringConfig')


@dataclass(frozen=True, kw_only=True)
class MeasuringConfig:
    """Settings shared by `diagnose`, `properties` and `statistics`.

    Attributes:
        file_name: Name of the results file.
        usual_examples: Default number of images.
    """
    file_name: ClassVar[str]
    usual_examples: ClassVar[int]
    seed: int = setting(0, 'random seed for the image subset and the noise', metavar='S')
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
        images, labels: All of them, on the device.
        batch_size: Batch size.
        path: The results file; `write` creates its folder.
        facts: Metadata in the file besides the results.
        name: Network and checkpoint, for display.
        sample: Images, threat model and seed, for display.
    """
    threat: ThreatModel
    subject: Subject
    images: torch.Tensor
    labels: torch.Tensor
    batch_size: int
    path: Path
    facts: Dict[str, Any]
    name: str
    sample: str

    def write(self, results: Dict[str, Any]) -> None:
        """Write the results file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self.facts, **results})


def measuring_parser(
        command: str,
        description: str,
        config: Type[MeasuringConfig],
        without: Collection[str] = (),
) -> SettingsParser:
    """The parser of a command that measures a network.

    Args:
        command: Name of the command.
        description: What it measures and writes.
        config: Its settings.
        without: Network settings that get no flag.
    """
    parser = SettingsParser(
        ThreatConfig, config, ImagesConfig, data=True, prog=f'timm-robust {command}',
        description=f'{description} Uses {config.usual_examples} images by default (--num-examples).',
        examples=(
            f'timm-robust {command} "my data" --model output/train/mine/export',
            f'timm-robust {command} cifar10 --model nofrost_resnet20_cifar --split test --num-examples 200'),
        first=(
            'norm', 'eps', *(field.name for field in dataclasses.fields(config)), 'data_dir', 'dataset', 'split',
            'num_examples', 'batch_size', 'model', 'pretrained', 'device', 'checkpoint'))
    add_flags(parser, NetworkConfig, without=without)
    return parser


def open_measurement(parser: SettingsParser, cls: Type[T], argv: List[str]) -> Tuple[T, Measurement]:
    """Read the settings of a command and open its network and images.

    Args:
        parser: From `measuring_parser`.
        cls: The settings class.
        argv: The command line.

    Raises:
        InputError: On bad values, and if the output folder already holds the file.
    """
    values = parser.read(argv)
    start_logging()
    config, threat = from_flat(cls, values), from_flat(ThreatConfig, values).threat
    if threat.eps == 0:
        raise InputError('allows no perturbation', 'pass an eps above 0', argument='eps', value=0)
    network, images = from_flat(NetworkConfig, values), from_flat(ImagesConfig, values)
    path = Path(config.output or new_folder(Path(cls.file_name).stem, network.model)) / cls.file_name
    if path.exists():
        raise InputError(f'already holds {path.name}', 'choose another folder', argument='output', value=config.output)
    subject = open_model(network)
    source = open_data(images, subject, seed=config.seed, usual_examples=cls.usual_examples)
    x, y = (t.to(subject.device) for t in source.first(len(source.indices)))
    run = RunFacts(
        seed=config.seed, batch_size=source.batch_size, device=str(subject.device),
        batch_dependent=has_batch_statistics(subject.model),
        command=shlex.join([*parser.prog.split(), *argv]),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'))
    facts = {
        'model': to_mapping(subject.facts),
        'data': {**to_mapping(source.facts), 'indices': source.indices},
        'threat': to_mapping(threat_facts(threat)),
        'settings': {**to_mapping(config), **to_mapping(run)},
        'versions': versions(),
    }
    return config, Measurement(
        threat, subject, x, y, source.batch_size, path, facts,
        name=' '.join(filter(None, (network.model, network.checkpoint))),
        sample=f'{len(x)} images, batch {source.batch_size}, {threat}, seed {config.seed}')
