"""How predictions depend on the other images in the batch, and attacks that take this into account.

A network that normalizes by the current batch has no robust accuracy per image: in another batch, an adversarial image
may not fool it, and the prediction for a clean image may change. What can be measured is a joint attack on fixed
batches, with gradients through the statistics.
"""
import copy
import math
import warnings
from typing import Dict, Mapping, Optional, Tuple, TypedDict

import torch
import torch.nn as nn

from ..attacks import APGD, PGD, Adaptive, ThreatModel, image_seeds, logits_of
from ..errors import InputError
from ..layers import has_batch_statistics, set_bn_mode

__all__ = [
    'POINT',
    'ROUNDING',
    'AdaptiveAccuracy',
    'BatchAccuracy',
    'adaptive_accuracy',
    'compare_batches',
    'even_batch_size',
    'judge_adaptive',
    'judge_batches',
]

# Kernels for different batch sizes round differently: under TF32, logits differ by up to this share of the largest.
ROUNDING = 1e-3
POINT = 1.  # a larger difference of accuracies, in percentage points, is meaningful


class BatchAccuracy(TypedDict):
    """Accuracy in percent, and the number of images whose prediction differs from that in their own batch."""
    accuracy: float
    changed: int


class AdaptiveAccuracy(TypedDict):
    """Accuracies in percent, see `adaptive_accuracy`; None where no statistics are tracked."""
    standing: Optional[float]
    population_clean: Optional[float]
    population_apgd_ce: Optional[float]
    clean: float
    pgd: float
    adaptive: float


def even_batch_size(num_examples: int, batch_size: int) -> int:
    """The batch size that splits images evenly into as few batches of at most `batch_size` as possible."""
    return math.ceil(num_examples / math.ceil(num_examples / batch_size))


def compare_batches(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        batch_size: int,
        seed: int = 0,
) -> Dict[str, Optional[BatchAccuracy]]:
    """Classify the same images in different batches.

    Args:
        model: Maps pixels (N, C, H, W) to logits (N, K), in eval mode.
        x: Images, shape (N, C, H, W), pixels in [0, 1].
        y: True class indices, shape (N,).
        batch_size: Size of a batch.
        seed: Seed of the shuffled batches.

    Returns:
        For 'own' (batches in the order given), 'alone', 'shuffled' and 'one_class': the `accuracy`, and the number of
        images `changed`, whose predicted class differs from that in their own batch by more than rounding. None where
        the network cannot take such a batch (BatchNorm refuses a single value per channel).
    """
    groups = {
        'own': torch.arange(len(x), device='cpu').split(batch_size),
        'alone': torch.arange(len(x), device='cpu').split(1),
        'shuffled': torch.randperm(
            len(x), generator=torch.Generator('cpu').manual_seed(seed), device='cpu').split(batch_size),
        'one_class': [p for c in y.unique() for p in (y == c).nonzero().squeeze(1).cpu().split(batch_size)],
    }
    own = logits_of(model, x, batch_size).argmax(1, keepdim=True)
    outcome: Dict[str, Optional[BatchAccuracy]] = {}
    for name, batches in groups.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # RobustNorm warns about a batch of one image, intended here
                logits = torch.cat([logits_of(model, x[batch]) for batch in batches])
        except ValueError:
            outcome[name] = None
            continue
        logits = logits[torch.cat(list(batches)).argsort()]
        lead = logits.amax(1) - logits.gather(1, own).squeeze(1)
        outcome[name] = {
            'accuracy': 100. * int((logits.argmax(1) == y).sum()) / len(x),
            'changed': int((lead > ROUNDING * logits.abs().amax(1)).sum()),
        }
    return outcome


