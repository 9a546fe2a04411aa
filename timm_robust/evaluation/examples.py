"""Adversarial images to look at."""
from dataclasses import replace
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from ..attacks import logits_of
from .accuracy import image_seeds
from .facts import Example
from .outcome import Evaluation, keyed_steps

__all__ = ['example_images']


def example_images(
        model: nn.Module,
        x: torch.Tensor,
        evaluation: Evaluation,
        *,
        seed: int = 0,
        count: int = 8,
        surrogate: Optional[nn.Module] = None,
        fast_model: Optional[Callable] = None,
) -> Tuple[Example, ...]:
    """Adversarial images for a figure, made again with the seeds of the evaluation.

    For each image the first attack that fooled the network is shown, the last one where none did.

    Args:
        model: The network that was evaluated.
        x: The first images of the evaluation; for a network with batch statistics, its first batch.
        evaluation: What came out.
        seed: Seed of the evaluation.
        count: Number of images, those classified correctly when clean.
        surrogate, fast_model: Those of the evaluation, see `evaluate_attacks`.

    Returns:
        One for each image.
    """
    attacks = [r for r in evaluation.results if r.spec.is_attack]
    if not attacks:
        return ()
    labels = torch.tensor(evaluation.labels[:len(x)], device=x.device)
    clean = logits_of(model, x).softmax(1)
    rows = (clean.argmax(1) == labels).nonzero().squeeze(1)[:count].tolist()
    by_attack: Dict[int, List[int]] = {}
    for i in rows:
        fooled = [k for k, r in enumerate(attacks) if r.correct[i] is False]
        by_attack.setdefault(fooled[0] if fooled else len(attacks) - 1, []).append(i)
    # as in the evaluation
    whole_batch = evaluation.batch_dependent or surrogate is not None
    how = {} if whole_batch else {'fast_model': fast_model}
    examples: Dict[int, Example] = {}
    for k, standing in by_attack.items():
        for part, key in keyed_steps(attacks[k].spec):
            picked = list(range(len(x))) if evaluation.batch_dependent else standing
            adv = part(
                model if surrogate is None else surrogate, x[picked], labels[picked],
                image_seeds(seed, [evaluation.indices[i] for i in picked]), whole_batch=whole_batch, **how)
            after = logits_of(model, adv).softmax(1)
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
            examples[i] = replace(examples[i], attack=attacks[k].spec.name)
    return tuple(sorted(examples.values(), key=lambda e: e.label))
