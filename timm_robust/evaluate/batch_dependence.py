"""What a prediction owes to the other images of its batch, and attacks that reckon with it.

A network that normalizes by the batch at hand has no robust accuracy per image: an adversarial image found in one batch
need not fool in another, nor a clean one be classified alike. What can be measured is a joint attack on fixed batches,
with gradients through the statistics.
"""
import copy
import math
import warnings
from typing import Any, Dict

import torch
import torch.nn as nn

from ..attacks import ThreatModel, apgd_ce, cross_entropy, logit_gap, pgd
from ..attacks.noise import image_seeds
from ..attacks.search import logits_of
from ..layers import has_batch_statistics, set_norm_statistics

__all__ = ['ROUNDING', 'adaptive_accuracy', 'compare_batches', 'even_batch_size']

# Logits of one image from kernels for another batch size differ by rounding, in TF32 by this share of the largest.
ROUNDING = 1e-3


def even_batch_size(num_examples: int, batch_size: int) -> int:
    """The largest batch size up to `batch_size` that leaves no small last batch."""
    return math.ceil(num_examples / math.ceil(num_examples / batch_size))


def compare_batches(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        batch_size: int,
        seed: int = 0,
) -> Dict[str, Any]:
    """Classify the same images among different neighbours.

    Args:
        model: Maps pixels (N, C, H, W) to logits (N, K), in eval mode.
        x: Images, shape (N, C, H, W), pixels in [0, 1].
        y: True class indices, shape (N,).
        batch_size: Size of a batch.
        seed: Seed of the shuffled batches.

    Returns:
        For 'own' (batches in the order given), 'alone', 'shuffled' and 'one_class': the `accuracy` and the number of
        images `changed` to another class than in their own batch by more than rounding, or None where the network
        cannot take such a batch (BatchNorm refuses a single value per channel).
    """
    groups = {
        'own': torch.arange(len(x)).split(batch_size),
        'alone': torch.arange(len(x)).split(1),
        'shuffled': torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(batch_size),
        'one_class': [p for c in y.unique() for p in (y == c).nonzero().squeeze(1).cpu().split(batch_size)],
    }
    outcome: Dict[str, Any] = {}
    for name, batches in groups.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # RobustNorm's, on a batch of one image: here it is meant
                logits = torch.cat([logits_of(model, x[batch]) for batch in batches])[torch.cat(list(batches)).argsort()]
        except ValueError:
            if name == 'own':
                raise
            outcome[name] = None
            continue
        if name == 'own':
            own = logits.argmax(1, keepdim=True)
        lead = logits.amax(1) - logits.gather(1, own).squeeze(1)
        outcome[name] = {
            'accuracy': 100. * (logits.argmax(1) == y).float().mean().item(),
            'changed': int((lead > ROUNDING * logits.abs().amax(1)).sum()),
        }
    return outcome


def adaptive_accuracy(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        batch_size: int,
        few_steps: int = 20,
        steps: int = 100,
        restarts: int = 5,
        seed: int = 0,
) -> Dict[str, Any]:
    """Attack whole batches of a network that normalizes by the batch.

    Args:
        model: Maps pixels (N, C, H, W) to logits (N, K), in eval mode.
        x: Clean images in the order of the batches, shape (N, C, H, W), pixels in [0, 1].
        y: True class indices, shape (N,).
        threat: Norm and eps.
        batch_size: Size of a batch.
        few_steps: Steps of plain PGD.
        steps: Steps of all other attacks.
        restarts: Restarts of the joint attacks.
        seed: Seed of random starts.

    Returns:
        Accuracies in percent, in these batches: `clean`; `pgd` (joint, few steps); `joint_cross_entropy` and
        `joint_logit_gap` (joint, many steps and restarts); `adaptive` (the stronger of these two in each batch);
        `standing` (crafted as if statistics stood still, at those of the population). And with population statistics:
        `population_clean` and `population_apgd_ce`. The last three are None for a network that tracks no statistics.
    """
    population = set_norm_statistics(copy.deepcopy(model), 'population')
    tracked = not has_batch_statistics(population)
    seeds = image_seeds(seed, len(x), x.device)
    count: Dict[str, int] = {}
    for part, labels, own_seeds in zip(*(t.split(batch_size) for t in (x, y, seeds))):
        common = dict(threat=threat, seed=own_seeds.tolist())
        joint = dict(steps=steps, restarts=restarts, keep='batch', **common)
        images = {
            'clean': part,
            'pgd': pgd(model, part, labels, steps=few_steps, keep='batch', **common),
            'joint_cross_entropy': pgd(model, part, labels, loss_fn=cross_entropy, **joint),
            'joint_logit_gap': pgd(model, part, labels, loss_fn=logit_gap, **joint),
        }
        if tracked:
            # the last iterate: the first that fools one network by a hair seldom fools another
            images['standing'] = pgd(population, part, labels, steps=steps, keep='last', **common)
        correct = {name: logits_of(model, adv).argmax(1) == labels for name, adv in images.items()}
        held = {name: int((correct['clean'] & kept).sum()) for name, kept in correct.items()}
        held['adaptive'] = min(held['joint_cross_entropy'], held['joint_logit_gap'])
        count = {name: count.get(name, 0) + number for name, number in held.items()}
    if tracked:
        clean = logits_of(population, x, batch_size).argmax(1) == y
        count['population_clean'] = int(clean.sum())
        adv = apgd_ce(population, x, y, threat, steps=steps, batch_size=batch_size, seed=seeds.tolist())
        count['population_apgd_ce'] = int((clean & (logits_of(population, adv, batch_size).argmax(1) == y)).sum())
    names = ('standing', 'population_clean', 'population_apgd_ce')
    return {**dict.fromkeys(names), **{name: 100. * number / len(x) for name, number in count.items()}}
