"""Figures of an evaluation."""
import io
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Optional, Sequence, Tuple, Union

import torch

from .summary import class_name, sweep_attack, title
from .surface import plot_loss_surface

__all__ = ['draw_figures', 'panels', 'plot_eps_sweep', 'plot_images', 'plot_trade_off', 'to_png']

_MAGNIFIED = 10


def _plain(text: str, width: int) -> str:
    """Text in lines that can be drawn: no formula between dollar signs, no bytes of a path that are no text."""
    text = text.encode('utf-8', 'backslashreplace').decode().replace('$', r'\$')
    return textwrap.fill(text, width, break_on_hyphens=False)


def _short(text: str, width: int = 26) -> str:
    return _plain(text if len(text) <= width else text[:width - 1] + '…', 2 * width)


def panels(example: Dict[str, Any]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean image, perturbation x10 around mid-grey, adversarial image."""
    clean, adversarial = example['clean'].float(), example['adversarial'].float()
    return clean, (.5 + _MAGNIFIED * (adversarial - clean)).clamp(0, 1), adversarial


def to_png(image: torch.Tensor) -> bytes:
    """An image (C, H, W), pixels in [0, 1], as a PNG file."""
    from torchvision.transforms.v2.functional import to_pil_image
    file = io.BytesIO()
    to_pil_image((image * 255).round().to(torch.uint8)).save(file, 'PNG')
    return file.getvalue()


def plot_eps_sweep(curves: Dict[str, Dict[float, float]], norm: str, title: str, path: Union[Path, BinaryIO]) -> None:
    """Draw accuracy over eps, one line per name, as a PNG at `path`, a file name or an open binary file."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for name, curve in curves.items():
        # unclipped, so that a point at 0 % is whole
        axes.plot(list(curve), list(curve.values()), marker='o', label=_plain(name, 60), clip_on=False)
    axes.set(
        xlabel=f'eps ({norm}, pixels in [0, 1])', ylabel='accuracy (%)', ylim=(0, 100), title=_plain(title, 60))
    axes.grid(alpha=.3)
    axes.legend()
    figure.savefig(path, format='png', dpi=120)


def plot_trade_off(points: Sequence[Dict[str, float]], title: str, path: Union[Path, BinaryIO]) -> None:
    """Draw robust over clean accuracy for the points of `sweep_mbnat_gamma`, as a PNG at `path`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    axes.plot([p['clean'] for p in points], [p['robust'] for p in points], marker='o')
    for p in (points[0], points[-1]):
        axes.annotate(f"gamma {p['gamma']:g}", (p['clean'], p['robust']), xytext=(0, 7), textcoords='offset points',
                      ha='center')
    axes.set(xlabel='clean accuracy (%)', ylabel='robust accuracy (%)', title=_plain(title, 60))
    axes.margins(.15)
    axes.grid(alpha=.3)
    figure.savefig(path, format='png', dpi=120)


def plot_images(
        examples: List[Dict[str, Any]],
        names: Optional[Sequence[str]],
        title: str,
        path: Union[Path, BinaryIO],
) -> None:
    """Draw a sheet with a row for each image: clean image, perturbation x10 and adversarial image.

    Args:
        examples: Of `example_images`.
        names: Class names, or None for indices.
        title: Title of the figure.
        path: Where to write a PNG, a file name or an open binary file.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.3, 2.15 * len(examples) + .5), layout='constrained')
    figure.suptitle(_plain(title, 80), fontsize=9)
    grid = figure.subplots(len(examples), 3, squeeze=False)
    for row, example in zip(grid, examples):
        verdict = 'fooled' if example['prediction'] != example['label'] else 'holds'
        label, prediction = (_short(class_name(example[k], names)) for k in ('label', 'prediction'))
        texts = (
            f"clean: {label}\n{100 * example['clean_confidence']:.1f} %",
            f"perturbation x{_MAGNIFIED}\n{_short(example['attack'])}",
            f"{verdict}: {prediction}\n{100 * example['confidence']:.1f} %",
        )
        for axes, image, text in zip(row, panels(example), texts):
            image = image.permute(1, 2, 0).numpy()
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=1)
            axes.set_title(text, fontsize=8)
            axes.axis('off')
    figure.savefig(path, format='png', dpi=120)


def draw_figures(
        results: Dict[str, Any],
        examples: List[Dict[str, Any]],
        class_names: Optional[Sequence[str]],
        surface: Optional[Dict[str, Any]],
) -> Dict[str, bytes]:
    """All figures there is something to draw for, as PNG by file name.

    Args:
        results: Content of results.json.
        examples: Of `example_images`.
        class_names: Class names, or None for indices.
        surface: Of `loss_surface`, or None.
    """
    subject, threat, settings = title(results), results['threat_model']['text'], results['settings']
    files: Dict[str, io.BytesIO] = defaultdict(io.BytesIO)
    if examples:
        plot_images(examples, class_names, f'{subject}, {threat}', files['images.png'])
    sample = f"{results['data']['num_examples']:,} images, seed {settings['seed']}"
    if results.get('mbnat_gamma_sweep'):
        plot_trade_off(
            results['mbnat_gamma_sweep'], f'{subject}, {sweep_attack(results)}, {threat}, {sample}',
            files['mbnat_gamma.png'])
    if results.get('eps_sweep'):
        curve = dict(sorted((p['eps'], p['accuracy']) for p in results['eps_sweep']))
        plot_eps_sweep(
            {sweep_attack(results): curve}, threat.split()[0], f'{subject}, {sample}', files['eps_sweep.png'])
    if surface:
        sample = f"{threat}, {surface['num_examples']:,} images, seed {surface['seed']}"
        plot_loss_surface(surface, _plain(f'{subject}, {sample}', 60), files['loss_surface.png'])
    return {name: file.getvalue() for name, file in sorted(files.items())}
