"""NoFrost compared with other objectives and norms: tables 1, 2, 3 and 5 and figure 2 of the paper, on MNIST digits.

    python train_scripts/reproduce/nofrost.py

`Removing Batch Normalization Boosts Adversarial Training` - https://arxiv.org/abs/2207.01156
`Towards an Adversarially Robust Normalization Approach` (RobustNorm) - https://arxiv.org/abs/2006.11007, figure 2 and
table 4

Trains and measures what is missing. The paper trains ResNets on ImageNet; this script trains small networks on 4,000
digits that ship with a dependency. Writes tables/nofrost.json and tables/nofrost.md.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import common
from common import (
    DIGITS_RECIPE,
    SEEDS,
    accuracies,
    arguments,
    as_printed,
    cells,
    digits,
    evaluated,
    measured,
    outcomes,
    sample,
    table,
    trained,
    write,
)

from timm_robust.evaluation.norm_statistics import LayerStatistics, shift_rows
from timm_robust.settings import from_mapping

EPS = '0.2'
OBJECTIVES = ('standard', 'trades', 'fat', 'trades_fat', 'nofrost')  # norms are compared with the last
NETWORK = 'nofrost_resnet11_mnist'
NORMS = ('batchnorm2d', 'instancenorm2d', 'robustnorm2d')
ATTACKS = ('clean', 'pgd20', 'apgd-ce', 'apgd-dlr', 'mim20', 'cw20', 'rays1000', 'square1000', 'autoattack')
SWEPT = ('pgd20', 'apgd-ce', 'autoattack')  # attacks of the sweep over mixtures of two BatchNorms
SWITCHED = {'batchnorm2d': ('batch',), 'robustnorm2d': ('batch', 'mean')}  # statistics other than tracked ones
PROPERTIES = ('margin', 'thickness', 'smoothness')
REPORT = 'https://github.com/amazon-science/normalizer-free-robust-training/issues/2'
PAPER = {  # tables 1 and 2: percent in the order of ATTACKS; networks have BatchNorm unless trained by nofrost
    'ResNet-26': {
        'standard': (72.68, .01, 0, 0, 0, 0, 18.2, 27.5, 0),
        'sat': (52.65, 10.55, 5.02, 5.30, 8.84, 9.18, 30.5, 44.7, 3.78),
        'trades': (39.64, 9.94, 6.24, 4.02, 8.33, 6.37, 20.7, 32.8, 3.54),
        'fat': (58.72, 6.97, 2.35, 2.68, 6.59, 6.37, 33.6, 50.8, 1.70),
        'trades_fat': (55.65, 11.91, 5.79, 6.14, 10.83, 10.81, 31.1, 46.7, 4.63),
        'nofrost': (70.13, 12.24, 6.34, 6.60, 21.83, 10.18, 34.5, 48.3, 5.04),
    },
    'ResNet-50': {
        'standard': (76.06, .04, 0, 0, 0, 0, 22.5, 31.4, 0),
        'sat': (59.28, 13.57, 7.80, 8.46, 10.28, 11.02, 27.4, 40.2, 6.23),
        'trades': (49.25, 14.80, 9.20, 8.19, 12.97, 11.80, 32.6, 39.5, 6.66),
        'fat': (58.94, 12.45, 5.48, 7.16, 12.56, 12.24, 35.9, 51.4, 4.73),
        'trades_fat': (60.52, 11.67, 4.71, 5.90, 11.28, 10.29, 34.5, 48.6, 3.87),
        'nofrost': (74.06, 22.45, 11.96, 13.37, 27.02, 19.17, 36.1, 43.1, 9.36),
    },
}
PAPER_NORMS = {'batchnorm2d': (52.65, 10.55), 'instancenorm2d': (56.78, 11.06), 'none': (70.13, 12.24)}  # table 3
PAPER_PROPERTIES = {'batchnorm2d': (.3241, 17.51, 4.927), 'none': (.4700, 31.49, 2.996)}  # table 5
RELEASED = 1.28  # the authors' ResNet-50 under AutoAttack, from REPORT


def with_norm(norm: str) -> List[str]:
    """Flags for NETWORK with a norm: convolutions of the same shapes and strides, the same number of parameters."""
    return ['--model', 'robustnorm_resnet50_cifar', '--model-kwargs', 'layers=(1,1,1)', 'channels=(8,16,32)',
            'base_width=128', 'stem_chs=16', 'stem_stride=2', 'avg_down=True', f'norm_layer={norm}']


def flags_of(args: argparse.Namespace) -> List[str]:
    """The flags of every measurement."""
    return ['--data-dir', str(digits()), '--split', 'test', '--eps', EPS, '--num-examples', str(args.num_examples),
            '-b', '100']


def properties_of(found: Dict[str, Any]) -> List[str]:
    """Mean of each property over the images for which it is defined, and their number unless that is all images."""
    shown = []
    for name, values in found['properties'].items():
        wanted = [v for v, right in zip(values, found['correct']) if right or not name.startswith('decision')]
        met = [v for v in wanted if v is not None]
        shown.append(f'{sum(met) / len(met):.3g}' + (f' ({len(met)} of {len(wanted)})' if met != wanted else ''))
    return shown


def attacked(args: argparse.Namespace, run: Path) -> Dict[str, Any]:
    """Accuracy of a network under every attack."""
    results = evaluated(
        run / 'measured' / 'attacks', run, *flags_of(args), '--attacks', ','.join(ATTACKS), '-j', str(args.workers))
    return {'accuracy': list(accuracies(results).values()), 'outcomes': outcomes(results), **sample(results)}


def measure(args: argparse.Namespace, run: Path) -> Dict[str, Any]:
    """Accuracy of a network under every attack, and its properties."""
    properties = measured(
        run / 'measured' / 'properties' / 'properties.json', run, 'properties', *flags_of(args), '-j',
        str(args.workers))
    return {**attacked(args, run), 'properties': properties_of(properties)}


def by_statistics(args: argparse.Namespace, norm: str, tracked: Dict[str, Any], run: Path) -> List[Dict[str, Any]]:
    """Accuracy of a network on clean images, under PGD-20 and under the strongest attack, for each `bn_mode`."""
    clean, *attacked = tracked['accuracy']
    rows = [{'norm': norm, 'statistics': 'population', 'accuracy': [clean, attacked[0], min(attacked)]}]
    for mode in SWITCHED[norm]:
        found = evaluated(
            run / 'measured' / mode, run, *flags_of(args), '--bn-mode', mode, '--attacks',
            'clean,pgd20,adaptive100', '-j', str(args.workers))
        clean, *attacked = accuracies(found).values()
        rows.append({
            'norm': norm, 'statistics': mode, 'accuracy': [clean, attacked[0], min(attacked)], **sample(found)})
    return rows


def trade_off(args: argparse.Namespace, run: Path) -> Dict[str, Any]:
    """Mixtures of a network's two BatchNorms: gamma, clean accuracy, and accuracy under each attack of SWEPT."""
    swept = [evaluated(
        run / 'measured' / attack, run, *flags_of(args), '--checkpoint', str(run / 'last.pth.tar'), '--attacks',
        f'clean,{attack}', '--gamma-sweep', '-j', str(args.workers)) for attack in SWEPT]
    return {'points': [
        [points[0].gamma, points[0].clean, *(p.robust for p in points)]
        for points in zip(*(report.gamma_sweep for report in swept))], 'samples': list(map(sample, swept))}


