"""`timm-robust train`: timm's training flags and ours, made of the fields of `TrainConfig`."""
from typing import List

from ..errors import InputError
from ..training import TrainConfig
from .arguments import Parser, start_logging
from .flags import add_flags, add_objective_flags, given
from .plugins import HELP

__all__ = ['build_parser', 'read_config', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust train`."""
    parser = Parser(
        prog='timm-robust train', description='Train a timm model to be robust against adversarial images.',
        epilog=f'example: timm-robust train "my data" --model resnet18 --pretrained --objective trades. {HELP}')
    parser.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (root dir), same as --data-dir')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with values for these flags')
    add_objective_flags(parser)
    add_flags(parser, TrainConfig)
    return parser


def read_config(argv: List[str]) -> TrainConfig:
    """The settings of a command line; flags win over the file of -c."""
    values = dict(given(build_parser(), argv))
    path, data = values.pop('config', None), values.pop('data', None)
    if data is not None:
        if 'data_dir' in values:
            raise InputError('the folder of the data is there twice', argument='data_dir', value=values['data_dir'])
        values['data_dir'] = data
    return TrainConfig.from_flat({**(TrainConfig.read_yaml(path) if path else {}), **values})


def run(argv: List[str]) -> None:
    """Train."""
    config = read_config(argv)
    start_logging()
    from ..training import train
    train(config)
