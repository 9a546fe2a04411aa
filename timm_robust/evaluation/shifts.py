"""Accuracy on shifted images, and ImageNet-C's corruption errors."""
import time
from dataclasses import dataclass
from functools import partial
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..attacks import logits_of
from ..data.corruptions import COMMON_CORRUPTIONS, SEVERITIES
from ..data.shifts import Part
from ..devices import halving
from ..layers import has_batch_statistics
from ..precision import float32_proper
from ..settings import check_types
from .journal import Journal

__all__ = [
    'ALEXNET_CLEAN_ERROR',
    'ALEXNET_ERRORS',
    'BenchmarkResult',
    'PartResult',
    'corruption_errors',
    'evaluate_shift',
    'summarize_shifts',
]

# Mean error of AlexNet over the five severities in percent, from the authors of ImageNet-C:
# https://github.com/hendrycks/robustness/issues/10 (by severity); the clean error is torchvision's.
ALEXNET_ERRORS = {
    'gaussian_noise': 88.6428, 'shot_noise': 89.4468, 'impulse_noise': 92.2640, 'defocus_blur': 81.9880,
    'glass_blur': 82.6268, 'motion_blur': 78.5948, 'zoom_blur': 79.8360, 'snow': 86.6816, 'frost': 82.6572,
    'fog': 81.9324, 'brightness': 56.4592, 'contrast': 85.3204, 'elastic_transform': 64.6056, 'pixelate': 71.7840,
    'jpeg_compression': 60.6500,
}
ALEXNET_CLEAN_ERROR = 43.478


def evaluate_shift(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        indices: Sequence[int],
        hashes: Sequence[str],
        key: str,
        journal: Journal,
        device: torch.device,
        classes: Optional[Tuple[int, ...]] = None,
) -> None:
    """Classify images and record which are correct.

    Args:
        model: Maps pixels in [0, 1] to logits; in eval mode.
        loader: Yields (pixels, labels), in the order of `indices`.
        indices: Index of each image.
        hashes: Hash of each image.
        key: Key of the outcomes. With `classes`, outcomes of predictions among all classes are kept under KEY/all.
        journal: Stores the outcomes.
        device: Device of the network.
        classes: Classes to predict; the logits of others are ignored. None for all.
    """
    done, start, size, fixed = 0, time.perf_counter(), 0, has_batch_statistics(model)
    among = None if classes is None else torch.tensor(classes, device=device)
    with float32_proper():
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            logits, size = halving(partial(logits_of, model, x), size or len(x), fixed)
            these = slice(done, done + len(x))
            own, predicted = (list(indices[these]), list(hashes[these])), logits.argmax(1)
            if among is not None:
                journal.record(f'{key}/all', *own, (predicted == y).tolist(), 0.)
                predicted = among[logits[:, among].argmax(1)]
            journal.record(key, *own, (predicted == y).tolist(), time.perf_counter() - start)
            done, start = done + len(x), time.perf_counter()


@dataclass(frozen=True)
class PartResult:
    """Number of correct images in one part of a benchmark, with its corruption and severity if it has them."""
    num_correct: int
    num_images: int
    corruption: Optional[str] = None
    severity: Optional[int] = None

    @property
    def error(self) -> float:
        """Error in percent."""
        return 100. - 100. * self.num_correct / self.num_images


