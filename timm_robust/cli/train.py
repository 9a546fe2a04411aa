"""`timm-robust train`: timm's training flags and ours, made of the fields of `TrainConfig`."""
from typing import List

from ..errors import InputError
from ..training import TrainConfig, train
from .arguments import SettingsParser, start_logging
from .flags import add_flags, add_objective_flags

__all__ = ['build_parser', 'read_config', 'run']


def build_parser() -> SettingsParser:
    """The parser of `timm-robust train`."""
    parser = SettingsParser(
        prog='timm-robust train', description='Train a timm model to be robust against adversarial images.',
        epilog='example: timm-robust train "my data" --model resnet18 --pretrained --objective trades.')
    parser.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (root dir), same as --data-dir')
    add_objective_flags(parser)
    add_flags(parser, TrainConfig)
    return parser


def read_config(argv: List[str]) -> TrainConfig:
    """The settings of a command line; flags win over the file of -c."""
    parser = build_parser()
    values = parser.read(argv)
    data = values.pop('data', None)
    if data is not None:
        twice = parser.given(argv).get('data_dir')
        if twice is not None:
            raise InputError('the folder of the data is there twice', argument='data_dir', value=twice)
        values['data_dir'] = data
    return TrainConfig.from_flat(values)


def run(argv: List[str]) -> None:
    """Train."""
    config = read_config(argv)
    start_logging()
    train(config)
