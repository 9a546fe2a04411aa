"""Margin, thickness and smoothness: properties of the decision boundary that correlate with robustness.

NoFrost, table 5 - https://arxiv.org/abs/2207.01156; Yang et al. 2020, `Boundary thickness and robustness in learning
models` - https://arxiv.org/abs/2007.05086; Zhang et al. 2019 (TRADES) - https://arxiv.org/abs/1901.08573
"""
import math
from dataclasses import dataclass
from functools import wraps
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from ..attacks import PGD, ThreatModel, attack_mode, check_images, logits_of, wrong_classes
from ..attacks.threat import l2_norm
from ..devices import naming_batch_size
from ..errors import InputError
from ..layers import has_batch_statistics
from ..precision import float32_proper

__all__ = ['Properties', 'Property', 'boundary_thickness', 'decision_margin', 'measure_properties', 'smoothness']

_FIRST_LENGTH, _GROWTH, _LENGTHS = 2. ** -6, 2. ** .5, 33  # relative to the attack's length: from 1/64 to 1024
_BISECTIONS = 22


def _frozen(measure: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorate a measure to run with the network in eval mode and in full float32, then restore its state."""
    @wraps(measure)
    def measure_frozen(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with attack_mode(model), float32_proper():
            return measure(model, *args, **kwargs)
    return measure_frozen


@torch.no_grad()
def _first_crossing(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        direction: torch.Tensor,
        length: torch.Tensor,
) -> torch.Tensor:
    """L2 distance along unit directions at which the prediction first differs from y; inf if it never does."""
    def crossed(distance: torch.Tensor) -> torch.Tensor:
        return model(x + distance.view(-1, 1, 1, 1) * direction).argmax(1) != y

    low, high = torch.zeros_like(length), torch.full_like(length, float('inf'))
    for k in range(_LENGTHS):
        distance = length * _FIRST_LENGTH * _GROWTH ** k
        now = crossed(distance)
        high = torch.where(now & high.isinf(), distance, high)
        low = torch.where(high.isinf(), distance, low)
        if not high.isinf().any():
            break
    found = ~high.isinf()
    for _ in range(_BISECTIONS):
        middle = torch.where(found, (low + high) / 2, 0.)
        beyond = crossed(middle)
        high, low = torch.where(found & beyond, middle, high), torch.where(found & ~beyond, middle, low)
    return high


@_frozen
def decision_margin(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 20,
        num_targets: int = 3,
) -> torch.Tensor:
    r"""L2 distance to the nearest decision boundary along adversarial directions.

    .. math:: M(x) = \min_{u \in D(x)} \inf \{ t \ge 0 : \arg\max f(x + t u) \ne y \}

    D(x) holds the unit vectors from x to its adversarial images: one from PGD on the cross-entropy, and one for each of
    the most likely wrong classes, from PGD on the gap between the logits of that class and of y. The line search
    ignores the valid range of pixels and goes from 1/64 to 1024 times the length of the attack. For a linear classifier
    under L2, M is the distance to the nearest of the hyperplanes between y and these classes.

    Args:
        model: Maps pixels in [0, 1] to logits.
        x: Images (N, C, H, W).
        y: True class indices (N,).
        threat: Threat model of the attacks that give the directions.
        steps: Steps of each attack.
        num_targets: Number of wrong classes to attack towards.

    Returns:
        Distances in pixel units, shape (N,): 0 for misclassified images, inf where no boundary was found.
    """
    check_images(x)
    with torch.no_grad():
        logits = model(x)
    margin = torch.where(logits.argmax(1) == y, float('inf'), 0.).to(x.dtype)
    targets = wrong_classes(logits, y, min(num_targets, logits.shape[1] - 1))
    attack, rows = PGD(steps=steps, random_start=False), torch.arange(len(x), device=x.device)

    def lead(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return logits[rows, y] - logits[rows, target]

    for target in (None, *targets.unbind(1)):
        adv = attack.craft(model, x, y, threat, targets=target, loss_fn=None if target is None else lead)
        delta = adv - x
        length = l2_norm(delta).clamp_min(1e-12)
        margin = torch.minimum(margin, _first_crossing(model, x, y, delta / length, length.flatten()))
    return margin


@_frozen
def boundary_thickness(
        model: Callable,
        x: torch.Tensor,
        threat: ThreatModel,
        *,
        alpha: float = 0.,
        beta: float = 0.75,
        points: int = 128,
        steps: int = 20,
        seed: int = 0,
) -> torch.Tensor:
    r"""Length over which neither class clearly wins, on the way to a targeted adversarial image (Yang et al., eq. 1).

    .. math:: T(x) = \| x - x_s \|_2 \int_0^1 1 \{ \alpha < g_{ij}(x(t)) < \beta \} dt,\quad g_{ij} = p_i - p_j

    i is the predicted class of x, j a random other class, x_s the result of PGD targeted at j, and x(t) the segment
    from x to x_s.

    Args:
        model, x, threat, steps: See `decision_margin`.
        alpha, beta: Bounds of the difference in probability; 0 and 0.75 in the paper.
        points: Number of points on the segment.
        seed: Seed of the target classes.

    Returns:
        Lengths in pixel units, shape (N,).

    Raises:
        InputError: If not -1 <= alpha < beta <= 1.
    """
    if not -1 <= alpha < beta <= 1:
        raise InputError(
            f'must satisfy -1 <= alpha < beta <= 1 with `beta={beta}`', argument='alpha', value=alpha)
    check_images(x)
    with torch.no_grad():
        logits = model(x)
    own, classes = logits.argmax(1), logits.shape[1]
    generator = torch.Generator('cpu').manual_seed(seed)
    other = (own + torch.randint(1, classes, (len(x),), generator=generator, device='cpu').to(own.device)) % classes
    # a random start would turn the segment away from the shortest path
    adv = PGD(steps=steps, random_start=False).craft(model, x, own, threat, targets=other)
    inside = torch.zeros(len(x), device=x.device)
    rows = torch.arange(len(x), device=x.device)
    with torch.no_grad():
        for t in ((torch.arange(points, device='cpu') + .5) / points).tolist():
            p = model(torch.lerp(x, adv, t)).softmax(1)
            difference = p[rows, own] - p[rows, other]
            inside += (alpha < difference) & (difference < beta)
    return l2_norm(adv - x).flatten() * inside / points


@_frozen
def smoothness(
        model: Callable,
        x: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 20,
        restarts: int = 2,
        seed: int = 0,
) -> torch.Tensor:
    r"""Largest change of the prediction within eps, by PGD from near the image (TRADES' inner problem).

    .. math:: D(x) = \max_{\| \delta \| \le \epsilon} KL(p(x) \,\|\, p(x + \delta))

    Args:
        model, x, threat, steps: See `decision_margin`.
        restarts: Number of runs; the largest result counts.
        seed: Seed of the starts.

    Returns:
        Divergences in nats, shape (N,); small where the network is smooth.
    """
    check_images(x)
    with torch.no_grad():
        clean = model(x).log_softmax(1)
    largest = torch.zeros(len(x), device=x.device, dtype=clean.dtype)
    for run in range(restarts):
        adv = PGD(steps=steps).craft(
            model, x, clean.exp(), threat, start_std=1e-3, seed=seed * 0x9E3779B1 + run)
        with torch.no_grad():
            divergence = (clean.exp() * (clean - model(adv).log_softmax(1))).sum(1)
        largest = torch.maximum(largest, divergence)
    return largest


@dataclass(frozen=True)
class Property:
    """One property of a network.

    Attributes:
        name: Name of the property.
        values: By image; infinite where no boundary was found.
        counted: By image, whether it counts for the mean.
    """
    name: str
    values: Tuple[float, ...]
    counted: Tuple[bool, ...]

    @property
    def finite(self) -> List[float]:
        """The finite values of counted images, which the mean is computed from."""
        return [v for v, counts in zip(self.values, self.counted) if counts and math.isfinite(v)]

    @property
    def mean(self) -> float:
        """Mean; nan without values."""
        return sum(self.finite) / len(self.finite) if self.finite else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; nan for fewer than two values."""
        found = self.finite
        if len(found) < 2:
            return math.nan
        return math.sqrt(sum((v - self.mean) ** 2 for v in found) / (len(found) - 1) / len(found))

    @property
    def unbounded(self) -> int:
        """Number of counted images for which no boundary was found."""
        return sum(self.counted) - len(self.finite)


@dataclass(frozen=True)
class Properties:
    """Properties of a network.

    Attributes:
        correct: By image, whether it is classified correctly.
        properties: Decision margin, boundary thickness and smoothness.
    """
    correct: Tuple[bool, ...]
    properties: Tuple[Property, ...]


@float32_proper()
def measure_properties(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 20,
        num_targets: int = 3,
        batch_size: Optional[int] = None,
        seed: int = 0,
) -> Properties:
    """Decision margin, boundary thickness and smoothness of a network.

    Args:
        model: Maps pixels in [0, 1] to logits.
        x: Images (N, C, H, W).
        y: True class indices (N,).
        threat: Threat model of the attacks.
        steps: Steps of each attack.
        num_targets: Number of wrong classes to search for the margin.
        batch_size: Batch size, by default all images.
        seed: Seed of targets and starts.

    Raises:
        InputError: For a network that normalizes by the batch.
    """
    if has_batch_statistics(model):
        raise InputError(
            'a network that normalizes by the batch has no decision boundary per image', "use `bn_mode='population'`",
            argument='model')
    measures: Dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        'decision margin (L2)': lambda a, b: decision_margin(
            model, a, b, threat, steps=steps, num_targets=num_targets),
        'boundary thickness (L2)': lambda a, b: boundary_thickness(model, a, threat, steps=steps, seed=seed),
        f'smoothness (KL, {threat})': lambda a, b: smoothness(model, a, threat, steps=steps, seed=seed),
    }
    size = batch_size or len(x)
    found = []
    with naming_batch_size(size):
        with attack_mode(model):
            correct = tuple((logits_of(model, x, size).argmax(1) == y).tolist())
        for name, measure in measures.items():
            values = torch.cat([measure(a, b) for a, b in zip(x.split(size), y.split(size))]).tolist()
            counted = correct if name.startswith('decision') else (True,) * len(correct)
            found.append(Property(name, tuple(values), counted))
    return Properties(correct, tuple(found))
