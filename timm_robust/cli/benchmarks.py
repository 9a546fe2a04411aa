"""`timm-robust eval --benchmarks`: accuracy on corruptions and other shifts of distribution."""
import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from timm.utils import init_distributed_device, is_primary
from tqdm import tqdm

from ..data import balanced_indices, check_classes, check_images, class_names, dataset_labels
from ..data.corruptions import COMMON_CORRUPTIONS, CORRUPTIONS, SEVERITIES, CorruptedDataset, check_library
from ..data.shifts import CIFAR_C, FOLDERS, Part, cifar_c, imagenet_c, imagenet_shift
from ..errors import InputError
from ..evaluation import EvaluationReport, Journal, ThreatFacts
from ..evaluation.shifts import evaluate_shift, summarize_shifts
from ..inputs import Network, open_dataset, pixel_loader, resolve_device
from ..layers import has_batch_statistics
from ..settings import to_mapping
from .inputs import images_config, open_network, read_threat
from .outputs import data_facts, model_facts, own_positions, resumable_output, run_facts

__all__ = ['add_benchmark_arguments', 'run_benchmarks']

_OF_ATTACKS = (
    'attacks', 'norm', 'eps', 'step_size', 'restarts', 'num_targets', 'worst_case', 'eps_sweep', 'sweep', 'exact',
    'search_dtype', 'diagnose', 'surrogate', 'surrogate_checkpoint', 'subset')
