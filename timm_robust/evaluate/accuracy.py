"""Accuracy under attack, image by image.

Every verdict comes from one place: a plain forward pass, after the attack is over, on the image it returned, which
must lie within eps of the clean one and within [0, 1].
"""
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from tqdm import tqdm

from ..errors import InputError
from ..layers import has_batch_statistics
from .specs import AttackSpec

__all__ = ['AttackResult', 'Evaluation', 'evaluate_attacks']

# float32 cannot hold clean + eps exactly: a pixel near 1 is half an ulp (6e-8) off, and the comparison as much again
_FLOAT32_SLACK = 1.2e-7


@dataclass
class AttackResult:
    """Outcome of one attack.

    Attributes:
        spec: The attack and its settings.
        correct: Per image, in the order of the evaluation: classified correctly (clean and) after the attack.
        seconds: Time spent on the attack.
    """
    spec: AttackSpec
    correct: List[bool] = field(default_factory=list)
    seconds: float = 0.

    @property
    def accuracy(self) -> float:
        """Percent of images classified correctly."""
        return 100. * sum(self.correct) / max(len(self.correct), 1)


@dataclass
class Evaluation:
    """Outcome of all attacks on the same images.

    Attributes:
        results: One per attack.
        labels: True label of each image.
        indices: Index of each image in the data set.
        examples: Image tensors and predictions of some images, for a figure.
        batch_dependent: The network's prediction depends on the other images of the batch.
    """
    results: List[AttackResult]
    labels: List[int] = field(default_factory=list)
    indices: List[int] = field(default_factory=list)
    examples: List[dict] = field(default_factory=list)
    batch_dependent: bool = False

    @property
    def worst_case(self) -> List[bool]:
        """Per image: classified correctly whatever the attack."""
        return [all(outcome) for outcome in zip(*(r.correct for r in self.results))]


def _logits(model: Callable, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(x)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise InputError(f'--model: must return logits of shape (N, K), not {type(logits).__name__}')
    if not torch.isfinite(logits).all():
        raise InputError('--model: returns logits that are not finite, its weights are broken')
    if labels.max() >= logits.shape[1]:
        raise InputError(
            f'--num-classes {logits.shape[1]}: the data has label {labels.max().item()}, pass --num-classes '
            f'{labels.max().item() + 1} or the data set the model was trained on')
    return logits


def _assert_allowed(adv: torch.Tensor, x: torch.Tensor, spec: AttackSpec) -> None:
    delta = (adv.double() - x.double()).flatten(1)
    size = delta.abs().amax(1) if spec.threat.norm == 'linf' else delta.norm(dim=1)
    slack = _FLOAT32_SLACK if spec.threat.norm == 'linf' else _FLOAT32_SLACK * delta.shape[1] ** .5
    if size.max() > spec.threat.eps + slack or adv.min() < 0 or adv.max() > 1:
        raise RuntimeError(
            f'{spec.name} left its threat model: perturbation {size.max():.8g} for eps {spec.threat.eps:.8g}, '
            f'pixels in [{adv.min():.8g}, {adv.max():.8g}]')


def _image_seeds(seed: int, indices: Sequence[int]) -> List[int]:
    return [(seed * 0x9E3779B1 + i) % (1 << 62) for i in indices]


def evaluate_attacks(
        model: nn.Module,
        loader,
        indices: Sequence[int],
        specs: Sequence[AttackSpec],
        *,
        device: torch.device,
        seed: int = 0,
        num_examples_kept: int = 0,
        progress: Optional[bool] = None,
) -> Evaluation:
    """Attack a network on a data set.

    Each attack works on the images the network classifies correctly; noise is seeded per image of the data set. For a
    network with batch statistics the whole batch is attacked together, since a prediction holds within its batch only.

    Args:
        model: Maps pixels in [0, 1], shape (N, C, H, W), to logits; in eval mode.
        loader: Delivers (pixels, labels), in the order of `indices`.
        indices: Index of each image in the data set.
        specs: Attacks by `parse_attacks`.
        device: Device of the network.
        seed: Seed of the noise.
        num_examples_kept: Images to keep for a figure.
        progress: Show a progress bar; by default only on a terminal.

    Raises:
        InputError: If the network is in training mode, pixels are not in [0, 1], labels do not fit or logits are not
            finite.
    """
    if model.training:
        raise InputError('model is in training mode: call model.eval() before an evaluation')
    evaluation = Evaluation([AttackResult(spec) for spec in specs], batch_dependent=has_batch_statistics(model))
    if evaluation.batch_dependent:
        for spec in specs:
            if spec.function == 'pgd_targeted' or spec.settings.get('restarts', 1) > 1:
                raise InputError(
                    f'--attacks {spec.name}: picks the best of several runs per image, which is not defined for a '
                    'network that normalizes by the batch: choose pgd with --restarts 1')
    done = 0
    bar = tqdm(loader, unit='batch', disable=None if progress is None else not progress)
    for x, labels in bar:
        x, labels = x.to(device), labels.to(device)
        if x.min() < 0 or x.max() > 1:
            raise InputError(
                f'pixels span [{x.min().item():.3g}, {x.max().item():.3g}]: the loader must deliver [0, 1], '
                'without normalization')
        own_indices = list(indices[done:done + len(x)])
        done += len(x)
        clean_prediction = _logits(model, x, labels).argmax(dim=1)
        clean_correct = clean_prediction == labels
        attacked = torch.arange(len(x), device=device)
        if not evaluation.batch_dependent:
            attacked = attacked[clean_correct]
        for result in evaluation.results:
            adv, start = x, time.perf_counter()
            if result.spec.function is not None and len(attacked):
                seeds = _image_seeds(seed, [own_indices[i] for i in attacked.tolist()])
                # the best iterates of several images never stood in one batch, which matters if the batch does
                keep = 'last' if evaluation.batch_dependent else 'best'
                adv = x.index_copy(0, attacked, result.spec(model, x[attacked], labels[attacked], seeds, keep=keep))
                _assert_allowed(adv, x, result.spec)
            prediction = clean_prediction if adv is x else _logits(model, adv, labels).argmax(dim=1)
            result.correct += (clean_correct & (prediction == labels)).tolist()
            result.seconds += time.perf_counter() - start
        evaluation.labels += labels.tolist()
        evaluation.indices += own_indices
        for i in range(len(x)):
            if len(evaluation.examples) < num_examples_kept and clean_correct[i]:
                evaluation.examples.append({
                    'clean': x[i].cpu(),
                    'adversarial': adv[i].cpu(),
                    'label': labels[i].item(),
                    'prediction': prediction[i].item(),
                })
        bar.set_postfix_str('  '.join(f'{r.spec.name} {r.accuracy:.1f}%' for r in evaluation.results))
    return evaluation


def sweep_eps(
        model: nn.Module,
        make_loader: Callable,
        indices: Sequence[int],
        specs_by_eps: Dict[float, AttackSpec],
        **kwargs,
) -> Dict[float, float]:
    """Accuracy in percent for each eps; 0 stands for clean images.

    Args:
        model: See `evaluate_attacks`.
        make_loader: Returns a fresh loader.
        indices: See `evaluate_attacks`.
        specs_by_eps: One attack for each eps.
        **kwargs: Arguments of `evaluate_attacks`.
    """
    ordered = sorted(specs_by_eps.items())
    evaluation = evaluate_attacks(model, make_loader(), indices, [spec for _, spec in ordered], **kwargs)
    return {eps: result.accuracy for (eps, _), result in zip(ordered, evaluation.results)}