def tables(found: Dict[str, Any]) -> List[str]:
    """The parts of the page."""
    objectives, norms = found['objectives'], found['norms']
    one = norms[0]
    header = [*(f'{a} %' for a in ATTACKS)]
    return [
        '# NoFrost, at small scale', 'Generated by `train_scripts/reproduce/nofrost.py`.',
        f"4,000 MNIST digits for training, {one['num_examples']:,} others for testing, {one['threat_model']}, seed "
        f"{one['seed']}; one training run each with `train_scripts/recipes/digits.yaml`, seed 0 unless shown. Each "
        'attack ran on all images classified correctly.',
        f"The paper's figures are of networks trained on ImageNet, Linf 8/255. [Others]({REPORT}) measured "
        f"{RELEASED} % under AutoAttack for the authors' ResNet-50, trained by NoFrost; the paper has "
        f"{PAPER['ResNet-50']['nofrost'][-1]} %. The abstract has 23.56 % under PGD, table 2 has "
        f"{PAPER['ResNet-50']['nofrost'][1]} %.",
        '## Objectives (tables 1 and 2)',
        f'Ours are {NETWORK}, without normalization; sat is objective nofrost with BatchNorm. In the paper all but '
        'nofrost have BatchNorm.',
        table(['objective', 'network', *header], [
            row for r in [*objectives, {**norms[1], 'objective': 'sat'}] for row in (
                [r['objective'], 'ours', *cells(r['accuracy'])],
                *([r['objective'], f'the paper, {network}', *as_printed(found[r['objective']])]
                  for network, found in PAPER.items()))]),
        '## Norms, objective nofrost (table 3, and RobustNorm)',
        f'{NETWORK}, and networks with a norm, convolutions of the same shapes and strides, and the same number of '
        "parameters. Without a norm, weights are standardized and blocks are pre-activation, as in timm's NF-ResNets. "
        'The last two columns are from the paper (ResNet-26).',
        table(['norm', *header, 'the paper, clean %', 'the paper, PGD %'],
              [[r['norm'], *cells(r['accuracy']), *as_printed(PAPER_NORMS.get(r['norm'], (None, None)))]
               for r in norms]),
        *(['The same with other seeds of the training, for the two networks that the claims are about:',
           table(['norm', 'training seed', *header],
                 [[r['norm'], str(r['training_seed']), *cells(r['accuracy'])] for r in found['further_seeds']]),
           ] if found['further_seeds'] else []),
        '## Properties (table 5)',
        f'Mean decision margin (L2, images classified correctly), boundary thickness (L2) and smoothness (KL within '
        f"{one['threat_model']}) by attacks of 20 steps. Brackets give the number of images with a boundary if some "
        'have none; the mean is over these images and therefore too low. '
        "The paper's figures are of ResNet-26; its perturbations have another size and scale.",
        table(['objective', 'norm', *PROPERTIES, *(f'the paper, {name}' for name in PROPERTIES)], [
            *([r['objective'], 'none', *r['properties'], *'---'] for r in objectives[:-1]),
            *([OBJECTIVES[-1], r['norm'], *r['properties'], *as_printed(PAPER_PROPERTIES.get(r['norm'], (None,) * 3))]
              for r in norms)]),
        '## Two BatchNorms (figure 2)',
        'Objective mbnat: gamma is the weight of the BatchNorm of adversarial images. The last row is objective '
        f'nofrost, {NETWORK}.',
        table(['gamma', 'clean %', *(f'{a} %' for a in SWEPT)],
              [*([f'{gamma:g}', *cells(values)] for gamma, *values in found['trade_off']['points']),
               ['none, no norm', *cells(one['accuracy'][ATTACKS.index(a)] for a in ('clean', *SWEPT))]]),
        '## Statistics of the batch under adversarial training (RobustNorm, table 4)',
        'BatchNorm and RobustNorm, objective nofrost, batches of 100. With population statistics "strongest" is the '
        'lowest accuracy of the network in the table of norms above; with the others it is the stronger of PGD-20 and '
        "the adaptive attack on whole batches, which is not comparable. In the paper's table 4, batch statistics raise "
        'the accuracy of BatchNorm on CIFAR-10 under PGD by 101.7 % (relative) after normal and by 30.5 % after '
        'adversarial training.',
        table(['norm', 'statistics', 'clean %', 'pgd20 %', 'strongest %'],
              [[r['norm'], r['statistics'], *cells(r['accuracy'])] for r in found['by_statistics']]),
        '## Statistics of BatchNorm under attack (RobustNorm, figure 2)',
        'Distance of batch means from the tracked means in tracked standard deviations, and of variances as |log '
        'ratio|, for clean batches and for batches attacked by PGD-20 with tracked statistics; network with BatchNorm.',
        table(['layer', 'clean mean', 'clean variance', 'adversarial mean', 'adversarial variance'],
              [[name, *cells(values, 3)] for name, *values in found['statistics']])]