_NAMES = ('clean', 'corruptions', *FOLDERS)


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmarks."""
    group = parser.add_argument_group('Benchmark parameters')
    group.add_argument('--benchmarks', default='', metavar='NAMES',
                       help='in place of attacks, comma-separated: clean and corruptions (made on the fly) of the data '
                            'set; c, r, a, sketch, stylized (of ImageNet), cifar10-c, cifar100-c, as NAME=FOLDER or by '
                            f"their names in --data-dir ({', '.join(FOLDERS.values())})")
    group.add_argument('--corruptions', default=None, nargs='+', metavar='NAME',
                       help='of c, cifar10-c, cifar100-c and corruptions: names, or all with the four of validation '
                            '(default: the 15)')
    group.add_argument('--severities', default=list(SEVERITIES), type=int, nargs='+', metavar='S',
                       help='of corruptions (default: 1 2 3 4 5)')


def _read_names(args: argparse.Namespace) -> Dict[str, str]:
    """Folder by benchmark; empty for the data set itself."""
    found = {}
    for text in filter(None, args.benchmarks.split(',')):
        name, _, folder = text.partition('=')
        if name not in _NAMES:
            raise InputError(f"--benchmarks {name}: unknown, choose of {', '.join(_NAMES)}")
        if name in found:
            raise InputError(f'--benchmarks {name}: named twice')
        if folder and name not in FOLDERS:
            raise InputError(f'--benchmarks {text}: is of the data set, give its folder as --data-dir')
        if name in FOLDERS and not (folder or args.data_dir):
            raise InputError(f'--benchmarks {name}: name its folder, {name}=FOLDER, or one above it in --data-dir')
        found[name] = folder or (str(Path(args.data_dir) / FOLDERS[name]) if name in FOLDERS else '')
    return found


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser, names: Dict[str, str]) -> None:
    for dest in _OF_ATTACKS:
        if getattr(args, dest) != parser.get_default(dest):
            raise InputError(
                f"--{dest.replace('_', '-')} {getattr(args, dest)}: --benchmarks attacks nothing, leave it out and "
                'evaluate attacks by themselves')
    if args.corruptions is None:
        args.corruptions = list(COMMON_CORRUPTIONS)
    elif args.corruptions == ['all']:
        args.corruptions = list(CORRUPTIONS)
    for name in args.corruptions:
        if name not in CORRUPTIONS:
            raise InputError(f"--corruptions {name}: unknown, choose of {', '.join(CORRUPTIONS)} or all")
    for severity in args.severities:
        if severity not in SEVERITIES:
            raise InputError(f'--severities {severity}: must be from 1 to 5')
    for flag in ('corruptions', 'severities'):
        if len(set(getattr(args, flag))) < len(getattr(args, flag)):
            raise InputError(f"--{flag} {' '.join(map(str, getattr(args, flag)))}: names one twice")
    if 'corruptions' in names:
        check_library('--benchmarks corruptions')
    if args.num_examples is not None and args.num_examples < 1:
        raise InputError(f'--num-examples {args.num_examples}: must be at least 1')


def _refuse_union(args: argparse.Namespace, dataset: Any, names: Dict[str, str]) -> None:
    """timm reads all of --data-dir where it has no folder of the split."""
    root = getattr(getattr(dataset, 'reader', None), 'root', None)
    inside = [f for f in filter(None, names.values()) if root and Path(root).resolve() in Path(f).resolve().parents]
    if inside:
        raise InputError(
            f'--split {args.split}: --data-dir {args.data_dir} has no such folder, and {inside[0]} would be taken for '
            'clean images: name the folder of clean images in --data-dir and those of benchmarks by NAME=FOLDER')


def _choose(args: argparse.Namespace, part: Part) -> List[int]:
    """Indices of the images of a part, which is looked at for it."""
    dataset = part.open()
    part.size = len(dataset)
    if args.num_examples is None and part.expected not in (None, part.size):
        raise InputError(
            f'--benchmarks {part.key}: there are {part.size:,} images, published are {part.expected:,}: complete them, '
            'or take some by --num-examples')
    if args.num_examples is not None and args.num_examples > part.size:
        raise InputError(f'--num-examples {args.num_examples}: {part.key} has {part.size:,} images')
    return balanced_indices(dataset_labels(dataset), part.size, args.num_examples, args.seed)


def _open_parts(args, names: Dict[str, str], network: Network) -> List[Part]:
    parts: List[Part] = []
    num_classes, data_config = network.num_classes, network.preprocessing
    channels, base = data_config['input_size'][0], None
    if {'clean', 'corruptions'} & set(names):
        base = open_dataset(images_config(args), args.split, channels, seed=args.seed)
        _refuse_union(args, base, names)
        own = class_names(base)
        check_classes(base, num_classes, network.class_names(own), allow_mismatch=args.allow_class_mismatch)
    for name, folder in names.items():
        wanted = CIFAR_C.get(name, 1000)
        if name in FOLDERS and num_classes != wanted:
            raise InputError(f'--benchmarks {name}: has {wanted} classes, {args.model} {num_classes}')
        if name in FOLDERS and channels != 3:
            raise InputError(f'--benchmarks {name}: has 3 channels, {args.model} takes {channels}')
        if name == 'clean':
            parts.append(Part(name, lambda: base))
        elif name == 'corruptions':
            parts += [
                Part(f'{name}/{c}/{s}', lambda c=c, s=s: CorruptedDataset(base, data_config, c, s, args.seed),
                     stored_size=tuple(data_config['input_size'][1:]))
                for c in args.corruptions for s in args.severities]
        elif name == 'c':
            parts += imagenet_c(Path(folder), args.corruptions, args.severities)
        elif name in CIFAR_C:
            parts += cifar_c(name, Path(folder), args.corruptions, args.severities)
        else:
            parts += imagenet_shift(name, Path(folder))
    return parts


def run_benchmarks(args: argparse.Namespace, argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Evaluate on benchmarks, with the arguments of `timm-robust eval`."""
    names = _read_names(args)
    _check(args, parser, names)
    read_threat(args)
    args.device = resolve_device(args.device)
    device = init_distributed_device(args)
    try:
        _evaluate(args, argv, names, device)
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def _evaluate(args: argparse.Namespace, argv: Sequence[str], names: Dict[str, str], device: torch.device) -> None:
    output = resumable_output(args, 'results.json')
    network = open_network(args, device)
    pixel_model, data_config = network.pixel_model, network.preprocessing
    parts = _open_parts(args, names, network)
    facts = model_facts(args, network.model, data_config)
    batch_dependent = has_batch_statistics(pixel_model)
    settings = {'seed': args.seed, 'num_examples': args.num_examples,
                **({'batch_size': args.batch_size} if batch_dependent else {})}
    # before any is evaluated, so that what does not fit is said at once
    chosen = {part.key: _choose(args, part) for part in parts}
    images = hashlib.sha256(json.dumps([[p.key, p.size, chosen[p.key]] for p in parts]).encode()).hexdigest()
    data = {k: getattr(args, k) for k in ('dataset', 'data_dir', 'split', 'class_map', 'input_img_mode')}
    journal = Journal(
        output, {**to_mapping(facts), 'benchmarks': names, **data, **settings, 'images': images}, args.resume,
        args.rank)
    if args.distributed:
        torch.distributed.barrier()
    with journal, tqdm(parts, unit='set', disable=None if is_primary(args) else True) as bar:
        for part in bar:
            bar.set_description_str(part.key)
            indices = chosen[part.key]
            own = [indices[i] for i in own_positions(len(indices), args, batch_dependent)]
            todo = [i for i in own if i not in journal.correct[part.key]]
            if batch_dependent and todo:
                todo = own  # a prediction holds within its batch only
            if todo:
                dataset = part.open()
                check_images(getattr(dataset, 'dataset', dataset), todo)
                config = {**data_config, 'crop_pct': 1.} if part.stored_size else data_config
                loader = pixel_loader(
                    dataset, todo, config, device, batch_size=args.batch_size, workers=args.workers,
                    pin_mem=args.pin_mem)
                evaluate_shift(pixel_model, loader, todo, part.key, journal, device, part.classes)
    if args.distributed:
        journal.merge()
    if not is_primary(args):
        return
    report = EvaluationReport(
        model=facts,
        data=data_facts(args),
        threat=ThreatFacts('', 0., 'no attack'),
        settings=run_facts(args, 'eval', argv, batch_dependent=batch_dependent, device=str(device)),
        benchmarks=tuple(summarize_shifts(parts, chosen, journal, tuple(data_config['input_size'][1:]))))
    written = report.save(output)
    for path in output.glob('progress-*.jsonl'):
        path.unlink()
    print(f'\n{report}')
    print('\nWritten: ' + ', '.join(map(str, written)))
