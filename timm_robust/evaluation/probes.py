"""Signs on the first images that accuracies would be wrong, looked for in every evaluation; a diagnosis has more."""
from dataclasses import dataclass
from typing import List, Tuple

import torch
import torch.nn as nn

from ..attacks import logits_of
from ..errors import InputError
from ..precision import float32_proper
from .surface import input_gradients

__all__ = ['Probe', 'probe']

_PROBED = 8
_TOLERANCE = 1e-3  # of the largest logit: rounding differs with the batch size


@dataclass(frozen=True)
class Probe:
    """What the first images show.

    Attributes:
        randomized: Whether two passes of the same images differ.
        suspicions: Reasons to doubt the accuracies, as sentences.
    """
    randomized: bool
    suspicions: Tuple[str, ...] = ()


def _are_probabilities(logits: torch.Tensor) -> bool:
    """Whether all logits (N, 2) are those of a single output in [0, 1], which `as_logits` turned into [0, z]."""
    z = logits[:, -1]
    return logits.shape[1] == 2 and not logits[:, 0].any() and bool(((z >= 0) & (z <= 1)).all())


@float32_proper()
def probe(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        batch_size: int,
        batch_dependent: bool,
        gradients: bool,
) -> Probe:
    """Try a network on the first images; torch's generators are restored afterwards.

    Args:
        model: Maps pixels to logits, in eval mode.
        x: Images (N, C, H, W) in [0, 1], of which a few are used.
        y: Class indices (N,).
        batch_size: Largest batch.
        batch_dependent: Whether it normalizes by the batch.
        gradients: Whether attacks follow its gradient.

    Raises:
        InputError: If a single output of the network is a probability; as a logit it would always mean class 1.
    """
    few, labels = x[:_PROBED], y[:_PROBED]
    size = len(few) if batch_dependent else batch_size
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        logits, again = logits_of(model, few, size), logits_of(model, few, size)
        # a few logits may be in [0, 1] by chance
        if len(few) == _PROBED and _are_probabilities(logits) and _are_probabilities(logits_of(model, x, batch_size)):
            raise InputError(
                'returns single outputs between 0 and 1, as after a sigmoid, but a single output is a logit',
                'return it before the sigmoid', argument='model')
        if not torch.allclose(logits, again, 1e-4, 1e-4):
            return Probe(True)
        found: List[str] = []
        if not batch_dependent and min(len(few), size) > 1:
            change = (logits_of(model, few, 1) - logits).abs().max()
            if change > _TOLERANCE * logits.abs().max():
                found.append(
                    'The predictions of this network depend on the other images in the batch, by something other than '
                    'normalization layers. These accuracies hold for these batches only.')
        right = logits.argmax(1) == labels
        if gradients and right.any():
            zero = int((input_gradients(model, few[right], labels[right], size) == 0).flatten(1).all(1).sum())
            if zero:
                found.append(
                    f'The input gradient of the cross-entropy is exactly zero for {zero} of the first '
                    f'{int(right.sum())} correctly classified images. Gradient attacks cannot change them, so accuracy '
                    'under these attacks is an artifact: run a diagnosis, and Square, which needs no gradient.')
            elif (certain := int((logits[right].softmax(1).amax(1) == 1).sum())) > right.sum() / 2:
                found.append(
                    f'The probability of the true class rounds to 1 for {certain} of the first {int(right.sum())} '
                    'correctly classified images. The cross-entropy is nearly flat there, so attacks on it (FGSM, PGD, '
                    'MIM) are weaker: compare with APGD-DLR or AutoAttack, which ignore the scale of the logits.')
    return Probe(False, tuple(found))
