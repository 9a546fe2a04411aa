"""`timm-robust card`: build the Hub folder of a model, with a card generated from measured results."""
import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Tuple

import torch
from timm.models import get_pretrained_cfg, is_model, list_pretrained, split_model_name_tag

from ..errors import InputError
from ..hub import Card, build_card_folder, rewrite_card_folder
from ..hub.metadata import known_data
from ..inputs import NetworkConfig, build_network, read_yaml
from ..settings import check_types, from_flat, setting
from ..tasks.objective import objective_to_flat
from ..training import TrainConfig
from . import train
from .arguments import SettingsParser
from .convert import NO_FLAGS
from .flags import add_flags, as_flags

__all__ = ['OF_THE_MACHINE', 'CardConfig', 'build_parser', 'run', 'training_command']

OF_THE_MACHINE = (  # machine-specific settings, left out of published commands
    'data_dir', 'output', 'experiment', 'resume', 'workers', 'device', 'pin_mem', 'log_interval', 'checkpoint_hist',
    'dataset_download')


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Settings of `timm-robust card`."""
    checkpoint: str = setting('', 'weights: a safetensors file or a checkpoint', metavar='PATH')
    results: Tuple[str, ...] = setting(
        (), 'results.json files that timm-robust eval wrote for these weights, or their folders', metavar='FILE')
    data_name: Tuple[str, ...] = setting(
        (), 'name of the data of each results.json, for example "CIFAR-10"', metavar='NAME')
    train_args: str = setting('', 'args.yaml of the training run', metavar='FILE')
    origin: str = setting('', 'source of the weights, if others trained them', metavar='TEXT')
    selection: str = setting(
        '', 'which weights of the run these are and how they were selected, for example "Epoch 11, the best robust '
        'accuracy on 500 test images"', metavar='TEXT')
    license: str = setting('apache-2.0', 'license of the weights', metavar='ID')
    train_data: str = setting(
        '', 'data set the weights were trained on (default: from --train-args, if known)',
        metavar='NAME')
    train_split: str = setting('', 'split the weights were trained on (default: from --train-args)', metavar='NAME')
    repo_id: str = setting(
        '', 'repository that the card names until it is published (default: the one timm knows for MODEL.TAG, else '
        'YOUR-NAME/MODEL.TAG); push replaces it with the repository it uploads to', metavar='ORG/NAME')
    output: str = setting('hub_cards', 'folder in which to create MODEL.TAG', metavar='DIR')

    def __post_init__(self) -> None:
        check_types(self)


def build_parser() -> SettingsParser:
    """The parser of `timm-robust card`."""
    parser = SettingsParser(
        CardConfig, prog='timm-robust card',
        description='Build the folder of a model for the Hugging Face Hub: card, config, weights, results, figures.',
        examples=(
            'timm-robust card resnet18.trades_linf8_birds --num-classes 10 --checkpoint weights.safetensors '
            '--results output/eval/mine/results.json --data-name Birds --repo-id ME/MINE',))
    parser.add_argument('name', metavar='MODEL.TAG', help='for example nofrost_resnet50.nofrost_linf8_in1k; or an '
                        'existing card folder, to regenerate its card from its results')
    add_flags(parser, NetworkConfig, without=('model', *NO_FLAGS))
    return parser


def training_command(args: Mapping[str, Any]) -> str:
    """The training command from the args.yaml of a run, without machine-specific settings."""
    known = TrainConfig.all_flat_names() - {*OF_THE_MACHINE}  # e.g. a device that this machine lacks
    config = TrainConfig.from_flat({k: v for k, v in args.items() if k in known and v is not None})
    defaults = {**objective_to_flat(type(config.objective)()), **TrainConfig().to_flat()}
    own = {name: value for name, value in config.to_flat().items()
           if name not in OF_THE_MACHINE and value != defaults[name]}
    return shlex.join(['timm-robust', 'train', *as_flags(train.build_parser(), own), '--data-dir', 'DIR'])


def run(argv: List[str]) -> None:
    """Build or regenerate a card folder."""
    values = build_parser().read(argv)
    config, name = from_flat(CardConfig, values), values['name']
    training = _training(config.train_args)
    entries = {k: v for k, v in {
        **training._asdict(), 'license': values.get('license', ''), 'origin': config.origin, 'repo_id': config.repo_id,
        'selection': config.selection.rstrip('.'), 'train_data': config.train_data or training.train_data,
        'train_split': config.train_split or training.train_split}.items() if v}
    if (Path(name) / 'results.json').is_file():
        for given in ('checkpoint', 'results', 'data_name'):
            if getattr(config, given):
                raise InputError('applies only to a new folder', 'leave it out, or pass MODEL.TAG', argument=given)
        print('Written: ' + ', '.join(map(str, rewrite_card_folder(Path(name), **entries))))
        return
    for given in ('checkpoint', 'results', 'data_name'):
        if not getattr(config, given):
            raise InputError('is missing', argument=given)
    try:
        card = Card(**{'name': name, 'repo_id': _on_hub(name) or f'YOUR-NAME/{name}', **entries})
    except InputError as error:
        raise error.renamed({'command': 'train_args'}) from error
    network = build_network(from_flat(NetworkConfig, {**values, 'model': card.model}), torch.device('cpu'))
    card = dataclasses.replace(card, model_args=network.config.model_kwargs)
    written = build_card_folder(Path(config.output) / name, card, network.model, config.results, config.data_name)
    print('Written: ' + ', '.join(map(str, written)))


def _on_hub(model: str) -> str:
    """Hub repository with the pretrained weights of a model, '' if unknown."""
    if model.startswith('hf-hub:'):
        return model.removeprefix('hf-hub:').partition('@')[0]
    known = model in list_pretrained() if split_model_name_tag(model)[1] else is_model(model)
    cfg = get_pretrained_cfg(model) if known else None
    return cfg.hf_hub_id or '' if cfg else ''


class _Training(NamedTuple):
    """What a card says about a training run."""
    objective: str = ''
    command: str = ''
    base_model: str = ''
    train_data: str = ''
    train_split: str = ''


def _training(path: str) -> _Training:
    """What a card says about the run of this args.yaml; empty without a path."""
    if not path:
        return _Training()
    run = read_yaml(path, 'train_args')
    try:
        if not {'objective', 'model'} <= run.keys():
            raise InputError('lacks objective or model')
        only_adversarial = run['objective'] in ('sat', 'nofrost') and run.get('adv_weight') == 1
        return _Training(
            'madry' if only_adversarial else run['objective'], training_command(run),
            _on_hub(run['model']) if run.get('pretrained') else '',
            known_data(run.get('dataset') or '', Path(run.get('data_dir') or '').name), run.get('train_split') or '')
    except InputError as error:
        raise InputError(
            f'is not an args.yaml of timm-robust train ({error})', argument='train_args', value=path) from error
