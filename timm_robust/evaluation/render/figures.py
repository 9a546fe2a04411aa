"""Figures of an evaluation."""
import io
import math
import re
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO, Callable, Dict, Mapping, Sequence, Tuple, Union

import torch

from ...errors import InputError
from ..facts import Example
from ..norm_statistics import ShiftRow
from ..outcome import GammaPoint
from ..report import EvaluationReport
from ..surface import LossSurface
from ..transfer import TransferReport
from .words import eps_curves, sample, swept_attack, title

__all__ = [
    'draw_figures',
    'panels',
    'plot_bars',
    'plot_eps_sweep',
    'plot_images',
    'plot_loss_surface',
    'plot_radar',
    'plot_statistics',
    'plot_trade_off',
    'plot_transfer',
    'to_png',
]

Target = Union[str, Path, BinaryIO]

_MAGNIFIED = 10
_MAX_MARKERS = 30


def _plain(text: str, width: int) -> str:
    """Wrap text for drawing; dollar signs, which would start a formula, and invalid bytes are escaped."""
    text = text.encode('utf-8', 'backslashreplace').decode().replace('$', r'\$')
    return textwrap.fill(text, width, break_on_hyphens=False)


def _short(text: str, width: int = 26) -> str:
    return _plain(text if len(text) <= width else text[:width - 1] + '…', 2 * width)


def panels(example: Example) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean image, perturbation x10 around mid-grey, adversarial image."""
    clean, adversarial = example.clean.float(), example.adversarial.float()
    return clean, (.5 + _MAGNIFIED * (adversarial - clean)).clamp(0, 1), adversarial


def to_png(image: torch.Tensor) -> bytes:
    """An image (C, H, W), pixels in [0, 1], as a PNG file."""
    from torchvision.transforms.v2.functional import to_pil_image
    file = io.BytesIO()
    to_pil_image((image * 255).round().to(torch.uint8)).save(file, 'PNG')
    return file.getvalue()


def plot_eps_sweep(curves: Dict[str, Dict[float, float]], norm: str, title: str, path: Target) -> None:
    """Draw accuracy over eps, one line per name, as a PNG at `path`, a file name or an open binary file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MultipleLocator
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    largest = max(eps for curve in curves.values() for eps in curve)
    if norm == 'Linf' and 1 <= 255 * largest <= 32.5:  # larger eps (MNIST) are written as decimals
        axes.xaxis.set_major_locator(MultipleLocator(-(-round(255 * largest) // 8) / 255))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda eps, _: f'{255 * eps:.0f}/255' if eps > 0 else '0'))
    for name, curve in curves.items():
        # unclipped, so that a marker at 0 % is drawn whole
        marker = 'o' if len(curve) < _MAX_MARKERS else ''
        axes.plot(list(curve), list(curve.values()), marker=marker, label=_plain(name, 60), clip_on=False)
    axes.set(
        xlabel=f'eps ({norm}, pixels in [0, 1])', ylabel='accuracy (%)', ylim=(0, 100), title=_plain(title, 60))
    axes.grid(alpha=.3)
    axes.legend()
    figure.savefig(path, format='png', dpi=120)


def plot_trade_off(points: Sequence[GammaPoint], title: str, path: Target) -> None:
    """Draw robust against clean accuracy of a network with two BatchNorms, as a PNG at `path`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    axes.plot([p.clean for p in points], [p.robust for p in points], marker='o')
    for p in (points[0], points[-1]):
        axes.annotate(f'gamma {p.gamma:g}', (p.clean, p.robust), xytext=(0, 7), textcoords='offset points',
                      ha='center')
    axes.set(xlabel='clean accuracy (%)', ylabel='robust accuracy (%)', title=_plain(title, 60))
    axes.margins(.15)
    axes.grid(alpha=.3)
    figure.savefig(path, format='png', dpi=120)


def plot_images(
        examples: Sequence[Example],
        class_name: Callable[[int], str],
        title: str,
        path: Target,
) -> None:
    """Draw a sheet with a row for each image: clean image, perturbation x10 and adversarial image.

    Args:
        examples: Images of a report.
        class_name: Name of a class by its index.
        title: Title of the figure.
        path: Where to write a PNG, a file name or an open binary file.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.3, 2.15 * len(examples) + .5), layout='constrained')
    figure.suptitle(_plain(title, 80), fontsize=9)
    grid = figure.subplots(len(examples), 3, squeeze=False)
    for row, example in zip(grid, examples):
        verdict = 'fooled' if example.fooled else 'not fooled'
        texts = (
            f'clean: {_short(class_name(example.label))}\n{100 * example.clean_confidence:.1f} %',
            f'perturbation x{_MAGNIFIED}\n{_short(example.attack)}',
            f'{verdict}: {_short(class_name(example.prediction))}\n{100 * example.confidence:.1f} %',
        )
        for axes, image, text in zip(row, panels(example), texts):
            pixels = image.permute(1, 2, 0).numpy()
            axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap='gray', vmin=0, vmax=1)
            axes.set_title(text, fontsize=8)
            axes.axis('off')
    figure.savefig(path, format='png', dpi=120)