def everything(args: argparse.Namespace) -> Dict[str, Any]:
    """All figures of the runs with seed 0."""
    data = ['--data-dir', str(digits()), '-j', str(args.workers)]
    runs = Path(args.output)
    objectives = [
        {'objective': name, **measure(args, trained(
            runs / f'{name}_none', DIGITS_RECIPE, '--objective', name, *data))} for name in OBJECTIVES]
    by_norm = {n: trained(runs / f'resnet11_{n}', DIGITS_RECIPE, *with_norm(n), *data) for n in NORMS}
    normed = {norm: {'norm': norm, **measure(args, run)} for norm, run in by_norm.items()}
    mbnat = trained(
        runs / 'resnet11_mbnat', DIGITS_RECIPE, *with_norm('batchnorm2d'), '--objective', 'mbnat', *data)
    layers = measured(
        by_norm['batchnorm2d'] / 'measured' / 'statistics' / 'statistics.json', by_norm['batchnorm2d'], 'statistics',
        *flags_of(args), '-j', str(args.workers), '--attacks', 'clean,pgd20')['layers']
    clean, adversarial = (
        {name: from_mapping(LayerStatistics, values) for name, values in layers[kind].items()}
        for kind in ('clean', 'adversarial'))
    return {
        'attacks': ATTACKS, 'objectives': objectives,
        'norms': [{**objectives[-1], 'norm': 'none'}, *normed.values()], 'trade_off': trade_off(args, mbnat),
        'by_statistics': [row for n in SWITCHED for row in by_statistics(args, n, normed[n], by_norm[n])],
        'statistics': shift_rows(clean, adversarial, root=True)}


