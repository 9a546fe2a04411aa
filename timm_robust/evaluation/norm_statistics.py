"""How an attack shifts normalization statistics: clean and adversarial batches compared with the tracked values.

RobustNorm, figure 2 - https://arxiv.org/abs/2006.11007; NoFrost's argument against one BatchNorm for both kinds of
image - https://arxiv.org/abs/2207.01156
"""
import copy
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, NamedTuple, Tuple

import torch
import torch.nn as nn

from ..attacks import PGD, attack_mode, logits_of
from ..devices import in_float64, naming_batch_size
from ..errors import InputError
from ..layers import RobustNorm2d, set_bn_mode, tracking_norms
from ..precision import float32_proper
from ..settings import check_types
from .accuracy import Runner, assemble
from .journal import Journal
from .outcome import percent
from .plan import Plan

__all__ = [
    'LayerStatistics', 'NormStatistics', 'ShiftRow', 'compare_bn_modes', 'layer_statistics', 'shift_rows']


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a normalization layer, one value for each channel.

    Attributes:
        tracked_mean, tracked_spread: Its running averages.
        batch_mean, batch_spread: Statistics of the batches that pass through it, averaged over them. The spread is the
            variance, for RobustNorm the range.
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
    values = in_float64(x.detach()).transpose(0, 1).flatten(1)
    if isinstance(norm, RobustNorm2d):
        return torch.stack([values.mean(1), values.amax(1) - values.amin(1)])
    return torch.stack([values.mean(1), values.var(1, unbiased=False)])


@float32_proper()
@torch.no_grad()
def layer_statistics(model: nn.Module, x: torch.Tensor, batch_size: int = 128) -> Dict[str, LayerStatistics]:
    """Tracked statistics of each normalization layer, and the statistics of the batches that pass through it.

    Args:
        model: Maps pixels to logits.
        x: Images (N, C, H, W); an incomplete last batch is dropped, unless it is the only one.
        batch_size: Batch size.

    Returns:
        Statistics by layer name.

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
        clean, adversarial: From `layer_statistics`.
        root: Whether the spread is a variance, so that its square root is the unit of the mean.
    """
    return [ShiftRow(name, *_shift(clean[name], root), *_shift(adversarial[name], root)) for name in clean]


@dataclass(frozen=True)
class NormStatistics:
    """How an attack shifts normalization, and the accuracy with each choice of statistics.

    Attributes:
        accuracy: By mode (`set_bn_mode`) and attack, in percent.
        clean, adversarial: By layer, for clean and for PGD-20 batches, in a network with population statistics.
        root: Whether the spread is a variance, so that its square root is the unit of the mean.
    """
    accuracy: Dict[str, Dict[str, float]]
    clean: Dict[str, LayerStatistics]
    adversarial: Dict[str, LayerStatistics]
    root: bool

    @property
    def rows(self) -> List[ShiftRow]:
        """From `shift_rows`."""
        return shift_rows(self.clean, self.adversarial, self.root)


@float32_proper()
def compare_bn_modes(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        plan: Plan,
        *,
        batch_size: int = 128,
        seed: int = 0,
) -> NormStatistics:
    """Measure accuracy under attack with each kind of normalization statistics, and how an attack shifts them.

    Args:
        model: Maps pixels in [0, 1] to logits, in eval mode; a copy is used.
        x: Images (N, C, H, W).
        y: True class indices (N,).
        plan: The attacks.
        batch_size: Batch size.
        seed: Seed of the noise.

    Raises:
        InputError: If the network's statistics cannot be switched, an attack is not defined for batch statistics, or
            the batch size is 1.
    """
    if batch_size < 2:
        raise InputError(
            'is too small for batch statistics', 'choose at least 2', argument='batch_size', value=batch_size)
    modes = ['population', 'batch']
    if any(isinstance(m, RobustNorm2d) for m in model.modules()):
        modes.insert(1, 'mean')
    model = copy.deepcopy(model)
    try:
        model = set_bn_mode(model, 'population')
    except ValueError as error:
        raise InputError(str(error), argument='model') from error
    num_classes = logits_of(model, x[:2]).shape[1]
    plan.check(num_classes, batch_dependent=True)
    batches = list(zip(x.split(batch_size), y.split(batch_size)))
    with naming_batch_size(batch_size):
        adv = torch.cat([
            PGD(steps=20).craft(model, a, b, plan.threat, seed=seed + i) for i, (a, b) in enumerate(batches)])
        clean, adversarial = (
            {name.removeprefix('model.'): s for name, s in layer_statistics(model, images, batch_size).items()}
            for images in (x, adv))
    accuracy = {}
    for mode in modes:
        model = set_bn_mode(model, mode)
        journal = Journal()
        Runner(model, plan, journal, num_classes, batch_size, x.device, seed=seed, progress=False).run(
            batches, range(len(x)))
        outcomes = assemble(plan, journal, range(len(x)), num_classes)
        accuracy[mode] = {outcome.name: percent(outcome.correct) for outcome in outcomes}
    return NormStatistics(accuracy, clean, adversarial, 'mean' not in modes)
