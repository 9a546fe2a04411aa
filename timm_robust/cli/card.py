"""`timm-robust card`: the folder of a model as it goes to the Hub, every number of its card measured."""
import dataclasses
import shlex
from pathlib import Path
from typing import Any, Dict, List

import yaml
from timm.models import get_pretrained_cfg, is_model, list_pretrained, split_model_name_tag

from ..errors import InputError
from ..hub import Card, build_card_folder
from ..tasks.objective import objective_to_flat
from ..training import TrainConfig
from . import train
from .arguments import Parser, add_model_arguments
from .flags import as_flags
from .inputs import open_converted

__all__ = ['OF_THE_MACHINE', 'build_parser', 'run', 'training_command']

OF_THE_MACHINE = (  # left out of commands
    'data_dir', 'output', 'experiment', 'resume', 'workers', 'device', 'pin_mem', 'log_interval', 'checkpoint_hist',
    'dataset_download')


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
                        help='where it will be published (default: that of the tag, if timm knows it)')
    parser.add_argument('--output', default='hub_cards', metavar='DIR', help='folder of folders (default: %(default)s)')
    add_model_arguments(parser, model=False, pretrained=False)
    return parser


def training_command(args: Dict[str, Any]) -> str:
    """The command of a run from its args.yaml, without what belongs to the machine it ran on."""
    known = TrainConfig.all_flat_names() - {*OF_THE_MACHINE}  # a device that only that machine had is refused
    config = TrainConfig.from_flat({k: v for k, v in args.items() if k in known and v is not None})
    defaults = {**objective_to_flat(type(config.objective)()), **TrainConfig().to_flat()}
    own = {name: value for name, value in config.to_flat().items()
           if name not in OF_THE_MACHINE and value != defaults[name]}
    return shlex.join(['timm-robust', 'train', *as_flags(train.build_parser(), own), '--data-dir', 'DIR'])


def run(argv: List[str]) -> None:
    """Build the folder."""
    args = build_parser().parse_args(argv)
    args.model = args.name.partition('.')[0]
    repo_id = args.repo_id or (get_pretrained_cfg(args.name).hf_hub_id if args.name in list_pretrained() else '')
    if not repo_id and is_model(args.model):
        raise InputError(f'{args.name}: say with --repo-id where it will be published')
    try:
        card = Card(
            name=args.name, repo_id=repo_id or args.name, license=args.license, origin=args.origin,
            selection=args.selection.rstrip('.'), **_training(args.train_args))
    except InputError as error:
        # the one argument that is no flag
        positional = error.argument == 'name'
        raise (InputError(f'{args.name}: {error.problem}', error.remedy) if positional else error.renamed(
            {'command': 'train_args'})) from error
    network = open_converted(args, args.checkpoint)
    card = dataclasses.replace(card, model_args=network.config.model_kwargs)
    written = build_card_folder(Path(args.output) / args.name, card, network.model, args.results, args.data_name)
    print('Written: ' + ', '.join(map(str, written)))


def _on_hub(model: str) -> str:
    """Where the Hub has the pretrained weights of a model, '' if it is not known."""
    if model.startswith('hf-hub:'):
        return model.removeprefix('hf-hub:').partition('@')[0]
    tagged = split_model_name_tag(model)[1] and model in list_pretrained()
    cfg = get_pretrained_cfg(model) if tagged or is_model(model) else None
    return cfg.hf_hub_id or '' if cfg else ''


def _training(path: str) -> Dict[str, str]:
    """What a card says of the run whose args.yaml this is; nothing without one."""
    if not path:
        return {}
    try:
        training = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
        found = {'objective': str(training['objective']), 'command': training_command(training)}
        if training.get('pretrained'):
            found['base_model'] = _on_hub(str(training['model']))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f'--train-args {path}: is no args.yaml of timm-robust train ({type(error).__name__})') from error
    return found
