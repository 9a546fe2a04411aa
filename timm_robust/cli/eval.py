"""`timm-robust eval`: clean and robust accuracy of any timm model, and accuracy on shifted images."""
import csv
import dataclasses
import io
import os
import shlex
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch

from ..errors import InputError
from ..evaluation import EvalConfig, EvaluationReport, ThreatConfig, evaluate
from ..inputs import ImagesConfig, NetworkConfig, init_process, write_text
from ..inputs.pretrained import read_config, resolve_name
from ..settings import from_flat
from .arguments import SettingsParser, start_logging
from .flags import add_attack_flags
from .outputs import new_file, new_folder, print_next

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
    parser.add_argument(
        '--results-file', metavar='FILENAME', help="also write accuracies as CSV, like timm's validate.py")
    return parser, add_attack_flags(parser)


def build_parser() -> SettingsParser:
    """The parser of `timm-robust eval`."""
    return _parser()[0]


def results_csv(report: EvaluationReport) -> str:
    """The results file of timm's validate.py, with a column for each attack instead of top-5 accuracy."""
    model = report.model
    row: Dict[str, Any] = {'model': model.name}
    if report.clean_accuracy is not None:
        row.update(top1=round(report.clean_accuracy, 4), top1_err=round(100 - report.clean_accuracy, 4))
    several = len(report.threats) > 1
    row.update({
        report.described(a) + (f' {a.threat}' if several else ''): round(report.accuracy(a.name), 4)
        for a in report.real_attacks})
    row.update(
        threat=str(report.threat), num_examples=report.data.num_examples, seed=report.settings.seed,
        img_size=(model.input_size or ('',))[-1],
        crop_pct=model.crop_pct, interpolation=model.interpolation)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row))
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue()


def run(argv: List[str]) -> None:
    """Evaluate a network; print and write the report."""
    parser, attack_flags = _parser()
    values = parser.read(argv)
    results_file = new_file(values['results_file'], '.csv', 'results_file') if 'results_file' in values else None
    start_logging()
    network, images = from_flat(NetworkConfig, values), from_flat(ImagesConfig, values)
    threat = from_flat(ThreatConfig, values)
    for name in ('norm', 'eps'):
        if name in values and 'threat' in values:
            raise InputError('conflicts with `threat`', 'pass only one of them', argument=name, value=values[name])
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
    if results_file:
        write_text(results_file, results_csv(report))
    print(f'\n{report}')
    print(f'\nWritten to {config.output}: ' + ', '.join(sorted(os.listdir(config.output))))
    best = Path(network.model).parent / 'model_best.pth.tar'
    exported = read_config(resolve_name(network.model))
    if exported and best.is_file() and report.attacks:  # exported by `timm-robust train`
        print_next('card', {
            'checkpoint': str(best), 'results': [str(Path(config.output) / 'results.json')],
            'data_name': [Path(images.data_dir or images.dataset).name], 'train_args': str(best.with_name('args.yaml')),
            'repo_id': 'ME/MINE'}, [f"{exported['architecture']}.{best.parent.name}"])
