"""Friendly adversarial examples: just past the decision boundary instead of as far beyond it as eps allows.

Zhang et al. 2020, `Attacks Which Do Not Kill Training Make Adversarial Learning Stronger` -
https://arxiv.org/abs/2002.11242, algorithm 1.
"""
from functools import partial
from typing import Callable, Optional

import torch

from ..errors import InputError
from .context import crafting, input_gradient
from .losses import cross_entropy, hard_labels
from .pgd import check_steps, start_of
from .search import check_images
from .threat import Ball, InputSpace, Seed, ThreatModel, madry_step_size

__all__ = ['friendly_pgd']


def friendly_pgd(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        space: Optional[InputSpace] = None,
        steps: int = 10,
        step_size: Optional[float] = None,
        tau: int = 0,
        random_start: bool = True,
        start_std: Optional[float] = None,
        reference: Optional[torch.Tensor] = None,
        seed: Optional[Seed] = 0,
) -> torch.Tensor:
    """PGD that stops, image by image, `tau` steps after it first fools the network.

    Images that have stopped leave the batch that is still attacked. A training attack: to evaluate, use `pgd`.

    Args:
        model: Maps images to logits.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True class indices, shape (N,), which decide what fools.
        threat: Norm and eps.
        space: Input space of the network if it is not pixels.
        steps: Largest number of gradient steps.
        step_size: Length of a step in pixel units, `madry_step_size` by default.
        tau: Steps to go on after the network is first fooled, at least 0.
        random_start, start_std: See `pgd`.
        reference: Soft targets (N, K) whose cross-entropy is ascended instead of that of y (TRADES).
        seed: See `pgd`.

    Returns:
        Images like x, detached, within eps of x and within valid pixels.

    Raises:
        InputError: On bad arguments.
    """
    check_steps(steps, step_size)
    if tau < 0:
        raise InputError(f'tau={tau} must be at least 0')
    check_images(x, y, space)
    step_size = step_size or madry_step_size(threat, steps) or 1.
    space = space or InputSpace()
    labels, ascended = hard_labels(y), y if reference is None else reference
    ball = Ball(x, threat, space)
    point = start_of(ball, seed, random_start, start_std)
    adv, rows = point.clone(), torch.arange(len(x), device=x.device)
    left = torch.full((len(x),), tau, device=x.device)
    with crafting(model):
        for _ in range(steps):
            gradient, logits, _ = input_gradient(model, point, partial(cross_entropy, target=ascended[rows]))
            fooled = logits.argmax(dim=1) != labels[rows]
            stays = ~fooled | (left > 0)
            if not stays.all():
                adv[rows[~stays]] = point[~stays]
                rows, point, gradient, left, fooled = (t[stays] for t in (rows, point, gradient, left, fooled))
                if not len(rows):
                    return adv
                ball = Ball(x[rows], threat, space)
            left = left - fooled.long()
            point = ball.ascend(point, ball.pixel_gradient(gradient), step_size)
    adv[rows] = point
    return adv
