"""What an attacker may do: the norm and size of the perturbation, in pixel units, and where pixels live.

`ThreatModel` speaks of pixels in [0, 1]. Networks in timm's train loop see normalized images; `InputSpace` knows how
the two relate, and `Ball` is the set of allowed images around a clean one in the network's own space.
"""
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Dict, Optional, Sequence, Tuple, Union

import torch

from ..errors import InputError
from . import noise

__all__ = ['NORMS', 'Ball', 'InputSpace', 'ThreatModel', 'madry_step_size', 'nofrost_step_size', 'parse_eps']

NORMS = ('linf', 'l2')

Seed = Union[int, Sequence[int]]


def parse_eps(value: Union[str, float]) -> float:
    """Read a perturbation size such as '8/255', '0.0314' or 0.0314, in pixel units on [0, 1].

    Raises:
        InputError: If the value is no number.
    """
    try:
        return float(Fraction(value.replace(' ', '')) if isinstance(value, str) else value)
    except (ValueError, ZeroDivisionError, TypeError, AttributeError) as error:
        raise InputError(f'eps={value!r} is not a number: write it as 8/255 or 0.0314') from error


@dataclass(frozen=True)
class ThreatModel:
    """The perturbations an attack may use.

    Args:
        norm: 'linf' or 'l2'.
        eps: Largest norm of the perturbation in pixel units on [0, 1], a number or a string such as '8/255'.

    Raises:
        InputError: On an unknown norm, a negative or not finite eps, or an Linf eps above 1.
    """
    norm: str
    eps: float

    def __post_init__(self):
        if self.norm not in NORMS:
            raise InputError(f"norm={self.norm!r} is unknown: choose one of {', '.join(NORMS)}")
        eps = parse_eps(self.eps)
        if not math.isfinite(eps) or eps < 0:
            raise InputError(f'eps={self.eps!r} must be a finite number >= 0, in pixel units on [0, 1]')
        if self.norm == 'linf' and eps > 1:
            raise InputError(f'eps={self.eps!r} is above 1: eps is in pixel units on [0, 1], write {eps:g}/255')
        object.__setattr__(self, 'eps', eps)

    def scaled(self, factor: float) -> 'ThreatModel':
        """The same norm with eps times `factor`."""
        return ThreatModel(self.norm, self.eps * factor)

    def __str__(self) -> str:
        if self.norm == 'l2':
            return f'L2 eps {self.eps:g}'
        # the field counts small perturbations in 255ths and large ones (MNIST) in decimals
        in_255 = round(self.eps * 255)
        as_fraction = 1 <= in_255 <= 32 and math.isclose(self.eps, in_255 / 255, rel_tol=1e-9)
        return f'Linf eps {in_255}/255' if as_fraction else f'Linf eps {self.eps:g}'


def madry_step_size(threat: ThreatModel, steps: int) -> float:
    """2.5 eps / steps, so that every point of the ball is in reach (Madry et al. 2018, section 5), in pixel units."""
    return 2.5 * threat.eps / steps


def nofrost_step_size(threat: ThreatModel, steps: int) -> float:
    """min(1.25 eps, eps + 4/255) / steps for Linf, as in the NoFrost authors' code; `madry_step_size` for L2."""
    if threat.norm == 'l2':
        return madry_step_size(threat, steps)
    return min(1.25 * threat.eps, threat.eps + 4 / 255) / steps


