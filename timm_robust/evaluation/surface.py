"""The loss around clean images, along the gradient and along a random direction."""
import copy
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Iterator, Tuple

import torch
import torch.nn as nn

from ..attacks import ThreatModel, check_images, cross_entropy, image_seeds, input_gradient, logits_of
from ..attacks.checks import as_logits
from ..attacks.noise import signs
from ..precision import float32_proper
from ..settings import check_types

__all__ = ['LossSurface', 'directions', 'input_gradients', 'loss_surface', 'mean_loss', 'seeded']


@dataclass(frozen=True)
class LossSurface:
    """Mean cross-entropy on a grid around clean images.

    Attributes:
        norm, eps: Threat model.
        seed: Seed of the random direction.
        num_examples: Number of images in the mean.
        coordinates: Points along each direction, in units of eps.
        loss: Rows along the random direction, columns along the gradient.
    """
    norm: str
    eps: float
    seed: int
    num_examples: int
    coordinates: Tuple[float, ...]
    loss: Tuple[Tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_types(self)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch, so that a randomized network repeats its results; torch's generators are restored afterwards."""
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        yield


def input_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Gradient of the cross-entropy for each image, in the shape of x."""
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(as_logits(output, len(target)), target)

    return torch.cat([
        input_gradient(model, part, partial(loss, target=labels))[0]
        for part, labels in zip(x.split(batch_size), y.split(batch_size))])


def directions(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        batch_size: int,
        seed: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Steps of length eps along the gradient of the cross-entropy and along random signs."""
    gradient = input_gradients(model, x, y, batch_size)
    random = signs(image_seeds(seed, len(x), x.device), 0, x[0].numel()).view_as(x).to(x.dtype)
    return threat.eps * threat.stride(gradient), threat.eps * threat.stride(random)


def mean_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> float:
    """Mean cross-entropy of images clamped to [0, 1]."""
    return cross_entropy(logits_of(model, x.clamp(0, 1), batch_size), y).mean().item()


@float32_proper()
def loss_surface(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        points: int = 21,
        batch_size: int = 128,
        seed: int = 0,
) -> LossSurface:
    """Mean cross-entropy on a grid around clean images, spanned by the gradient and a random direction.

    Args:
        model: Maps pixels to logits, in eval mode.
        x: Images (N, C, H, W) in [0, 1].
        y: Class indices (N,).
        threat: Threat model.
        points: Points along each direction, from -eps to eps; images are clamped to [0, 1].
        batch_size: Batch size.
        seed: Seed of the random signs and of the network's own noise.
    """
    check_images(x)
    model = copy.deepcopy(model).requires_grad_(False)
    coordinates = torch.linspace(-1, 1, points).tolist()
    with seeded(seed, x.device):
        gradient, random = directions(model, x, y, threat, batch_size, seed)
        loss = [
            tuple(mean_loss(model, x + a * gradient + b * random, y, batch_size) for a in coordinates)
            for b in coordinates]
    return LossSurface(threat.norm, threat.eps, seed, len(x), tuple(coordinates), tuple(loss))
