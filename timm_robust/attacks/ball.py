"""The images an attack may use: within the eps ball around the clean images, and with pixels in [0, 1].

`ThreatModel` is defined on pixels in [0, 1]. Networks in timm's training loop take normalized images: `InputSpace`
converts between the two, and `Ball` is the set of allowed images in the network's input space.
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
from timm.utils import ModelEmaV2, ModelEmaV3

from ..devices import without_wait
from ..errors import InputError
from . import noise
from .threat import Seed, ThreatModel

__all__ = ['Ball', 'InputSpace']

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, ModelEmaV2, ModelEmaV3)


@lru_cache(maxsize=64)
def _per_channel(values: Tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # cached on the device: a copy from the CPU would force a GPU sync in every pass
    with torch.inference_mode(False):
        return without_wait(torch.tensor(values, dtype=dtype, device='cpu'), device).view(1, -1, 1, 1)


def _unwrapped(model: Any) -> Any:
    """The network inside wrappers that pass their input on. Others may change it, even if they call it `module`."""
    while True:
        if isinstance(model, _WRAPPERS) or type(model).__module__.startswith('lightning.'):
            model = model.module
        elif hasattr(model, '_orig_mod'):  # torch.compile
            model = model._orig_mod
        else:
            return model


@dataclass(frozen=True)
class InputSpace:
    """A network's input space: x = (pixel - mean) / std per channel. The default is pixel space.

    Args:
        mean: Mean of each channel, or one value for all.
        std: Standard deviation of each channel, or one value for all; positive.

    Raises:
        InputError: If a mean is not finite, or a std not finite and positive.
    """
    mean: Tuple[float, ...] = (0.,)
    std: Tuple[float, ...] = (1.,)

    def __post_init__(self) -> None:
        for name, given, least in (('mean', self.mean, -math.inf), ('std', self.std, 0.)):
            try:
                object.__setattr__(self, name, tuple(map(float, given)))
            except (TypeError, ValueError) as error:
                raise InputError('must hold a number for each channel', argument=name, value=given) from error
            if not all(least < value < math.inf for value in getattr(self, name)):
                raise InputError(
                    f"must be finite{' and positive' if name == 'std' else ''} in every channel", argument=name,
                    value=given)

    @classmethod
    def of(cls, model: Any) -> 'InputSpace':
        """The input space in a timm model's `pretrained_cfg`; pixel space for other networks."""
        cfg = getattr(_unwrapped(model), 'pretrained_cfg', None) or {}
        mean, std = cfg.get('mean'), cfg.get('std')
        return cls() if mean is None or std is None else cls(tuple(mean), tuple(std))

    @property
    def is_pixels(self) -> bool:
        """Whether this is pixel space."""
        return not any(self.mean) and all(s == 1 for s in self.std)

    def tensors(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Mean and std as tensors of shape (1, C, 1, 1) that fit x of shape (N, C, H, W)."""
        for values in (self.mean, self.std):
            if len(values) not in (1, x.shape[1]):
                raise InputError(
                    f'images have {x.shape[1]} channels and {self} has {len(values)}', 'give one value per channel',
                    argument='space')
        return _per_channel(self.mean, x.dtype, x.device), _per_channel(self.std, x.dtype, x.device)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Convert pixels in [0, 1] to the network's input, shape (N, C, H, W)."""
        mean, std = self.tensors(pixels)
        return (pixels - mean) / std

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Convert the network's input to pixels, shape (N, C, H, W)."""
        mean, std = self.tensors(x)
        return x * std + mean


PIXELS = InputSpace()


class Ball:
    """The allowed images around clean ones, in the network's input space.

    An allowed image is within eps of the clean one and its pixels are in [0, 1]. If a clean pixel is itself outside
    [0, 1] (random erasing in training), its range is widened to include it, so that it need not change.

    Args:
        x: Clean images in the network's input space, shape (N, C, H, W).
        threat: The threat model.
        space: The network's input space.
    """

    def __init__(self, x: torch.Tensor, threat: ThreatModel, space: InputSpace = PIXELS):
        self.x = x.detach()
        self.threat, self.space = threat, space
        mean, std = space.tensors(x)
        self.std = None if space == PIXELS else std
        self.lower = torch.minimum(self.x, -mean / std)
        self.upper = torch.maximum(self.x, (1 - mean) / std)
        if threat.box:
            self.lower = torch.maximum(self.lower, self.x - threat.eps / std)
            self.upper = torch.minimum(self.upper, self.x + threat.eps / std)

    @classmethod
    def of_rows(cls, rows: Dict[str, torch.Tensor], threat: ThreatModel) -> 'Ball':
        """Rebuild a ball in pixel space from its `rows()`, some of which may have been replaced."""
        ball = cls.__new__(cls)
        ball.threat, ball.space, ball.std = threat, PIXELS, None
        ball.x, ball.lower, ball.upper = rows['x'], rows['lower'], rows['upper']
        return ball

    def rows(self) -> Dict[str, torch.Tensor]:
        """The tensors that define the ball, one row per image."""
        return {'x': self.x, 'lower': self.lower, 'upper': self.upper}

    def take(self, index: torch.Tensor) -> 'Ball':
        """The ball around some of the images."""
        ball = Ball.of_rows({name: rows[index] for name, rows in self.rows().items()}, self.threat)
        ball.space, ball.std = self.space, self.std
        return ball

    def to_input(self, delta: torch.Tensor) -> torch.Tensor:
        """Convert a perturbation of pixels to one of the network's input."""
        return delta if self.std is None else delta / self.std

    def project(self, adv: torch.Tensor) -> torch.Tensor:
        """Project onto the allowed images: within eps, by the threat model's projection, and within valid pixels."""
        if not self.threat.box:
            delta = adv - self.x
            pixels = delta if self.std is None else delta * self.std
            if type(self.threat).project is ThreatModel.project:
                adv = self.x + delta * self.threat.shrink(pixels)  # a factor is the same in both spaces
            else:
                lowest, highest = (
                    end - self.x if self.std is None else (end - self.x) * self.std for end in (self.lower, self.upper))
                adv = self.x + self.to_input(self.threat.project_in_box(pixels, lowest, highest))
        return torch.clamp(adv, self.lower, self.upper)

    def random(self, seed: Seed = None) -> torch.Tensor:
        """Random allowed images: from the eps ball, then clamped to valid pixels.

        Args:
            seed: One seed for the batch, one per image, or None to draw one from torch's global generator.
        """
        return self._moved(self.threat.random(self._seeds(seed), self.x[0].numel()))

    def jittered(self, std: float, seed: Seed = None) -> torch.Tensor:
        """The clean images plus Gaussian noise of `std` in pixel units, projected; `seed` as in `random`."""
        count = self.x[0].numel()
        return self._moved(noise.normal(self._seeds(seed), count, count) * std)

    def _seeds(self, seed: Seed) -> torch.Tensor:
        return noise.image_seeds(seed, len(self.x), self.x.device)

    def _moved(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.project(self.x + self.to_input(pixels.to(self.x.dtype).view(self.x.shape)))

    def ascend(self, adv: torch.Tensor, pixel_direction: torch.Tensor, step_size: float) -> torch.Tensor:
        """Take an ascent step along the threat model's `stride`, then project.

        Args:
            adv: Current images in the network's input space, shape (N, C, H, W).
            pixel_direction: Direction in pixel space, for example a gradient.
            step_size: Length of the step in pixel units.
        """
        if self.threat.sparse:
            stuck = torch.where(pixel_direction > 0, adv >= self.upper, adv <= self.lower)
            pixel_direction = torch.where(stuck, 0., pixel_direction)
        return self.project(adv + self.to_input(self.threat.stride(pixel_direction) * step_size))
