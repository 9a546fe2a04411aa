"""Threat models: which perturbations of an image an attacker may use, in pixel units on [0, 1].

A norm is a subclass of `ThreatModel`, made known by `register_norm`. It has to measure a perturbation (`size`) and to
climb a gradient (`steepest`); all else has a default.
"""
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Dict, Sequence, Type, TypeVar, Union

import torch

from ..errors import InputError
from . import noise

__all__ = [
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
    'register_norm',
]

Seed = Union[int, Sequence[int], torch.Tensor, None]
Size = Union[str, float]
_Norm = TypeVar('_Norm', bound=Type['ThreatModel'])


def parse_eps(value: Size) -> float:
    """Read a perturbation size such as '8/255', '0.0314' or 0.0314, in pixel units on [0, 1].

    Raises:
        InputError: If the value is no number.
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
    """The perturbations an attack may use: those of a norm of at most `eps`.

    Args:
        eps: Largest norm of the perturbation in pixel units on [0, 1], a number or a string such as '8/255'.

    Attributes:
        norm: What is printed and read back, 'Linf' for example.
        largest: Largest eps that makes sense, infinite if the number of pixels decides.
        box: The ball is the box of half width eps: clamping each pixel projects onto it.

    Raises:
        InputError: If eps is negative, not finite or above `largest`.
    """
    eps: float

    norm: ClassVar[str] = ''
    largest: ClassVar[float] = math.inf
    box: ClassVar[bool] = False

    def __init__(self, eps: Size):
        number = parse_eps(eps)
        if not math.isfinite(number) or number < 0:
            raise InputError(
                'must be a finite number of at least 0, in pixel units on [0, 1]', argument='eps', value=eps)
        if number > self.largest:
            raise InputError(
                f'is above {self.largest:g}, and pixels are in [0, 1]', f'write {number:g}/255', argument='eps',
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
        """The perturbation of size 1 along which a function of this gradient, (N, C, H, W), rises most."""

    def dual_size(self, gradient: torch.Tensor) -> torch.Tensor:
        """How fast a function of this gradient can rise, (N, ...) to (N,): the dual norm."""
        return (gradient * self.steepest(gradient)).flatten(1).sum(1)

    def shrink(self, delta: torch.Tensor) -> torch.Tensor:
        """The factor, (N, 1, 1, 1), by which each perturbation has to be multiplied to be within eps."""
        return (self.eps / self.size(delta).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """Perturbations (N, C, H, W) within eps, near these; by default these scaled down."""
        return delta * self.shrink(delta)

    def direction(self, seeds: torch.Tensor, stream: int, count: int) -> torch.Tensor:
        """Random perturbations of size 1, shape (N, count); arguments of `noise.uniform`."""
        drawn = noise.normal(seeds, stream, count)
        return drawn / self.size(drawn)[:, None].clamp_min(1e-12)

    def random(self, seeds: torch.Tensor, count: int) -> torch.Tensor:
        """Random perturbations of `count` pixels in the ball, shape (N, count), one seed for each."""
        radius = noise.uniform(seeds, 1, 1) ** (1 / count)
        return self.direction(seeds, count, count) * radius * self.eps


NORMS: Dict[str, Type[ThreatModel]] = {}


def register_norm(cls: _Norm) -> _Norm:
    """Class decorator: make a norm known by its name, in any case.

    Raises:
        InputError: If the class has no name, or another norm has it.
    """
    key = cls.norm.lower()
    taken = NORMS.get(key)
    if not key or ' ' in key:
        raise InputError('is no name for a norm', 'one word, for example Linf', argument='norm', value=cls.norm)
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
        # the field counts small perturbations in 255ths and large ones (MNIST) in decimals
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


def norm_names() -> str:
    """The names of all registered norms, for people."""
    return ', '.join(cls.norm for cls in NORMS.values())


def make_threat(norm: str, eps: Size) -> ThreatModel:
    """A threat model from the name of its norm, in any case, and its eps.

    Raises:
        InputError: On an unknown norm or a bad eps.
    """
    if str(norm).lower() not in NORMS:
        raise InputError('unknown', f'choose one of {norm_names()}', argument='norm', value=norm)
    return NORMS[norm.lower()](eps)


def parse_threat(threat: Union[str, ThreatModel]) -> ThreatModel:
    """Read a threat model as it is printed: 'Linf 8/255', in any case.

    Raises:
        InputError: If it is none.
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


def madry_step_size(threat: ThreatModel, steps: int) -> float:
    """2.5 eps / steps, so that every point of the ball is in reach (Madry et al. 2018, section 5), in pixel units."""
    return 2.5 * threat.eps / steps


def nofrost_step_size(threat: ThreatModel, steps: int) -> float:
    """min(1.25 eps, eps + 4/255) / steps for Linf, as in the NoFrost authors' code; else `madry_step_size`."""
    if not isinstance(threat, Linf):
        return madry_step_size(threat, steps)
    return min(1.25 * threat.eps, threat.eps + 4 / 255) / steps
