"""`timm-robust quickstart`: the effect of adversarial training, shown on real digits in minutes.

Trains the same small network twice, once normally and once on adversarial images only (objective madry), with the same
images, epochs, optimizer and seed. Then attacks both networks.
"""
import sys
import time
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from timm.models import create_model, save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed, unwrap_model
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms.v2 import RandomCrop

from ..attacks import InputSpace, Linf
from ..data.samples import load_digits
from ..errors import InputError
from ..evaluation import EvaluationReport, evaluate
from ..evaluation.render import plot_eps_sweep, plot_images, text_table
from ..tasks import Madry, Objective, Standard, TrainingAttack, create_task
from ..training.loop import train_one_epoch
from .arguments import Parser, start_logging

__all__ = ['run', 'train_digits']

MODEL = 'nofrost_resnet11_mnist'
EPS = 0.2
EVAL_BATCH = 250
SWEEP = (0., .1, .2, .3)
SWEEP_IMAGES = 250

ATTACK = TrainingAttack(eps=EPS, eps_warmup_epochs=6, steps=3, step_size=EPS / 2)


def _batches(images: torch.Tensor, labels: torch.Tensor, space: InputSpace) -> DataLoader:
    """Normalized training batches, each shifted by up to two pixels."""
    crop = RandomCrop(images.shape[-1], padding=2)

    def collate(samples: List[Tuple[torch.Tensor, torch.Tensor]]) -> Tuple[torch.Tensor, torch.Tensor]:
        x, y = default_collate(samples)
        return space.normalize(crop(x)), y

    return DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True, collate_fn=collate)


def train_digits(
        objective: Objective,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epochs: int,
        seed: int,
) -> torch.nn.Module:
    """Train the quickstart's network.

    Args:
        objective: `Standard()` or `Madry()`.
        images: Pixels in [0, 1], shape (N, 1, 28, 28).
        labels: Class indices, shape (N,).
        epochs: Number of epochs.
        seed: Seed of weights, batches and noise.

    Returns:
        The network with averaged weights, in eval mode; it takes normalized images.
    """
    random_seed(seed)
    model = create_model(MODEL)
    space = InputSpace.of(model)
    loader = _batches(images, labels, space)
    task = create_task(
        objective, model, attack=ATTACK, space=space, steps_per_epoch=len(loader), seed=seed, verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-2, weight_decay=5e-4)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=max(epochs // 20, 1), warmup_lr=0,
        step_on_epochs=False, updates_per_epoch=len(loader))
    task.setup_ema(decay=0.99, use_warmup=True)
    for epoch in range(epochs):
        train_one_epoch(
            task, loader, optimizer, epoch, device=torch.device('cpu'), lr_scheduler=scheduler,
            verbose=sys.stderr.isatty())
    return unwrap_model(task.get_trainable_module(ema=True)).eval()


def _measure(
        model: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        seed: int,
) -> Tuple[EvaluationReport, Dict[float, float]]:
    """Accuracy on all images, and accuracy over eps on a subset."""
    def measure(attacks: str, eps: float, count: int, save_images: int = 0) -> EvaluationReport:
        return evaluate(
            model, images[:count], labels[:count], attacks=attacks, threat=Linf(eps), save_images=save_images,
            seed=seed, batch_size=EVAL_BATCH, exact=True, progress=False)

    report = measure('clean,fgsm,pgd20', EPS, len(images), save_images=8)
    curve = {}
    for eps in SWEEP:
        attack = 'pgd20' if eps else 'clean'
        curve[eps] = measure(attack, eps, SWEEP_IMAGES).accuracy(attack)
    return report, curve


def build_parser() -> Parser:
    """The parser of `timm-robust quickstart`."""
    parser = Parser(prog='timm-robust quickstart', description=__doc__.split('\n\n', 1)[1])
    parser.add_argument('--output', default='quickstart', metavar='DIR', help='folder to write (default: quickstart)')
    parser.add_argument('--epochs', type=int, default=30, metavar='N', help='epochs of each network (default: 30)')
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='random seed (default: 0)')
    return parser


def run(argv: List[str]) -> Dict[str, Dict[str, float]]:
    """Train both networks, attack them, and print and save the results."""
    args = build_parser().parse_args(argv)
    if args.epochs < ATTACK.eps_warmup_epochs:
        raise InputError(
            f'must be at least {ATTACK.eps_warmup_epochs:g}', argument='epochs', value=args.epochs)
    start_logging()
    start = time.perf_counter()
    train_images, train_labels, test_images, test_labels = load_digits()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    rows, curves, accuracies = [], {}, {}
    for name, objective in (('undefended', Standard()), ('hardened (madry)', Madry())):
        print(f'Training the {name} network: {len(train_labels):,} digits, {args.epochs} epochs ...', flush=True)
        model = train_digits(objective, train_images, train_labels, epochs=args.epochs, seed=args.seed)
        report, curves[name] = _measure(model, test_images, test_labels, args.seed)
        accuracies[objective.name] = {a.name: report.accuracy(a.name) for a in report.attacks}
        rows.append((name, *(f'{value:.1f} %' for value in accuracies[objective.name].values())))
        folder = output / name.split()[0]
        save_for_hf(
            model, str(folder), safe_serialization=True, model_config={'pretrained_cfg': {'tag': objective.name}})
        plot_images(
            report.examples, report.data.class_name, f'{name}: PGD-20, Linf {EPS}', output / f'{name.split()[0]}.png')
    plot_eps_sweep(
        curves, 'Linf', f'MNIST digits under PGD-20, {SWEEP_IMAGES} test images, seed {args.seed}',
        output / 'robustness.png')

    print()
    print(text_table(rows, ('network', 'clean', 'FGSM', 'PGD-20')))
    print(
        f'\nAccuracy on {len(test_labels):,} test digits; attacks within Linf {EPS} (pixels in [0, 1]), '
        f'PGD with 20 steps\nfrom one random start, seed {args.seed}. Stronger attacks lower it further. '
        f'{time.perf_counter() - start:.0f} seconds.\n\n'
        f'Written to {output}: the networks (hardened/ and undefended/, safetensors), robustness.png (accuracy over '
        f'eps),\nhardened.png and undefended.png (what the attacks look like). To load a network:\n'
        f"timm.create_model('local-dir:{output / 'hardened'}', pretrained=True)")
    return accuracies
