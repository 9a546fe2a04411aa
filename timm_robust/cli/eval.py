"""`timm-robust eval`: clean and robust accuracy of any timm model, and accuracy on shifted images."""
import dataclasses
import os
import shlex
from pathlib import Path
from typing import Dict, List, Tuple

import torch

from ..errors import InputError
from ..evaluation import EvalConfig, ThreatConfig, evaluate
from ..evaluation.render import findings_text
from ..inputs import ImagesConfig, NetworkConfig, init_process
from ..inputs.pretrained import read_config, resolve_name
from ..settings import from_flat
from .arguments import SettingsParser, start_logging
from .flags import add_attack_flags
from .outputs import new_folder, print_next

__all__ = ['build_parser', 'run']


def _parser() -> Tuple[SettingsParser, Dict[str, str]]:
    parser = SettingsParser(
        ThreatConfig, EvalConfig, ImagesConfig, NetworkConfig, data=True, prog='timm-robust eval',
        description='Measure clean and robust accuracy of a timm model.',
        examples=(
            'timm-robust eval "my data" --model output/train/mine/export --attacks clean,pgd20,autoattack',
            'timm-robust eval cifar10 --model nofrost_resnet20_cifar --split test --num-examples 1000 --eps 8/255',
            'timm-robust eval "my data" --model resnet50 --pretrained --benchmarks corruptions --severities 1 3 5'),
        first=(
            'config', 'norm', 'eps', 'attacks', 'worst_case', 'diagnose', 'benchmarks', 'seed', 'output', 'resume',
            'data_dir', 'dataset', 'split', 'num_examples', 'batch_size', 'workers', 'model', 'pretrained',
            'num_classes', 'device', 'checkpoint'))
    return parser, add_attack_flags(parser)


def build_parser() -> SettingsParser:
    """The parser of `timm-robust eval`."""
    return _parser()[0]


def run(argv: List[str]) -> None:
    """Evaluate."""
    parser, attack_flags = _parser()
    values = parser.read(argv)
    start_logging()
    network, images = from_flat(NetworkConfig, values), from_flat(ImagesConfig, values)
    threat = from_flat(ThreatConfig, values)
    for name in ('norm', 'eps'):
        if name in values and 'threat' in values:
            raise InputError('says what `threat` says too', 'give one of them', argument=name, value=values[name])
    try:
        config = from_flat(EvalConfig, {
            'threat': threat.threat, **values, 'output': values.get('output') or new_folder('eval', network.model),
            'attack_settings': {name: values[flag] for name, flag in attack_flags.items() if flag in values},
            'command': shlex.join(['timm-robust', 'eval', *argv])})
    except InputError as error:
        of_eps = error.argument == 'threat' and 'threat' not in values
        raise (error.about('eps', threat.eps) if of_eps else error) from error
    process = init_process(network.device)
    try:
        report = evaluate(
            dataclasses.replace(network, device=str(process.device)), images,
            **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    finally:
        if process.distributed:
            torch.distributed.destroy_process_group()
    if not process.primary:
        return
    print(f'\n{report}')
    if report.findings:
        print('\nIs the robustness real?\n\n' + findings_text(report.findings))
    print(f'\nWritten to {config.output}: ' + ', '.join(sorted(os.listdir(config.output))))
    best = Path(network.model).parent / 'model_best.pth.tar'
    exported = read_config(resolve_name(network.model))
    if exported and best.is_file() and report.attacks:  # of `timm-robust train`
        print_next('card', {
            'checkpoint': str(best), 'results': [str(Path(config.output) / 'results.json')],
            'data_name': [Path(images.data_dir or images.dataset).name], 'train_args': str(best.with_name('args.yaml')),
            'repo_id': 'ME/MINE'}, [f"{exported['architecture']}.{best.parent.name}"])