def plot_loss_surface(surface: LossSurface, title: str, path: Target) -> None:
    """Draw the result of `loss_surface`, as a PNG at `path`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.5, 4.5), layout='constrained')
    axes = figure.subplots()
    drawn = axes.contourf(surface.coordinates, surface.coordinates, surface.loss, levels=20)
    figure.colorbar(drawn, label='mean cross-entropy')
    ticks = [-1, -.5, 0, .5, 1]
    axes.set(title=_plain(title, 60), xticks=ticks, yticks=ticks)
    axes.set(xlabel='along the gradient (eps)', ylabel='along random signs (eps)')
    figure.savefig(path, format='png', dpi=120)


def draw_figures(report: EvaluationReport) -> Dict[str, bytes]:
    """All figures that the report has data for, as PNG by file name."""
    subject, threat = title(report), str(report.threat)
    files: Dict[str, io.BytesIO] = defaultdict(io.BytesIO)
    if report.examples:
        plot_images(report.examples, report.data.class_name, f'{subject}, {threat}', files['images.png'])
    if report.gamma_sweep:
        plot_trade_off(
            report.gamma_sweep, f'{subject}, {swept_attack(report)}, {threat}, {sample(report)}',
            files['gamma_sweep.png'])
    curves = eps_curves(report)
    if curves:
        plot_eps_sweep(curves, report.threat.norm, f'{subject}, {sample(report)}', files['eps_sweep.png'])
    if report.surface:
        of_surface = f'{report.surface.num_examples:,} images, seed {report.surface.seed}'
        plot_loss_surface(report.surface, f'{subject}, {threat}, {of_surface}', files['loss_surface.png'])
    return {name: file.getvalue() for name, file in sorted(files.items())}


def plot_bars(table: Mapping[str, Mapping[str, float]], title: str, path: Target) -> None:
    """Draw accuracies by network and benchmark as groups of bars, a group for each benchmark, as a PNG at `path`."""
    from matplotlib.figure import Figure
    keys = list(next(iter(table.values())))
    figure = Figure(figsize=(max(6., 1.3 * len(keys) + 1.5), 4), layout='constrained')
    axes = figure.subplots()
    width = .8 / len(table)
    for i, (name, row) in enumerate(table.items()):
        bars = axes.bar([k + i * width for k in range(len(keys))], list(row.values()), width, label=name)
        axes.bar_label(bars, fmt='%.0f', fontsize=7)
    labels = [textwrap.fill(key, 18) for key in keys]
    axes.set_xticks([k + .4 - width / 2 for k in range(len(keys))], labels, fontsize=8)
    axes.set(ylabel='accuracy (%)', ylim=(0, 100), title=title)
    axes.legend(fontsize=8)
    figure.savefig(path, format='png', dpi=120)


def plot_radar(table: Mapping[str, Mapping[str, float]], title: str, path: Target) -> None:
    """Draw accuracies by network and benchmark with an axis for each benchmark, 0 % at the centre, as a PNG at `path`.

    Raises:
        InputError: If there are fewer than three axes.
    """
    from matplotlib.figure import Figure
    keys = list(next(iter(table.values())))
    if len(keys) < 3:
        raise InputError(f'needs at least three benchmarks, not {len(keys)}', 'use bars', argument='kind',
                         value='radar')
    figure = Figure(figsize=(6.5, 6), layout='constrained')
    axes = figure.add_subplot(projection='polar')
    angles = [2 * math.pi * k / len(keys) for k in range(len(keys))]
    for name, row in table.items():
        values = list(row.values())
        axes.plot([*angles, angles[0]], [*values, values[0]], marker='o', markersize=3, label=name)
        axes.fill(angles, values, alpha=.1)
    axes.set_xticks(angles, [textwrap.fill(key, 18) for key in keys], fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_title(title)
    axes.legend(loc='lower left', bbox_to_anchor=(-.15, -.12), fontsize=8)
    figure.savefig(path, format='png', dpi=120)


def plot_transfer(report: TransferReport, path: Target) -> None:
    """Draw a transfer matrix, a row for each network that images were crafted on, as a PNG at `path`."""
    from matplotlib.figure import Figure
    names = report.names
    table = [[report.clean_accuracy(t) for t in names], *([report.accuracy(s, t) for t in names] for s in names)]
    figure = Figure(figsize=(3.4 + 1.1 * len(names), 2.2 + .7 * len(names)), layout='constrained')
    axes = figure.subplots()
    drawn = axes.imshow(table, vmin=0, vmax=100, aspect='auto')
    figure.colorbar(drawn, label='accuracy (%)')
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axes.text(j, i, f'{value:.1f}', ha='center', va='center', color='black' if value > 50 else 'white')
    # each part of a tag or path on its own line
    shown = ['\n'.join(_plain(part, 32) for part in re.split(r'(?<=[./])', name[-96:]) if part) for name in names]
    axes.set_xticks(range(len(names)), shown, fontsize=7, rotation=30, ha='right')
    axes.set_yticks(range(len(table)), ['clean', *shown], fontsize=7)
    axes.set(xlabel='classified by', ylabel='crafted on')
    axes.set_title(_plain(report.title, 60), fontsize=9)
    figure.savefig(path, format='png', dpi=120)


def plot_statistics(rows: Sequence[ShiftRow], title: str, path: Target) -> None:
    """Draw the result of `shift_rows` over the layers, as a PNG at `path`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 6), layout='constrained')
    figure.suptitle(title, fontsize=9)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, first, label in ((upper, 1, '|mean - tracked| / tracked spread'), (lower, 2, '|log spread / tracked|')):
        for offset, kind in ((0, 'clean'), (2, 'adversarial')):
            axes.plot([row[first + offset] for row in rows], marker='o', markersize=3, label=kind)
        axes.set_ylabel(label)
        axes.grid(alpha=.3)
        axes.legend()
    lower.set_xticks(range(len(rows)), [row[0] for row in rows], rotation=90, fontsize=6)
    figure.savefig(path, format='png', dpi=120)
