"""`timm-robust card`: the folder of a model as it goes to the Hub, every number of its card measured."""
import argparse
import shlex
from pathlib import Path
from typing import Any, Dict, List

import yaml
from timm.models import is_model

from ..errors import InputError
from ..hub.card import build_card_folder
from ..models._build import HUB_ORG
from . import train
from .arguments import Parser, add_model_arguments
from .inputs import open_converted

__all__ = ['OF_THE_MACHINE', 'build_parser', 'run', 'training_command']

OF_THE_MACHINE = (  # left out of commands
    'data_dir', 'output', 'experiment', 'config', 'resume', 'workers', 'device', 'pin_mem', 'distributed', 'world_size',
    'rank', 'local_rank', 'log_interval', 'checkpoint_hist', 'dataset_download')


def build_parser() -> Parser:
    """The parser of `timm-robust card`."""
    parser = Parser(
        prog='timm-robust card',
        description='Build the folder of a model for the Hugging Face Hub: card, config, weights, results, figures.')
    parser.add_argument('name', metavar='MODEL.TAG', help='for example nofrost_resnet50.nofrost_linf8_in1k')
    parser.add_argument('--checkpoint', required=True, metavar='PATH', help='weights, safetensors or checkpoint')
    parser.add_argument('--results', required=True, nargs='+', metavar='FILE',
                        help='results.json of timm-robust eval on these weights')
    parser.add_argument('--data-name', required=True, nargs='+', metavar='NAME',
                        help='how to call the data of each results.json, for example "CIFAR-10"')
    parser.add_argument('--train-args', default='', metavar='FILE', help='args.yaml of the training run')
    parser.add_argument('--origin', default='', metavar='TEXT', help='where weights come from that others trained')
    parser.add_argument('--selection', default='', metavar='TEXT',
                        help='which weights of the run these are and by what they were chosen, for example "Epoch 11, '
                             'the best robust accuracy on 500 test images"')
    parser.add_argument('--license', default='apache-2.0', metavar='ID', help='of the weights (default: %(default)s)')
    parser.add_argument('--repo-id', default='', metavar='ORG/NAME',
                        help=f'where it will be published (default: {HUB_ORG}/MODEL.TAG)')
    parser.add_argument('--output', default='hub_cards', metavar='DIR', help='folder of folders (default: %(default)s)')
    add_model_arguments(parser, model=False, pretrained=False)
    return parser


def training_command(args: Dict[str, Any]) -> str:
    """The command of a run from its args.yaml, without what belongs to the machine it ran on."""
    words = ['timm-robust', 'train']
    for action in train.build_parser()._actions:
        value = args.get(action.dest)
        unset = value in (action.default, None, []) or str(value).lower() == str(action.default).lower()
        if action.dest in OF_THE_MACHINE or unset:
            continue
        words.append(action.option_strings[0 if isinstance(action, argparse.BooleanOptionalAction) and value else -1])
        if isinstance(value, dict):
            words += [f'{k}={v}' for k, v in value.items()]
        elif not isinstance(value, bool):
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return shlex.join([*words, '--data-dir', 'DIR'])


def run(argv: List[str]) -> None:
    """Build the folder."""
    args = build_parser().parse_args(argv)
    args.model, _, tag = args.name.partition('.')
    if not tag or not is_model(args.model):
        raise InputError(f'{args.name}: must be MODEL.TAG with a model timm knows (timm.list_models())')
    if len(args.data_name) != len(args.results):
        raise InputError(
            f'--data-name: names {len(args.data_name)} data sets for {len(args.results)} of --results, give one each')
    if not args.train_args and not args.origin:
        raise InputError('--train-args: give the args.yaml of the run, or say with --origin where the weights are from')
    objective = command = ''
    if args.train_args:
        try:
            training = yaml.safe_load(Path(args.train_args).read_text())
            objective, command = training['objective'], training_command(training)
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(
                f'--train-args {args.train_args}: is no args.yaml of timm-robust train '
                f'({type(error).__name__})') from error
    network = open_converted(args, args.checkpoint)
    folder = Path(args.output) / args.name
    written = build_card_folder(
        folder, args.name, network.model, args.results, model_args=network.config.model_kwargs,
        data_names=args.data_name, repo_id=args.repo_id or f'{HUB_ORG}/{args.name}', license=args.license,
        objective=objective, command=command, origin=args.origin, selection=args.selection)
    print('Written: ' + ', '.join(map(str, written)))