@dataclass(frozen=True)
class InputSpace:
    """The space a network's input lives in: x = (pixel - mean) / std per channel. The default is pixel space itself.

    Args:
        mean: Mean of each channel, or one value for all.
        std: Standard deviation of each channel, or one value for all; positive.

    Raises:
        InputError: If a std is not positive.
    """
    mean: Tuple[float, ...] = (0.,)
    std: Tuple[float, ...] = (1.,)

    def __post_init__(self):
        object.__setattr__(self, 'mean', tuple(float(m) for m in self.mean))
        object.__setattr__(self, 'std', tuple(float(s) for s in self.std))
        if not all(s > 0 for s in self.std):
            raise InputError(f'std={self.std} must be positive in every channel')

    def tensors(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Mean and std as tensors of shape (1, C, 1, 1) that fit x of shape (N, C, H, W)."""
        for values in (self.mean, self.std):
            if len(values) not in (1, x.shape[1]):
                raise InputError(f'x has {x.shape[1]} channels and {self} {len(values)}: give a value for each')
        return tuple(
            torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] to the network's input, shape (N, C, H, W)."""
        mean, std = self.tensors(pixels)
        return (pixels - mean) / std

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """The network's input to pixels, shape (N, C, H, W)."""
        mean, std = self.tensors(x)
        return x * std + mean


class Ball:
    """The allowed images around clean ones, in the network's input space.

    An allowed image is within eps of the clean one and its pixels are in [0, 1]. Where a clean pixel itself lies
    outside [0, 1] (random erasing in training), the range is widened to that pixel, so that no perturbation is forced
    upon it.

    Args:
        x: Clean images in the network's input space, shape (N, C, H, W).
        threat: Norm and eps.
        space: The network's input space.
    """

    def __init__(self, x: torch.Tensor, threat: ThreatModel, space: InputSpace):
        self.x = x.detach()
        self.threat = threat
        mean, std = space.tensors(x)
        self.std = None if space == InputSpace() else std
        self.lower = torch.minimum(self.x, -mean / std)
        self.upper = torch.maximum(self.x, (1 - mean) / std)
        if threat.norm == 'linf':
            self.lower = torch.maximum(self.lower, self.x - threat.eps / std)
            self.upper = torch.minimum(self.upper, self.x + threat.eps / std)

    @classmethod
    def of_rows(cls, rows: Dict[str, torch.Tensor], threat: ThreatModel) -> 'Ball':
        """The ball in pixel space whose `rows()` these are, or were before rows were exchanged."""
        ball = cls.__new__(cls)
        ball.threat, ball.std = threat, None
        ball.x, ball.lower, ball.upper = rows['x'], rows['lower'], rows['upper']
        return ball

    def rows(self) -> Dict[str, torch.Tensor]:
        """What the ball is made of, one row per image."""
        return {'x': self.x, 'lower': self.lower, 'upper': self.upper}

    def to_input(self, delta: torch.Tensor) -> torch.Tensor:
        """A perturbation of pixels as a perturbation of the network's input."""
        return delta if self.std is None else delta / self.std

    def project(self, adv: torch.Tensor) -> torch.Tensor:
        """The nearest allowed images (for L2: scaled onto the ball, then clamped, which only shortens)."""
        if self.threat.norm == 'l2':
            delta = adv - self.x
            size = l2_norm(delta if self.std is None else delta * self.std)
            adv = self.x + delta * (self.threat.eps / size.clamp_min(1e-12)).clamp_max(1)
        return torch.clamp(adv, self.lower, self.upper)

    def random(self, seed: Optional[Seed] = None) -> torch.Tensor:
        """Random allowed images: uniform in the eps ball, then clamped to valid pixels.

        Args:
            seed: One seed for the batch, one per image, or None for torch's global generator.
        """
        size = self.x[0].numel()
        if self.threat.norm == 'linf':
            unit = self._draw('uniform', size, seed) * 2 - 1
        else:
            direction = self._draw('normal', size, seed)
            radius = self._draw('uniform', 1, seed) ** (1 / size)
            unit = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius
        return self._moved(unit * self.threat.eps)

    def jittered(self, std: float, seed: Optional[Seed] = None) -> torch.Tensor:
        """The clean images under Gaussian noise of `std` in pixel units, projected; `seed` as in `random`."""
        return self._moved(self._draw('normal', self.x[0].numel(), seed) * std)

    def _draw(self, kind: str, count: int, seed: Optional[Seed]) -> torch.Tensor:
        if seed is None:
            draw = {'uniform': torch.rand, 'normal': torch.randn}[kind]
            return draw(len(self.x), count, device=self.x.device)
        return getattr(noise, kind)(noise.image_seeds(seed, len(self.x), self.x.device), count, count)

    def _moved(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.project(self.x + self.to_input(pixels.to(self.x.dtype).view(self.x.shape)))

    def pixel_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient for pixels from the gradient for the network's input."""
        return self.to_input(gradient)

    def ascend(self, adv: torch.Tensor, pixel_direction: torch.Tensor, step_size: float) -> torch.Tensor:
        """Steepest ascent under the norm, then projection.

        Args:
            adv: Current images in the network's input space, shape (N, C, H, W).
            pixel_direction: Direction in pixel space, for example `pixel_gradient`.
            step_size: Length of the step in pixel units.
        """
        if self.threat.norm == 'linf':
            step = pixel_direction.sign()
        else:
            step = pixel_direction / l2_norm(pixel_direction).clamp_min(1e-12)
        return self.project(adv + self.to_input(step * step_size))


def l2_norm(x: torch.Tensor) -> torch.Tensor:
    """L2 norm of each image, shape (N, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
