"""What an attack does to the statistics that normalize: clean and adversarial batches beside the tracked values.

RobustNorm, figure 2 - https://arxiv.org/abs/2006.11007; NoFrost's argument against one BatchNorm for both kinds of
image - https://arxiv.org/abs/2207.01156
"""
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Union

import torch
import torch.nn as nn

from ..attacks.context import crafting
from ..layers import RobustNorm2d, tracking_norms

__all__ = ['layer_statistics', 'plot_statistics', 'shift_rows']


def _of_batch(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean and spread (variance, or range of RobustNorm) of each channel, (2, C), in float64."""
    values = x.detach().double().transpose(0, 1).flatten(1)
    if isinstance(norm, RobustNorm2d):
        return torch.stack([values.mean(1), values.amax(1) - values.amin(1)])
    return torch.stack([values.mean(1), values.var(1, unbiased=False)])


@torch.no_grad()
def layer_statistics(model: nn.Module, x: torch.Tensor, batch_size: int = 128) -> Dict[str, Dict[str, List[float]]]:
    """Tracked statistics of each normalization layer, and those of batches on their way through the network.

    Args:
        model: Maps pixels to logits.
        x: Images (N, C, H, W); the last batch is left out if it is not whole, unless it is the only one.
        batch_size: Images of a batch.

    Returns:
        By layer 'tracked_mean', 'tracked_spread', 'batch_mean' and 'batch_spread' (averages over the batches), each a
        list of one value per channel; the spread is the variance, for RobustNorm the range.

    Raises:
        ValueError: If no layer tracks statistics.
    """
    norms = tracking_norms(model)
    if not norms:
        raise ValueError(f'{type(model).__name__} has no BatchNorm or RobustNorm layer that tracks statistics')
    batches = [b for b in x.split(batch_size) if len(b) == min(batch_size, len(x))]
    sums: Dict[str, torch.Tensor] = {}

    def collect(name):
        def hook(norm, args):
            sums[name] = sums.get(name, 0) + _of_batch(norm, args[0]) / len(batches)
        return hook

    handles = [norm.register_forward_pre_hook(collect(name)) for name, norm in norms.items()]
    try:
        with crafting(model):
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {
            'tracked_mean': norms[name].running_mean.double().tolist(),
            'tracked_spread': norms[name].running_var.double().tolist(),
            'batch_mean': mean.tolist(),
            'batch_spread': spread.tolist(),
        } for name, (mean, spread) in sums.items()}


def _shift(found: Dict[str, List[float]], root: bool) -> List[float]:
    """Mean over channels of |batch mean - tracked mean| in tracked spreads, and of |log(batch / tracked spread)|."""
    tracked, spread, mean, own = (
        torch.tensor(found[k], dtype=torch.float64) for k in (
            'tracked_mean', 'tracked_spread', 'batch_mean', 'batch_spread'))
    unit = spread.sqrt() if root else spread
    used = (unit > 0) & (own > 0)
    if not used.any():
        return [float('nan')] * 2
    moved = ((mean - tracked).abs()[used] / unit[used]).mean().item()
    return [moved, (own[used] / spread[used]).log().abs().mean().item()]


def shift_rows(clean: Dict[str, Any], adversarial: Dict[str, Any], root: bool) -> List[List[Any]]:
    """How far batches are from the tracked statistics: layer, then mean and spread for clean and adversarial ones.

    Args:
        clean, adversarial: Of `layer_statistics`.
        root: The spread is a variance, whose root is the unit of the mean.
    """
    return [[name, *_shift(clean[name], root), *_shift(adversarial[name], root)] for name in clean]


def plot_statistics(rows: List[List[Any]], title: str, path: Union[Path, BinaryIO]) -> None:
    """Draw what `shift_rows` found over the layers, as a PNG at `path`."""
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
