"""`timm-robust eval`: clean and robust accuracy of any timm model."""
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import List

import torch
from timm.data import create_loader
from timm.models import safe_model_name
from torch.utils.data import IterableDataset, Subset

from ..attacks import ThreatModel
from ..attacks.threat import NORMS
from ..data import balanced_indices, check_images, check_labels, dataset_labels
from ..errors import InputError
from ..evaluate import evaluate_attacks, parse_attacks, plot_eps_sweep, plot_images, weights_sha256, write_results
from ..evaluate.accuracy import sweep_eps
from ..evaluate.report import evaluation_table
from ..layers import NORM_STATISTICS, has_batch_statistics, set_norm_statistics
from ..models import NormalizedModel
from ..train.build import build_model, resolve_data, resolve_device
from ..train.checkpoint import load_weights
from ..train.datasets import open_dataset
from .arguments import Parser, add_data_arguments, add_model_arguments, apply_config, start_logging

__all__ = ['build_parser', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust eval`."""
    import argparse
    parser = Parser(prog='timm-robust eval', description='Measure clean and robust accuracy of a timm model.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for these flags')
    group = parser.add_argument_group('Attack parameters')
    group.add_argument('--attacks', default='clean,fgsm,pgd20', metavar='NAMES',
                       help='comma-separated: clean, fgsm, fgsm_rs, and bim, pgd, pgd_targeted, mim, cw with a number '
                            'of steps (default: %(default)s)')
    group.add_argument('--norm', default='linf', metavar='NORM', help='linf or l2 (default: linf)')
    group.add_argument('--eps', default='8/255', help='perturbation size in pixel units on [0, 1] (default: 8/255)')
    group.add_argument('--step-size', default=None, metavar='SIZE', help='attack step (default: 2.5 eps / steps)')
    group.add_argument('--restarts', type=int, default=1, metavar='N', help='random restarts (default: 1)')
    group.add_argument('--eps-sweep', default='', metavar='LIST',
                       help='also draw accuracy over these eps under the last attack, e.g. 0,2/255,4/255,8/255')
    group.add_argument('--norm-statistics', default=None, metavar='MODE',
                       help='normalize by population, batch or (RobustNorm) mean statistics (default: of the model)')
    group.add_argument('--seed', type=int, default=0, metavar='S', help='seed of subset and noise (default: 0)')
    group.add_argument('--save-images', type=int, default=0, metavar='N', nargs='?', const=8,
                       help='save a sheet of N clean and adversarial images')
    group.add_argument('--output', default='', metavar='DIR',
                       help='folder for results (default: ./output/eval/TIME-MODEL)')
    group = add_data_arguments(parser)
    group.add_argument('--split', default='validation', metavar='NAME', help='split (default: validation)')
    group.add_argument('--num-examples', type=int, default=None, metavar='N',
                       help='evaluate a seeded, class-balanced subset (default: all)')
    group = add_model_arguments(parser)
    group.add_argument('--checkpoint', default='', metavar='PATH', help='weights to load, safetensors or checkpoint')
    group.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=True,
                       help='prefer averaged weights of the checkpoint (default: yes)')
    return parser


def _sweep(args, last) -> dict:
    """One attack for each eps of --eps-sweep, after the manner of the last attack."""
    specs = {}
    for text in filter(None, args.eps_sweep.split(',')):
        try:
            threat = ThreatModel(args.norm, text)
        except InputError as error:
            raise InputError(f'--eps-sweep {args.eps_sweep}: {error}') from error
        name = last.name if threat.eps else 'clean'
        specs[threat.eps] = parse_attacks(name, threat, None, args.restarts)[0]
    return specs


def run(argv: List[str]) -> None:
    """Evaluate."""
    parser = build_parser()
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    if args.norm not in NORMS:
        raise InputError(f"--norm {args.norm}: unknown, choose one of {', '.join(NORMS)}")
    try:
        threat = ThreatModel(args.norm, args.eps)
        step_size = None if args.step_size is None else ThreatModel('l2', args.step_size).eps
    except InputError as error:
        raise InputError(f'--eps {args.eps} / --step-size {args.step_size}: {error}') from error
    if step_size == 0:
        raise InputError(f'--step-size {args.step_size}: must be positive, for example 2/255')
    if args.restarts < 1:
        raise InputError(f'--restarts {args.restarts}: must be at least 1')
    specs = parse_attacks(args.attacks, threat, step_size, args.restarts)
    attacks = [s for s in specs if s.function]
    if args.eps_sweep and not attacks:
        raise InputError(f'--eps-sweep {args.eps_sweep}: needs an attack in --attacks, for example pgd20')
    sweep_specs = _sweep(args, attacks[-1]) if args.eps_sweep else {}
    if args.batch_size < 1:
        raise InputError(f'--batch-size {args.batch_size}: must be at least 1')
    if args.norm_statistics is not None and args.norm_statistics not in NORM_STATISTICS:
        raise InputError(
            f"--norm-statistics {args.norm_statistics}: unknown, choose one of {', '.join(NORM_STATISTICS)}")
    device = torch.device(resolve_device(args.device))
    output = Path(args.output or Path('output/eval') / (
        datetime.now().strftime('%Y%m%d-%H%M%S') + '-' + safe_model_name(args.model)))
    if (output / 'results.json').exists():
        raise InputError(f'--output {output}: already holds results.json, choose another folder')

    args.pretrained = args.pretrained or not args.checkpoint  # as timm's validate.py: never random weights
    model = build_model(args)
    if args.checkpoint:
        load_weights(model, args.checkpoint, use_ema=args.use_ema)
    if args.norm_statistics:
        try:
            set_norm_statistics(model, args.norm_statistics)
        except ValueError as error:
            raise InputError(f'--norm-statistics {args.norm_statistics}: {error}') from error
    if args.batch_size == 1 and has_batch_statistics(model):
        raise InputError(
            '--batch-size 1: this network normalizes by the statistics of the batch, use a larger batch or '
            '--norm-statistics population')
    data_config = resolve_data(args, model)
    in_chans = data_config['input_size'][0]
    dataset = open_dataset(args, args.split, in_chans)
    if isinstance(dataset, IterableDataset):
        raise InputError(f'--dataset {args.dataset}: streaming data has no index, use a data set with one')
    check_labels(None, dataset, model.num_classes)
    indices = balanced_indices(dataset_labels(dataset), len(dataset), args.num_examples, args.seed)
    check_images(dataset, indices)

    def make_loader():
        return create_loader(
            subset,
            input_size=data_config['input_size'],
            batch_size=args.batch_size,
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            crop_mode=data_config['crop_mode'],
            mean=(0.,) * in_chans,
            std=(1.,) * in_chans,
            num_workers=args.workers,
            pin_memory=args.pin_mem,
            device=device,
            persistent_workers=False,
        )

    subset = Subset(dataset, indices)
    make_loader()
    dataset.transform = subset.transform  # timm sets the transform on the subset, which does not apply it
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    pixel_model = NormalizedModel(model, data_config['mean'], data_config['std'])
    pixel_model.to(device=device, memory_format=memory_format).eval()

    common = dict(device=device, seed=args.seed)
    evaluation = evaluate_attacks(
        pixel_model, make_loader(), indices, specs, num_examples_kept=args.save_images, **common)
    curve = sweep_eps(pixel_model, make_loader, indices, sweep_specs, **common) if sweep_specs else None

    output.mkdir(parents=True, exist_ok=True)
    write_results(
        output / 'results.json',
        evaluation,
        threat,
        model={
            'name': args.model,
            'checkpoint': args.checkpoint,
            'use_ema': args.use_ema,
            'model_kwargs': args.model_kwargs,
            'norm_statistics': args.norm_statistics,
            'num_classes': model.num_classes,
            'weights_sha256': weights_sha256(model),
            **{k: data_config[k] for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        },
        data={'dataset': args.dataset or 'ImageFolder', 'data_dir': args.data_dir, 'split': args.split,
              'num_images': len(dataset)},
        settings={'seed': args.seed, 'batch_size': args.batch_size, 'device': str(device), 'dtype': 'float32',
                  'command': shlex.join(['timm-robust', 'eval', *argv]),
                  'date': datetime.now(timezone.utc).isoformat(timespec='seconds')},
        eps_sweep=curve,
    )
    what = f'{args.model}{" " + args.checkpoint if args.checkpoint else ""}'
    print(f'\n{what} on {args.dataset or args.data_dir} ({args.split})\n')
    print(evaluation_table(evaluation, threat, args.seed))
    written = [output / 'results.json']
    caption = f'{attacks[-1].name}, {threat}, {len(indices)} images, seed {args.seed}' if attacks else ''
    if curve:
        written.append(output / 'eps_sweep.png')
        plot_eps_sweep({attacks[-1].name: curve}, args.norm, f'{args.model}\n{caption}', written[-1])
    if args.save_images and evaluation.examples:
        written.append(output / 'images.png')
        names = sorted(getattr(getattr(dataset, 'reader', None), 'class_to_idx', {}) or getattr(dataset, 'classes', []))
        plot_images(evaluation.examples, names or None, f'{args.model}: {caption}', written[-1])
    print('\nWritten: ' + ', '.join(map(str, written)))
