"""Adversarial images to look at."""
from dataclasses import replace
from typing import Dict, List, Sequence, Tuple

import torch

from ..attacks import Clean
from .accuracy import Runner
from .facts import Example
from .outcome import AttackOutcome

__all__ = ['example_images']


def example_images(
        runner: Runner,
        x: torch.Tensor,
        labels: torch.Tensor,
        indices: Sequence[int],
        outcomes: Sequence[AttackOutcome],
        count: int = 8,
) -> Tuple[Example, ...]:
    """Adversarial images for a figure, made again with the seeds of the evaluation.

    For each image the first attack that fooled the network is shown, the last one where none did.

    Args:
        runner: What made the outcomes.
        x: The first images of the evaluation; for a network with batch statistics, its first batch.
        labels: Their labels, shape (N,).
        indices: Their indices in the data set.
        outcomes: Of the attacks of `runner.plan`, for these images first.
        count: Number of images, those classified correctly when clean.
    """
    attacks = [(a, o) for a, o in zip(runner.plan.attacks, outcomes, strict=True) if not isinstance(a, Clean)]
    if not attacks:
        return ()
    clean = runner.logits(x, labels).softmax(1)
    rows = (clean.argmax(1) == labels).nonzero().squeeze(1)[:count].tolist()
    by_attack: Dict[int, List[int]] = {}
    for i in rows:
        fooled = [k for k, (_, outcome) in enumerate(attacks) if outcome.correct[i] is False]
        by_attack.setdefault(fooled[0] if fooled else len(attacks) - 1, []).append(i)
    examples: Dict[int, Example] = {}
    for k, standing in by_attack.items():
        attack = attacks[k][0]
        for key, member in runner.plan.members(attack, runner.num_classes):
            picked = list(range(len(x))) if runner.batch_dependent else standing
            adv = runner.craft(member, x[picked], labels[picked], [indices[i] for i in picked])
            after = runner.logits(adv, labels[picked]).softmax(1)
            for i in standing:
                j = picked.index(i)
                examples[i] = Example(
                    clean=x[i].cpu(), adversarial=adv[j].cpu(), attack=key, label=int(labels[i]),
                    prediction=int(after[j].argmax()), clean_confidence=clean[i].max().item(),
                    confidence=after[j].max().item())
            standing = [i for i in standing if not examples[i].fooled]
            if not standing:
                break
        for i in standing:
            examples[i] = replace(examples[i], attack=str(attack))
    return tuple(sorted(examples.values(), key=lambda e: e.label))
