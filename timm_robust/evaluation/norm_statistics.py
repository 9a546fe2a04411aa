"""What an attack does to the statistics that normalize: clean and adversarial batches beside the tracked values.

RobustNorm, figure 2 - https://arxiv.org/abs/2006.11007; NoFrost's argument against one BatchNorm for both kinds of
image - https://arxiv.org/abs/2207.01156
"""
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, NamedTuple, Tuple

import torch
import torch.nn as nn

from ..attacks import attack_mode
from ..errors import InputError
from ..layers import RobustNorm2d, tracking_norms
from ..settings import check_types

__all__ = ['LayerStatistics', 'ShiftRow', 'layer_statistics', 'shift_rows']


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a normalization layer, one value for each channel.

    Attributes:
        tracked_mean, tracked_spread: Its running averages.
        batch_mean, batch_spread: Of batches on their way through it, averaged over them. The spread is the variance,
            for RobustNorm the range.
    """
    tracked_mean: Tuple[float, ...]
    tracked_spread: Tuple[float, ...]
    batch_mean: Tuple[float, ...]
    batch_spread: Tuple[float, ...]

    def __post_init__(self) -> None:
        check_types(self)


class ShiftRow(NamedTuple):
    """How far clean and adversarial batches are from the tracked statistics of a layer.

    Attributes:
        layer: Name of the layer.
        clean_mean, adversarial_mean: Mean over channels of |batch mean - tracked mean| in tracked spreads.
        clean_spread, adversarial_spread: Mean over channels of |log(batch spread / tracked spread)|.
    """
    layer: str
    clean_mean: float
    clean_spread: float
    adversarial_mean: float
    adversarial_spread: float


def _of_batch(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean and spread (variance, or range of RobustNorm) of each channel, (2, C), in float64."""
    values = x.detach().cpu().double().transpose(0, 1).flatten(1)
    if isinstance(norm, RobustNorm2d):
        return torch.stack([values.mean(1), values.amax(1) - values.amin(1)])
    return torch.stack([values.mean(1), values.var(1, unbiased=False)])


@torch.no_grad()
def layer_statistics(model: nn.Module, x: torch.Tensor, batch_size: int = 128) -> Dict[str, LayerStatistics]:
    """Tracked statistics of each normalization layer, and those of batches on their way through the network.

    Args:
        model: Maps pixels to logits.
        x: Images (N, C, H, W); the last batch is left out if it is not whole, unless it is the only one.
        batch_size: Images of a batch.

    Returns:
        By name of the layer.

    Raises:
        InputError: If no layer tracks statistics.
    """
    norms = tracking_norms(model)
    if not norms:
        raise InputError('has no BatchNorm or RobustNorm layer that tracks statistics', argument='model',
                         value=type(model).__name__)
    batches = [b for b in x.split(batch_size) if len(b) == min(batch_size, len(x))]
    sums: Dict[str, torch.Tensor] = {}

    def collect(name: str) -> Callable[[nn.Module, Tuple[torch.Tensor, ...]], None]:
        def hook(norm: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + _of_batch(norm, args[0]) / len(batches)
        return hook

    handles = [norm.register_forward_pre_hook(collect(name)) for name, norm in norms.items()]
    try:
        with attack_mode(model):
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: LayerStatistics(
            *(tuple(t.cpu().double().tolist()) for t in (norms[name].running_mean, norms[name].running_var, *found)))
        for name, found in sums.items()}


def _shift(found: LayerStatistics, root: bool) -> Tuple[float, float]:
    tracked, spread, mean, own = (
        torch.tensor(values, dtype=torch.float64, device='cpu') for values in vars(found).values())
    unit = spread.sqrt() if root else spread
    used = (unit > 0) & (own > 0)
    if not used.any():
        return float('nan'), float('nan')
    moved = ((mean - tracked).abs()[used] / unit[used]).mean().item()
    return moved, (own[used] / spread[used]).log().abs().mean().item()


def shift_rows(
        clean: Mapping[str, LayerStatistics],
        adversarial: Mapping[str, LayerStatistics],
        root: bool,
) -> List[ShiftRow]:
    """How far batches are from the tracked statistics, layer by layer.

    Args:
        clean, adversarial: Of `layer_statistics`.
        root: The spread is a variance, whose root is the unit of the mean.
    """
    return [ShiftRow(name, *_shift(clean[name], root), *_shift(adversarial[name], root)) for name in clean]
