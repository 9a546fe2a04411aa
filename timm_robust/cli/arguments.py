"""Arguments several commands share, with the spelling and defaults of timm's scripts."""
import argparse
import logging
from typing import Any, Dict, List

import yaml
from timm.utils import ParseKwargs, setup_default_logging
from timm.utils.log import FormatterNoInfo

from ..errors import InputError
from .plugins import HELP

__all__ = [
    'Parser',
    'add_data_arguments',
    'add_model_arguments',
    'apply_config',
    'start_logging',
]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and an `InputError`."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **{'epilog': HELP, **kwargs})

    def error(self, message: str) -> None:
        raise InputError(f'{message} ({self.prog} --help lists the flags)')


def start_logging() -> None:
    """Log to the terminal as timm does, without chatter about every checkpoint and every request."""
    for handler in [h for h in logging.root.handlers if isinstance(h.formatter, FormatterNoInfo)]:
        logging.root.removeHandler(handler)  # of an earlier command in this process
    setup_default_logging()
    for name in ('timm', 'httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.WARNING)


def apply_config(parser: argparse.ArgumentParser, argv: List[str]) -> List[str]:
    """Take defaults from the YAML file of -c/--config; flags on the command line win.

    Returns:
        The remaining arguments.

    Raises:
        InputError: If the file is missing, no YAML mapping, or has a key that is no flag.
    """
    config_parser = Parser(prog=parser.prog, add_help=False)
    config_parser.add_argument('-c', '--config', default='')
    known, rest = config_parser.parse_known_args(argv)
    if not known.config:
        return rest
    try:
        with open(known.config) as file:
            config: Dict[str, Any] = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise InputError(f'--config {known.config}: cannot be read as YAML ({reason})') from error
    if not isinstance(config, dict):
        raise InputError(f'--config {known.config}: must hold "flag: value" lines')
    flags = {action.dest for action in parser._actions}
    unknown = sorted(set(config) - flags - {'config'})
    if unknown:
        raise InputError(f'--config {known.config}: {unknown[0]!r} is no flag of this command ({parser.prog} --help)')
    parser.set_defaults(**{k: v for k, v in config.items() if k in flags})
    return rest


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The data set flags of timm's scripts."""
    group = parser.add_argument_group('Dataset parameters')
    group.add_argument('--data-dir', metavar='DIR', help='path to dataset (root dir)')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='dataset type + name ("<type>/<name>", e.g. torch/cifar10) (default: ImageFolder)')
    group.add_argument('--dataset-download', action='store_true', help='download torch/ and tfds/ datasets')
    group.add_argument('--class-map', default='', metavar='FILENAME', help='path to class to idx mapping file')
    group.add_argument('--input-img-mode', default=None, help='image conversion mode (default: RGB, L for 1 channel)')
    group.add_argument('--input-key', default=None, help='dataset key for input images')
    group.add_argument('--target-key', default=None, help='dataset key for target labels')
    group.add_argument('--dataset-trust-remote-code', action='store_true',
                       help='allow a huggingface dataset to run code of its repo')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes (default: 4)')
    group.add_argument('--pin-mem', action='store_true', help='pin CPU memory in the loader')
    return group


def add_model_arguments(
        parser: argparse.ArgumentParser,
        model: bool = True,
        pretrained: bool = True,
        **defaults: Any,
) -> argparse._ArgumentGroup:
    """The model and input flags of timm's scripts; without --model or --pretrained where something else says it."""
    group = parser.add_argument_group('Model parameters')
    if model:
        group.add_argument('--model', default='resnet50', metavar='MODEL',
                           help='any timm model name, local-dir:PATH or hf-hub:ORG/NAME (default: resnet50)')
    if pretrained:
        group.add_argument('--pretrained', action='store_true', help='use pretrained weights')
    group.add_argument('--num-classes', type=int, default=None, metavar='N', help='number of classes')
    group.add_argument('--img-size', type=int, default=None, metavar='N', help='image size (default: of the model)')
    group.add_argument('--in-chans', type=int, default=None, metavar='N', help='input channels (default: 3)')
    group.add_argument('--input-size', default=None, nargs=3, type=int, metavar='N', help='input size as C H W')
    group.add_argument('--crop-pct', default=None, type=float, metavar='N', help='validation crop percent')
    group.add_argument('--crop-mode', default=None, metavar='MODE', help='validation crop: center, squash or border')
    group.add_argument('--mean', type=float, nargs='+', default=None, help='mean pixel value (default: of the model)')
    group.add_argument('--std', type=float, nargs='+', default=None, help='std deviation (default: of the model)')
    group.add_argument('--interpolation', default='', metavar='NAME', help='resize interpolation')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size (default: 128)')
    group.add_argument('--channels-last', action='store_true', help='use channels_last memory layout')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                       help='further arguments of the model, e.g. norm_layer=batchnorm2d')
    group.add_argument('--device', default=None, help='device (default: cuda if there is one, else cpu)')
    parser.set_defaults(**defaults)
    return group
