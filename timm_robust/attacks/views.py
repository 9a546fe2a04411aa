"""Input gradients for transfer attacks: averaged over views of the image, or smoothed."""
from typing import Callable, Sequence, Tuple

import torch
import torch.nn.functional as F

from . import noise
from .context import input_gradient

__all__ = ['diverse', 'smoothed', 'view_gradient']

_SMALLEST = .9  # minimum side of the shrunk image, relative to the original


def diverse(x: torch.Tensor, seeds: torch.Tensor, stream: torch.Tensor, prob: float) -> torch.Tensor:
    """With probability `prob`, shrink images to a random size and place them at random on a black canvas.

    Xie et al. 2019, `Improving Transferability of Adversarial Examples with Input Diversity` -
    https://arxiv.org/abs/1803.06978. Here each image gets its own random size and position, and the canvas has the size
    of the image. The paper enlarges images instead, which requires a network that accepts any input size.

    Args:
        x: Shape (N, C, H, W).
        seeds, stream: See `noise.uniform`, shape (N,).
        prob: In [0, 1].
    """
    drawn = noise.uniform(seeds, stream, 4).to(x.dtype)
    axes = []
    for size, place in ((x.shape[3], drawn[:, 2]), (x.shape[2], drawn[:, 3])):
        low = int(_SMALLEST * size)
        side = low + (drawn[:, 1] * (size - low)).floor()
        side = torch.where(drawn[:, 0] < prob, side, float(size))
        start = (place * (size - side + 1)).floor()
        scale = size / side
        axes.append((scale, scale - 2 * start / side - 1))  # of positions in [-1, 1]
    (a, b), (c, d) = axes
    zero = torch.zeros_like(a)
    theta = torch.stack([torch.stack([a, zero, b], 1), torch.stack([zero, c, d], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def smoothed(gradient: torch.Tensor, size: int) -> torch.Tensor:
    """Smooth a gradient (N, C, H, W) with a Gaussian kernel of `size` x `size`, truncated at 3 standard deviations.

    Dong et al. 2019, `Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks` -
    https://arxiv.org/abs/1904.02884, equation 7, with the kernel of the authors' code.
    """
    place = torch.linspace(-3, 3, size, dtype=gradient.dtype, device=gradient.device)
    line = (-place ** 2 / 2).exp()
    line = (line / line.sum()).expand(gradient.shape[1], 1, size)
    across = F.conv2d(gradient, line[:, :, None], padding=(0, size // 2), groups=gradient.shape[1])
    return F.conv2d(across, line[..., None], padding=(size // 2, 0), groups=gradient.shape[1])


def view_gradient(
        model: Callable,
        x: torch.Tensor,
        loss_fn: Callable[[torch.Tensor], torch.Tensor],
        views: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient with respect to x, averaged over views, and logits and loss at x itself.

    Args:
        model: Maps x to logits.
        x: Input, shape (N, C, H, W).
        loss_fn: Maps logits to one loss per image.
        views: Transformations of x.
    """
    gradient = torch.zeros_like(x)
    for view in views:
        gradient = gradient + input_gradient(lambda x: model(view(x)), x, loss_fn)[0]  # noqa: B023 (called here)
    with torch.no_grad():
        logits = model(x)
        return gradient / len(views), logits, loss_fn(logits)
