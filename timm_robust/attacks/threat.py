"""Threat models: which perturbations of an image an attacker may use, in pixel units on [0, 1].

A norm is a subclass of `ThreatModel`, registered by `register_norm`. It must define the norm of a perturbation (`size`)
and the direction of steepest ascent (`steepest`); everything else has a default.
"""
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Dict, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch

from ..errors import InputError
from . import noise

__all__ = [
    'L1',
    'L2',
    'Linf',
    'NORMS',
    'ThreatModel',
    'l2_norm',
    'madry_step_size',
    'make_threat',
    'nofrost_step_size',
    'norm_names',
    'parse_eps',
    'parse_threat',
    'parse_threats',
    'project_onto_l1',
    'register_norm',
    'sparse_signs',
]

Seed = Union[int, Sequence[int], torch.Tensor, None]
Size = Union[str, float]
_SHIFTS, _ULPS = 30, 8  # maximum steps of the projection onto the L1 ball, and its tolerance in machine epsilons
_Norm = TypeVar('_Norm', bound=Type['ThreatModel'])


def parse_eps(value: Size) -> float:
    """Parse a perturbation size such as '8/255', '0.0314' or 0.0314, in pixel units on [0, 1].

    Raises:
        InputError: If the value is not a number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError('true or false')
        return float(Fraction(value.replace(' ', '')) if isinstance(value, str) else value)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError, AttributeError) as error:
        raise InputError('is not a number', 'write it as 8/255 or 0.0314', argument='eps', value=value) from error


def l2_norm(x: torch.Tensor) -> torch.Tensor:
    """L2 norm of each image, shape (N, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@dataclass(frozen=True, init=False)
class ThreatModel(ABC):
    """The perturbations an attack may use: those with a norm of at most `eps`.

    Args:
        eps: Largest norm of the perturbation in pixel units on [0, 1], a number or a string such as '8/255'.

    Attributes:
        norm: Name as printed and parsed, for example 'Linf'.
        largest: Largest sensible eps, infinite if it depends on the number of pixels.
        box: The ball is a box of half width eps, so that clamping each pixel projects onto it.
        sparse: A step changes few pixels, so it skips pixels already at the end of their range.

    Raises:
        InputError: If eps is negative, not finite or above `largest`.
    """
    eps: float

    norm: ClassVar[str] = ''
    largest: ClassVar[float] = math.inf
    box: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    def __init__(self, eps: Size):
        number = parse_eps(eps)
        if not math.isfinite(number) or number < 0:
            raise InputError(
                'must be a finite number of at least 0, in pixel units on [0, 1]', argument='eps', value=eps)
        if number > self.largest:
            raise InputError(
                f'is above {self.largest:g}, but pixels are in [0, 1]', f'write {number:g}/255', argument='eps',
                value=eps)
        object.__setattr__(self, 'eps', number)

    def __str__(self) -> str:
        text = f'{self.eps:g}'
        return f'{self.norm} {text if float(text) == self.eps else repr(self.eps)}'

    def scaled(self, factor: float) -> 'ThreatModel':
        """The same norm with eps times `factor`, at most `largest`."""
        return type(self)(min(self.eps * factor, self.largest))

    def unbounded(self, shape: Sequence[int]) -> 'ThreatModel':
        """The same norm with an eps that no perturbation of an image of `shape` (C, H, W) exceeds."""
        return type(self)(self.size(torch.ones(1, *shape, dtype=torch.float64, device='cpu')).item())

    @abstractmethod
    def size(self, delta: torch.Tensor) -> torch.Tensor:
        """Norm of each perturbation: (N, ...) to (N,)."""

    @abstractmethod
    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """The perturbation of size 1 that most increases a function with this gradient, (N, C, H, W)."""

    def stride(self, gradient: torch.Tensor) -> torch.Tensor:
        """The direction of an attack step, of size 1: `steepest`, unless it changes too few pixels."""
        return self.steepest(gradient)

    def dual_size(self, gradient: torch.Tensor) -> torch.Tensor:
        """Dual norm of each gradient: (N, ...) to (N,)."""
        return (gradient * self.steepest(gradient)).flatten(1).sum(1)

    def shrink(self, delta: torch.Tensor) -> torch.Tensor:
        """The factor, (N, 1, 1, 1), that scales each perturbation to within eps."""
        return (self.eps / self.size(delta).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """Project perturbations (N, C, H, W) to within eps, by default by scaling them down."""
        return delta * self.shrink(delta)

    def project_in_box(self, delta: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        """Project perturbations to within eps and between `lowest` <= 0 and `highest` >= 0."""
        return self.project(delta).clamp(lowest, highest)

    def direction(self, seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
        """Random perturbations of size 1, shape (N, count); arguments of `noise.uniform`."""
        drawn = noise.normal(seeds, stream, count)
        return drawn / self.size(drawn)[:, None].clamp_min(1e-12)

    def random(self, seeds: torch.Tensor, count: int) -> torch.Tensor:
        """Random perturbations of `count` pixels in the ball, shape (N, count), one per seed."""
        radius = noise.uniform(seeds, 1, 1) ** (1 / count)
        return self.direction(seeds, count, count) * radius * self.eps


NORMS: Dict[str, Type[ThreatModel]] = {}


def register_norm(cls: _Norm) -> _Norm:
    """Class decorator: register a norm by its case-insensitive name.

    Raises:
        InputError: If the class has no valid name, or the name is taken.
    """
    key = cls.norm.lower()
    taken = NORMS.get(key)
    if not key or ' ' in key:
        raise InputError('is not a valid norm name', 'use one word, for example Linf', argument='norm', value=cls.norm)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InputError(f'is taken by {taken.__module__}.{taken.__qualname__}', argument='norm', value=cls.norm)
    NORMS[key] = cls
    return cls


@register_norm
class Linf(ThreatModel):
    """Every pixel changes by at most eps."""
    norm = 'Linf'
    largest = 1.
    box = True

    def __str__(self) -> str:
        # by convention, small perturbations are written in 255ths and large ones (MNIST) as decimals
        in_255 = round(self.eps * 255)
        if 1 <= in_255 <= 32 and math.isclose(self.eps, in_255 / 255, rel_tol=1e-15):
            return f'{self.norm} {in_255}/255'
        return super().__str__()

    def size(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.flatten(1).abs().amax(1)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.sign()

    def dual_size(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flatten(1).abs().sum(1)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.clamp(-self.eps, self.eps)

    def direction(self, seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
        drawn = noise.uniform(seeds, stream, count) * 2 - 1
        return drawn / self.size(drawn)[:, None].clamp_min(1e-12)

    def random(self, seeds: torch.Tensor, count: int) -> torch.Tensor:
        return (noise.uniform(seeds, count, count) * 2 - 1) * self.eps


@register_norm
class L2(ThreatModel):
    """The perturbation has a Euclidean length of at most eps, over all pixels and channels of an image."""
    norm = 'L2'

    def size(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.flatten(1).norm(dim=1)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / l2_norm(gradient).clamp_min(1e-12)

    def dual_size(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.size(gradient)


def sparse_signs(gradient: torch.Tensor, count: Union[int, torch.Tensor]) -> torch.Tensor:
    """Signs of the largest entries of each gradient, scaled to an L1 norm of 1.

    Args:
        gradient: Shape (N, C, H, W).
        count: Number of nonzero entries, at least 1: one for all or one per gradient, shape (N,). Ties may add more.
    """
    size = gradient.flatten(1).abs()
    if isinstance(count, int):
        smallest = size.topk(min(count, size.shape[1]), dim=1).values[:, -1:]
    else:
        # reading the largest count from a GPU would force a sync
        most = int(count.max()) if size.device.type == 'cpu' else size.shape[1]
        smallest = size.topk(most, dim=1).values.gather(1, count[:, None] - 1)
    signs = torch.where(size >= smallest, gradient.flatten(1).sign(), 0.)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)


def project_onto_l1(
        delta: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        eps: Union[float, torch.Tensor],
) -> torch.Tensor:
    """Project perturbations onto the intersection of the L1 ball of radius eps and a box around 0.

    Croce & Hein 2021, `Mind the box: l1-APGD for sparse adversarial attacks on image classifiers` -
    https://arxiv.org/abs/2103.01208, section 2: d_i = sign(delta_i) min(max(|delta_i| - s, 0), room_i), where room_i is
    the distance to the end of the box and s >= 0 the smallest shift that satisfies eps. The sum of |d_i| is piecewise
    linear in s: Newton's method, bracketed around the root, reaches the right piece after a few steps.

    Args:
        delta: Shape (N, ...).
        lowest: Lower bound of the box, at most 0; like delta, or one for all.
        highest: Upper bound, at least 0; likewise.
        eps: One for all or one per image, shape (N,).
    """
    size = delta.abs().flatten(1)
    # images may be off by rounding, and then so is the box
    room = torch.where(delta > 0, highest, -lowest).flatten(1).clamp_min(0)
    kept = torch.minimum(size, room)
    # perturbations within eps keep their size, so that a shift of 0 settles them
    limit = kept.sum(1, keepdim=True).clamp_max(eps.view(-1, 1) if isinstance(eps, torch.Tensor) else eps)
    tolerance = _ULPS * torch.finfo(size.dtype).eps * limit
    shift = low = torch.zeros_like(limit)
    high = size.amax(1, keepdim=True)
    on_cpu = size.device.type == 'cpu'
    for _ in range(_SHIFTS):
        over = kept.sum(1, keepdim=True) - limit
        settled = over.abs() <= tolerance
        # on a GPU this would force a sync
        if on_cpu and settled.all():
            break
        low, high = torch.where(over > 0, shift, low), torch.where(over > 0, high, shift)
        # pixels at neither end; comparisons and sums of booleans are slow on a CPU
        newton = shift + over / torch.minimum(kept, room - kept).sign_().sum(1, keepdim=True)
        inside = (newton > low) & (newton < high)
        shift = torch.where(settled, shift, torch.where(inside, newton, (low + high) / 2))
        kept = torch.minimum((size - shift).clamp_min_(0), room)
    kept = kept * (limit / kept.sum(1, keepdim=True).clamp_min(1e-30)).clamp_max(1)  # corrects rounding
    return delta.sign() * kept.view_as(delta)


@register_norm
class L1(ThreatModel):
    """The absolute changes of all pixels and channels of an image add up to at most eps.

    A step along the steepest direction would change a single pixel. Attacks spread each step evenly over the 1 % of
    pixels with the largest gradients (SLIDE: Tramer & Boneh 2019, `Adversarial Training and Robustness for Multiple
    Perturbations` - https://arxiv.org/abs/1904.13000, section 4) among those that can still move (Maini et al. 2020,
    `Adversarial Robustness Against the Union of Multiple Perturbation Models` - https://arxiv.org/abs/1909.04068). APGD
    adapts this percentage.
    """
    norm = 'L1'
    sparse = True

    def size(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.flatten(1).abs().sum(1)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(gradient)

    def stride(self, gradient: torch.Tensor) -> torch.Tensor:
        return sparse_signs(gradient, max(gradient.shape[1:].numel() // 100, 1))

    def dual_size(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.flatten(1).abs().amax(1)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        unlimited = delta.new_full((), math.inf)
        return self.project_in_box(delta, -unlimited, unlimited)

    def project_in_box(self, delta: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
        return project_onto_l1(delta, lowest, highest, self.eps)

    def direction(self, seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
        # exponentials divided by their sum are uniform on the faces of the ball
        radius, side = noise.uniform(seeds, stream, 2 * count).chunk(2, dim=1)
        drawn = torch.where(side < .5, 1., -1.) * torch.log1p(-radius)
        return drawn / self.size(drawn)[:, None].clamp_min(1e-12)


def norm_names() -> str:
    """The names of all registered norms, for display."""
    return ', '.join(cls.norm for cls in NORMS.values())


def make_threat(norm: str, eps: Optional[Size] = None) -> ThreatModel:
    """Make a threat model from the case-insensitive name of its norm and its eps, by default 8/255 for Linf.

    Raises:
        InputError: On an unknown norm or a bad eps, and without eps for another norm than Linf.
    """
    if str(norm).lower() not in NORMS:
        raise InputError('unknown', f'choose one of {norm_names()}', argument='norm', value=norm)
    made = NORMS[norm.lower()]
    if eps is None and made is not Linf:
        raise InputError(f'has no default for {made.norm}', 'give one, for example 0.5 for L2 or 12 for L1',
                         argument='eps')
    return made('8/255' if eps is None else eps)


def parse_threat(threat: Union[str, ThreatModel]) -> ThreatModel:
    """Parse a threat model such as 'Linf 8/255', case-insensitively.

    Raises:
        InputError: If it is not a threat model.
    """
    if isinstance(threat, ThreatModel):
        return threat
    words = threat.split() if isinstance(threat, str) else []
    if len(words) > 2 and words[1].lower() == 'eps':
        del words[1]
    if len(words) < 2:
        raise InputError(
            'is not a threat model', "write norm and eps, for example 'Linf 8/255'", argument='threat', value=threat)
    try:
        return make_threat(words[0], ''.join(words[1:]))
    except InputError as error:
        raise error.about('threat', threat) from error


def parse_threats(threat: Union[str, ThreatModel, Sequence[Union[str, ThreatModel]]]) -> Tuple[ThreatModel, ...]:
    """Parse one threat model or several: 'Linf 8/255, L2 0.5, L1 12', or a list.

    Raises:
        InputError: If one of them is invalid or given twice.
    """
    several: Any = threat.split(',') if isinstance(threat, str) else threat
    given = several if isinstance(several, (list, tuple)) else [several]
    parsed = tuple(parse_threat(one) for one in given or [''])
    if len(set(parsed)) < len(parsed):
        raise InputError('names one threat model twice', argument='threat', value=', '.join(map(str, parsed)))
    return parsed


def madry_step_size(threat: ThreatModel, steps: int) -> float:
    """2.5 eps / steps in pixel units: the steps can reach every point of the ball (Madry et al. 2018, section 5)."""
    return 2.5 * threat.eps / steps


def nofrost_step_size(threat: ThreatModel, steps: int) -> float:
    """min(1.25 eps, eps + 4/255) / steps for Linf, as in the NoFrost authors' code; else `madry_step_size`."""
    if not isinstance(threat, Linf):
        return madry_step_size(threat, steps)
    return min(1.25 * threat.eps, threat.eps + 4 / 255) / steps
