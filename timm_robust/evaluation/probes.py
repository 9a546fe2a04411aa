"""Signs on a few images that accuracies would be wrong, looked for in every evaluation; `diagnose` looks closer."""
from typing import List

import torch
import torch.nn as nn

from ..attacks import logits_of
from ..errors import InputError
from .surface import input_gradients

__all__ = ['refuse_probabilities', 'suspicions']

_TOLERANCE = 1e-3  # of the largest logit: rounding differs with the batch size
_FEWEST = 8


def refuse_probabilities(logits: torch.Tensor) -> None:
    """Refuse a single output that is a probability: as a logit it would always mean class 1.

    Args:
        logits: Of several images, (N, K); a single output z is [0, z].

    Raises:
        InputError: If all of at least eight outputs are between 0 and 1.
    """
    if logits.shape[1] != 2 or len(logits) < _FEWEST or logits[:, 0].any():
        return
    if ((logits[:, 1] >= 0) & (logits[:, 1] <= 1)).all():
        raise InputError(
            'returns single outputs between 0 and 1, as after a sigmoid, but a single output is a logit',
            'return it before the sigmoid', argument='model')


def suspicions(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        batch_size: int,
        alone: bool,
        gradients: bool,
) -> List[str]:
    """Reasons to doubt the accuracies of a network, as sentences.

    Args:
        model: Maps pixels to logits, in eval mode; deterministic.
        x: A few images (N, C, H, W) in [0, 1].
        y: Class indices (N,).
        batch_size: Largest batch.
        alone: Whether to compare predictions of single images with those of the batch.
        gradients: Whether attacks need the gradient.
    """
    found, logits = [], logits_of(model, x, batch_size)
    if alone and min(len(x), batch_size) > 1:
        excess = (logits_of(model, x, 1) - logits).abs().max() / logits.abs().max().clamp_min(1e-12)
        if excess > _TOLERANCE:
            found.append(
                'The predictions of this network depend on the other images in the batch, by something other than '
                'normalization layers. These accuracies hold for these batches only.')
    right = logits.argmax(1) == y
    if gradients and right.any():
        zero = int((input_gradients(model, x[right], y[right], batch_size) == 0).flatten(1).all(1).sum())
        if zero:
            found.append(
                f'The input gradient of the cross-entropy is exactly zero for {zero} of the first {int(right.sum())} '
                'correctly classified images: attacks that follow it cannot change them, so accuracy under these '
                'attacks says little. `diagnose` looks closer; Square attacks without gradients.')
    return found