def judge_batches(
        measured: Mapping[str, Optional[BatchAccuracy]],
        normalizes_by_batch: bool,
        batch_size: int,
) -> Tuple[str, str]:
    """Verdict and text for what `compare_batches` measured in batches of `batch_size`."""
    parts = [
        f'{name.replace("_", " ")} ' + ('cannot be run' if m is None else (
            f'{m["accuracy"]:.1f} %' + ('' if name == 'own' else f' ({m["changed"]} predictions change)')))
        for name, m in measured.items()]
    text = f'Clean accuracy by composition of the batch (size {batch_size}): {", ".join(parts)}. '
    if not normalizes_by_batch and all(m is not None and not m['changed'] for m in measured.values()):
        return 'ok', text + 'No prediction depends on the batch.'
    return 'alarm', text + (
        'Predictions depend on the other images in the batch: any accuracy, clean or under attack, holds for its '
        'batches only.')


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
) -> AdaptiveAccuracy:
    """Attack whole batches of a network that normalizes by the batch.

    Args:
        model: Maps pixels (N, C, H, W) to logits (N, K), in eval mode.
        x: Clean images in the order of the batches, shape (N, C, H, W), pixels in [0, 1].
        y: True class indices, shape (N,).
        threat: Norm and eps.
        batch_size: Size of a batch.
        few_steps: Steps of plain PGD.
        steps: Steps of all other attacks.
        restarts: Restarts of `Adaptive` with each loss.
        seed: Seed of random starts.

    Returns:
        Accuracies in percent, in these batches: `clean`; `pgd` (whole batches, few steps); `adaptive`
        (`Adaptive`); `standing` (PGD crafted with fixed population statistics). With population statistics:
        `population_clean` and `population_apgd_ce`. The last three are None for a network that tracks no statistics.
    """
    population, tracked = copy.deepcopy(model), False
    try:
        population = set_bn_mode(population, 'population')
        tracked = not has_batch_statistics(population)
    except InputError:
        pass  # no statistics are tracked
    seeds = image_seeds(seed, len(x), x.device)
    count: Dict[str, int] = {}
    for part, labels, own_seeds in zip(*(t.split(batch_size) for t in (x, y, seeds))):
        common = dict(threat=threat, seed=own_seeds.tolist())
        images = {
            'clean': part,
            'pgd': PGD(steps=few_steps).craft(model, part, labels, keep='most_fooled', **common),
            'adaptive': Adaptive(steps=steps, restarts=restarts).craft(model, part, labels, **common),
        }
        if tracked:
            # the last iterate: an image that barely fools one network rarely fools another
            images['standing'] = PGD(steps=steps).craft(population, part, labels, **common)
        clean = logits_of(model, part).argmax(1) == labels
        for name, adv in images.items():
            held = clean & (logits_of(model, adv).argmax(1) == labels)
            count[name] = count.get(name, 0) + int(held.sum())
    if tracked:
        clean = logits_of(population, x, batch_size).argmax(1) == y
        count['population_clean'] = int(clean.sum())
        adv = APGD(steps=steps)(population, x, y, threat, batch_size=batch_size, seed=seeds.tolist())
        count['population_apgd_ce'] = int((clean & (logits_of(population, adv, batch_size).argmax(1) == y)).sum())
    found = {name: 100. * number / len(x) for name, number in count.items()}
    return AdaptiveAccuracy(
        standing=found.get('standing'), population_clean=found.get('population_clean'),
        population_apgd_ce=found.get('population_apgd_ce'), clean=found['clean'], pgd=found['pgd'],
        adaptive=found['adaptive'])


def judge_adaptive(
        measured: AdaptiveAccuracy,
        threat: ThreatModel,
        few_steps: int,
        steps: int,
        restarts: int,
) -> Tuple[str, str]:
    """Verdict and text for what `adaptive_accuracy` measured."""
    standing = measured['standing']
    simple = [measured['pgd']] + ([] if standing is None else [standing])
    worst = min(measured['adaptive'], *simple)
    text = (
        f'Whole batches were attacked at {threat}, since the network normalizes by the batch: clean '
        f'{measured["clean"]:.1f} %, PGD-{few_steps} {measured["pgd"]:.1f} %, PGD-{steps} on cross-entropy and logit '
        f'gap with {restarts} restarts {measured["adaptive"]:.1f} %. ')
    if standing is not None:
        text += (
            f'A single PGD-{steps} on cross-entropy that treats the statistics as constants gives {standing:.1f} %, '
            f'{standing - worst:.1f} points above the lowest. ')
    text += f'The lowest, {worst:.1f} %, holds for these batches and guarantees nothing for others. '
    text += 'The network tracks no statistics to deploy it with.' if measured['population_clean'] is None else (
        'Deploy the network with population statistics, for which the comparable accuracies are clean '
        f'{measured["population_clean"]:.1f} %, APGD-CE ({steps} steps) {measured["population_apgd_ce"]:.1f} %.')
    return 'alarm' if max(simple) - worst > POINT else 'warning', text