@dataclass(frozen=True)
class BenchmarkResult:
    """Accuracy on one benchmark of distribution shift.

    Attributes:
        name: The benchmark.
        parts: Its parts: a single one, or one for each corruption and severity.
        available: Number of available images, from which the evaluated images were chosen.
        expected: Number of published images; None for images computed on the fly.
        num_classes: Number of classes to predict; None for all.
        num_correct_all: Number of images that are correct when predicted among all classes, if `num_classes` is set.
        resized_to: Height and width that images of another size were resized to.
    """
    name: str
    parts: Tuple[PartResult, ...]
    available: int
    expected: Optional[int] = None
    num_classes: Optional[int] = None
    num_correct_all: Optional[int] = None
    resized_to: Optional[Tuple[int, int]] = None

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def num_images(self) -> int:
        """Number of images of all parts."""
        return sum(part.num_images for part in self.parts)

    @property
    def accuracy(self) -> float:
        """Accuracy in percent; for corruptions, 100 minus the mean error."""
        return 100. - self.mean_error

    @property
    def accuracy_all_classes(self) -> Optional[float]:
        """Accuracy among all classes of the network, in percent; None unless `num_classes` is set."""
        return None if self.num_correct_all is None else 100. * self.num_correct_all / self.num_images

    @property
    def errors(self) -> Dict[str, Dict[int, float]]:
        """Error in percent by corruption and severity; empty for a benchmark without corruptions."""
        found: Dict[str, Dict[int, float]] = {}
        for part in self.parts:
            if part.corruption is not None and part.severity is not None:
                found.setdefault(part.corruption, {})[part.severity] = part.error
        return found

    @property
    def mean_error(self) -> float:
        """Mean error in percent over the 15 common corruptions, or over others if there are none of these."""
        if not self.errors:
            return self.parts[0].error
        return sum(self.mean_errors.values()) / len(self.mean_errors)

    @property
    def mean_errors(self) -> Dict[str, float]:
        """Error in percent of the corruptions that `mean_error` averages, over severities."""
        return _means(self.errors)

    @property
    def mce(self) -> Optional[float]:
        """Mean corruption error of ImageNet-C, see `corruption_errors`; None for other data."""
        return corruption_errors(self.errors)[0] if self.name == 'c' else None

    def relative_mce(self, clean_accuracy: Optional[float]) -> Optional[float]:
        """Relative mCE of ImageNet-C, given accuracy on clean images in percent; None for other data."""
        if self.name != 'c' or clean_accuracy is None:
            return None
        return corruption_errors(self.errors, 100. - clean_accuracy)[1]


def _means(errors: Dict[str, Dict[int, float]]) -> Dict[str, float]:
    common = {c: own for c, own in errors.items() if c in COMMON_CORRUPTIONS} or errors
    return {c: sum(own.values()) / len(own) for c, own in common.items()}


def corruption_errors(
        errors: Dict[str, Dict[int, float]],
        clean_error: Optional[float] = None,
) -> Tuple[Optional[float], Optional[float]]:
    """mCE and relative mCE (Hendrycks and Dietterich 2019, section 4), relative to AlexNet, which has 100.

    .. math:: mCE = \\frac{100}{C} \\sum_c \\frac{\\sum_s E_{s,c}}{\\sum_s E^{AlexNet}_{s,c}}, \\quad
        relative: E \\to E - E_{clean}

    Args:
        errors: Error in percent by corruption and severity.
        clean_error: Error on clean images in percent.

    Returns:
        mCE and relative mCE in percent. Both are None unless all 15 corruptions and five severities are present; the
        relative mCE is also None without `clean_error`.
    """
    means = _means(errors)
    if set(means) != set(COMMON_CORRUPTIONS) or any(set(errors[c]) != set(SEVERITIES) for c in means):
        return None, None
    mce = sum(100 * means[c] / ALEXNET_ERRORS[c] for c in means) / len(means)
    if clean_error is None:
        return mce, None
    return mce, sum(
        100 * (means[c] - clean_error) / (ALEXNET_ERRORS[c] - ALEXNET_CLEAN_ERROR) for c in means) / len(means)


def summarize_shifts(
        parts: Sequence[Part],
        chosen: Dict[str, List[int]],
        journal: Journal,
        image_size: Optional[Tuple[int, int]] = None,
) -> List[BenchmarkResult]:
    """A result for each benchmark, from the outcomes of its parts.

    Args:
        parts: From the readers, in order.
        chosen: Indices of the images, by key.
        journal: Outcomes of all these images.
        image_size: Height and width the network saw.
    """
    def count(key: str, part: Part) -> int:
        return sum(journal.correct[key][i] for i in chosen[part.key])

    grouped: Dict[str, List[Part]] = {}
    for part in parts:
        grouped.setdefault(part.key.split('/')[0], []).append(part)
    results = []
    for name, own in grouped.items():
        found = []
        for part in own:
            place = part.key.split('/')[1:]
            found.append(PartResult(
                count(part.key, part), len(chosen[part.key]), *((place[0], int(place[1])) if place else ())))
        first = own[0]
        masked = first.classes is not None
        results.append(BenchmarkResult(
            name,
            tuple(found),
            available=sum(part.size for part in own),
            expected=None if any(p.expected is None for p in own) else sum(p.expected or 0 for p in own),
            num_classes=len(first.classes) if first.classes is not None else None,
            num_correct_all=count(f'{first.key}/all', first) if masked else None,
            resized_to=None if first.stored_size in (None, image_size) else image_size))
    return results