def further_seed(args: argparse.Namespace, norm: str, seed: int) -> Dict[str, Any]:
    """Accuracy of one of the two networks of the claims, trained with another seed."""
    flags = ['--objective', OBJECTIVES[-1]] if norm == 'none' else with_norm(norm)
    run = trained(
        Path(args.output) / f'{norm}_seed{seed}', DIGITS_RECIPE, *flags, '--data-dir', str(digits()), '-j',
        str(args.workers), '--seed', str(seed))
    return {'norm': norm, 'training_seed': seed, **attacked(args, run)}


def main() -> None:
    """Measure and write the tables."""
    parser = arguments(__doc__, 'nofrost', num_examples=200)
    parser.add_argument(
        '--seeds', default=SEEDS, nargs='+', type=int, metavar='S',
        help='seeds of the training runs; without 0, the figures of seed 0 in the table are kept')
    args = parser.parse_args()
    path = common.HERE / 'tables' / 'nofrost.json'
    found = everything(args) if 0 in args.seeds else json.loads(path.read_text())
    if found['norms'][0]['num_examples'] != args.num_examples:
        sys.exit(f'{path}: has another number of test images; give --seeds 0 as well')
    found['further_seeds'] = [
        further_seed(args, norm, seed) for norm in ('none', NORMS[0]) for seed in args.seeds if seed]
    write('nofrost', found, tables(found))


if __name__ == '__main__':
    main()
