"""The attack for networks that normalize by the batch at hand: the whole batch moves, and its statistics with it."""
from typing import Callable, Optional

import torch

from .context import crafting
from .losses import cross_entropy, hard_labels, logit_gap
from .pgd import pgd
from .threat import InputSpace, Seed, ThreatModel

__all__ = ['adaptive_batch']


def adaptive_batch(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 100,
        step_size: Optional[float] = None,
        restarts: int = 1,
        space: Optional[InputSpace] = None,
        norm_mode: str = 'eval',
        seed: Seed = 0,
) -> torch.Tensor:
    """PGD on a whole batch at once, on the cross-entropy and on the logit gap, with gradients through the statistics.

    An attack per image means nothing where a prediction depends on the neighbours. Here the attacker holds the whole
    batch: of all iterates of all runs the batch in which most images fool the network at once is returned. The outcome
    holds for this batch alone. In the spirit of Tramer et al. 2020, `On Adaptive Attacks to Adversarial Example
    Defenses` - https://arxiv.org/abs/2002.08347

    Args:
        model, x, y, threat, step_size, space, norm_mode, seed: See `pgd`.
        steps: Number of gradient steps of each run.
        restarts: Number of runs with each loss.

    Returns:
        The batch like x, every image within eps of its clean one and within valid pixels.

    Raises:
        InputError: On bad arguments.
    """
    labels, best, most = hard_labels(y), x.detach(), -1
    for loss_fn in (cross_entropy, logit_gap):
        adv = pgd(
            model, x, y, threat, space=space, steps=steps, step_size=step_size, restarts=restarts, loss_fn=loss_fn,
            keep='batch', norm_mode=norm_mode, seed=seed)
        with crafting(model, norm_mode), torch.no_grad():
            fooled = int((model(adv).argmax(1) != labels).sum())
        if fooled > most:
            best, most = adv, fooled
    return best
