"""Adversarial images to look at."""
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn as nn

from ..attacks.search import logits_of
from .accuracy import image_seeds
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
        search_model: Optional[Callable] = None,
) -> List[Dict[str, Any]]:
    """Adversarial images for a figure, made again with the seeds of the evaluation.

    For each image the first attack that fooled the network is shown, the last one where none did.

    Args:
        model: The network that was evaluated.
        x: The first images of the evaluation; for a network with batch statistics, its first batch.
        evaluation: What came out.
        seed: Seed of the evaluation.
        count: Number of images, those classified correctly when clean.
        surrogate, search_model: Those of the evaluation, see `evaluate_attacks`.

    Returns:
        One dict per image: clean and adversarial image, label, prediction and confidence of both, attack.
    """
    attacks = [r for r in evaluation.results if r.spec.is_attack]
    if not attacks:
        return []
    labels = torch.tensor(evaluation.labels[:len(x)], device=x.device)
    clean = logits_of(model, x).softmax(1)
    rows = (clean.argmax(1) == labels).nonzero().squeeze(1)[:count].tolist()
    by_attack: Dict[int, List[int]] = {}
    for i in rows:
        fooled = [k for k, r in enumerate(attacks) if r.correct[i] is False]
        by_attack.setdefault(fooled[0] if fooled else len(attacks) - 1, []).append(i)
    # as in the evaluation
    keep = 'last' if evaluation.batch_dependent or surrogate is not None else 'best'
    examples = {}
    for k, standing in by_attack.items():
        for part, key in keyed_steps(attacks[k].spec):
            picked = list(range(len(x))) if evaluation.batch_dependent else standing
            adv = part(
                model if surrogate is None else surrogate, x[picked], labels[picked],
                image_seeds(seed, [evaluation.indices[i] for i in picked]), keep=keep,
                search_model=search_model if surrogate is None else None)
            after = logits_of(model, adv).softmax(1)
            for i in standing:
                j = picked.index(i)
                examples[i] = {
                    'clean': x[i].cpu(),
                    'adversarial': adv[j].cpu(),
                    'attack': key,
                    'label': labels[i].item(),
                    'clean_confidence': clean[i].max().item(),
                    'prediction': after[j].argmax().item(),
                    'confidence': after[j].max().item(),
                }
            standing = [i for i in standing if examples[i]['prediction'] == examples[i]['label']]
            if not standing:
                break
        for i in standing:
            examples[i]['attack'] = attacks[k].spec.name
    return sorted(examples.values(), key=lambda e: e['label'])
