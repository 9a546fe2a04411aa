"""The picture of the README: an undefended and a hardened network under attack.

    python train_scripts/reproduce/readme_picture.py --data-dir cifar10

Measures both networks on lossless CIFAR-10 and writes docs/undefended_and_hardened.png. The picture shows the
first of the measured images that both networks classify correctly.
"""
import argparse
from typing import Dict, Tuple

import timm
import torch
from common import HERE
from matplotlib.figure import Figure
from timm.data import create_dataset
from torchvision.transforms.functional import to_tensor

from timm_robust import Linf, NormalizedModel, evaluate
from timm_robust.attacks import PGD
from timm_robust.evaluation import EvaluationReport
from timm_robust.models._build import classes_of

NETWORKS = {
    'undefended': 'resnet20_cifar.standard_cifar10',
    'hardened': 'nofrost_nfnet18_cifar.madry_linf8_cifar10'}
COLORS = {'undefended': '#b3261e', 'hardened': '#1a5fb4'}
EPS, SHOWN, STEPS = 8, 4, 20


def chosen(reports: Dict[str, EvaluationReport], data_dir: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """The first images, in [0, 1], that both networks classify correctly, and their labels."""
    first, second = reports.values()
    assert first.data.indices == second.data.indices, 'the networks were measured on different images'
    pairs = zip(first.data.indices, first['clean'].correct, second['clean'].correct)
    places = [index for index, a, b in pairs if a and b][:SHOWN]
    dataset = create_dataset('', root=data_dir, split='test')
    images, labels = zip(*(dataset[i] for i in places))
    return torch.stack([*map(to_tensor, images)]), torch.tensor(labels)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder of test/CLASS/*.png')
    parser.add_argument('--num-examples', type=int, default=200, metavar='N')
    args = parser.parse_args()
    sweep = [f'{i}/255' for i in range(0, EPS + 1, 2)]
    reports = {label: evaluate(
        name, args.data_dir, split='test', num_examples=args.num_examples, attacks=f'clean,pgd{STEPS}',
        threat=Linf(f'{EPS}/255'), eps_sweep=sweep, diagnose=False, workers=0) for label, name in NETWORKS.items()}
    images, labels = chosen(reports, args.data_dir)
    names = classes_of('cifar10')

    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    grid = left.subplots(2, SHOWN)
    left.suptitle(f'Attacked images (PGD-{STEPS}, Linf {EPS}/255) and what the networks see', fontsize=10)
    for row, (label, name) in zip(grid, NETWORKS.items()):
        model = NormalizedModel(timm.create_model(name, pretrained=True)).eval()
        attacked = PGD(steps=STEPS)(model, images, labels, Linf(f'{EPS}/255'), seed=0)
        with torch.no_grad():
            predictions = model(attacked).argmax(1)
        for axes, image, label_index, prediction in zip(row, attacked, labels, predictions):
            axes.imshow(image.permute(1, 2, 0), interpolation='nearest')
            axes.set(xticks=[], yticks=[])
            right_answer = prediction == label_index
            axes.set_title(names[prediction], fontsize=9, color='#1b5e20' if right_answer else '#b3261e')
        row[0].set_ylabel(label, fontsize=10)
    axes = right.subplots()
    for label, report in reports.items():
        axes.plot([255 * p.eps for p in report.eps_sweep], [p.accuracy for p in report.eps_sweep], 'o-', label=label,
                  color=COLORS[label])
    axes.set(xlabel='eps (of 255)', ylabel='accuracy %', ylim=(0, 100))
    axes.set_title(f'PGD-{STEPS}, Linf, {args.num_examples} CIFAR-10 test images, seed 0', fontsize=10)
    axes.grid(alpha=.3)
    axes.legend()
    figure.savefig(HERE.parents[1] / 'docs' / 'undefended_and_hardened.png', dpi=110)
    for label, report in reports.items():
        print(label, NETWORKS[label], [f'{p.eps * 255:g}: {p.accuracy:.1f}' for p in report.eps_sweep])


if __name__ == '__main__':
    main()
