"""Accuracy on shifted images, and what ImageNet-C makes of it."""
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..data.corruptions import COMMON_CORRUPTIONS, SEVERITIES
from .journal import Journal
from .outcome import percent

__all__ = ['ALEXNET_CLEAN_ERROR', 'ALEXNET_ERRORS', 'evaluate_shift', 'mean_corruption_errors', 'summarize_shifts']

# Mean error of AlexNet over the five severities in percent, by the authors of ImageNet-C:
# https://github.com/hendrycks/robustness/issues/10 (by severity); those of clean images are torchvision's.
ALEXNET_ERRORS = {
    'gaussian_noise': 88.6428, 'shot_noise': 89.4468, 'impulse_noise': 92.2640, 'defocus_blur': 81.9880,
    'glass_blur': 82.6268, 'motion_blur': 78.5948, 'zoom_blur': 79.8360, 'snow': 86.6816, 'frost': 82.6572,
    'fog': 81.9324, 'brightness': 56.4592, 'contrast': 85.3204, 'elastic_transform': 64.6056, 'pixelate': 71.7840,
    'jpeg_compression': 60.6500,
}
ALEXNET_CLEAN_ERROR = 43.478


@torch.no_grad()
def evaluate_shift(
        model: nn.Module,
        loader,
        indices: Sequence[int],
        key: str,
        journal: Journal,
        device: torch.device,
        classes: Optional[Tuple[int, ...]] = None,
) -> None:
    """Classify images and write down which are right.

    Args:
        model: Maps pixels in [0, 1] to logits; in eval mode.
        loader: Delivers (pixels, labels), in the order of `indices`.
        indices: Index of each image.
        key: Name under which outcomes are kept; of all classes under KEY/all if `classes` are given.
        journal: Where outcomes are kept.
        device: Device of the network.
        classes: Classes that count: the others' logits are left out. None for all.
    """
    done, start = 0, time.perf_counter()
    among = None if classes is None else torch.tensor(classes, device=device)
    for x, y in loader:
        logits, y = model(x.to(device)), y.to(device)
        own, predicted = list(indices[done:done + len(x)]), logits.argmax(1)
        if among is not None:
            journal.record(f'{key}/all', own, (predicted == y).tolist(), 0.)
            predicted = among[logits[:, among].argmax(1)]
        journal.record(key, own, (predicted == y).tolist(), time.perf_counter() - start)
        done, start = done + len(x), time.perf_counter()


def mean_corruption_errors(
        errors: Dict[str, Dict[int, float]],
        clean_error: Optional[float] = None,
) -> Dict[str, Optional[float]]:
    """Mean error, mCE and relative mCE (Hendrycks and Dietterich 2019, section 4).

    .. math:: mCE = \\frac{100}{C} \\sum_c \\frac{\\sum_s E_{s,c}}{\\sum_s E^{AlexNet}_{s,c}}, \\quad
        relative: E \\to E - E_{clean}

    Args:
        errors: Error in percent by corruption and severity; the four of validation count only if there are no others.
        clean_error: Error on clean images in percent.

    Returns:
        'mean_error' (percent, AlexNet has no part in it), 'mce' and 'relative_mce' (AlexNet has 100). The latter are
        None unless all 15 corruptions and five severities are there, the last also without `clean_error`.
    """
    common = {c: own for c, own in errors.items() if c in COMMON_CORRUPTIONS} or errors
    means = {c: sum(own.values()) / len(own) for c, own in common.items()}
    whole = set(means) == set(COMMON_CORRUPTIONS) and all(set(own) == set(SEVERITIES) for own in common.values())
    count = len(means)
    return {
        'mean_error': sum(means.values()) / count,
        'mce': sum(100 * means[c] / ALEXNET_ERRORS[c] for c in means) / count if whole else None,
        'relative_mce': sum(
            100 * (means[c] - clean_error) / (ALEXNET_ERRORS[c] - ALEXNET_CLEAN_ERROR) for c in means) / count
        if whole and clean_error is not None else None,
    }


def summarize_shifts(parts: Sequence[Any], chosen: Dict[str, List[int]], journal: Journal) -> List[Dict[str, Any]]:
    """One entry for each benchmark, from the outcomes of its parts.

    Args:
        parts: Of the readers, in order.
        chosen: By key the indices of the images.
        journal: Outcomes of all of them.

    Returns:
        'benchmark', 'images', 'available' (of which they were chosen) and 'accuracy' (percent); 'expected', the
        published number of images; where classes are
        masked 'classes' and 'accuracy_all_classes'; of corruptions 'errors' and `mean_corruption_errors`, with mCE for
        ImageNet-C alone.
    """
    def accuracy(key: str, part_key: str) -> float:
        return percent([journal.correct[key][i] for i in chosen[part_key]])

    entries: Dict[str, Dict[str, Any]] = {}
    for part in parts:
        name, *place = part.key.split('/')
        entry = entries.setdefault(name, {'benchmark': name, 'images': 0, 'expected': 0, 'errors': {}})
        entry['images'] += len(chosen[part.key])
        entry['available'] = entry.get('available', 0) + part.size
        entry['expected'] = None if part.expected is None else entry['expected'] + part.expected
        if place:
            entry['errors'].setdefault(place[0], {})[int(place[1])] = 100 - accuracy(part.key, part.key)
            continue
        entry['accuracy'] = accuracy(part.key, part.key)
        if part.classes is not None:
            entry.update(classes=len(part.classes), accuracy_all_classes=accuracy(f'{part.key}/all', part.key))
    clean = entries.get('clean')
    for name, entry in entries.items():
        if entry['errors']:
            entry.update(mean_corruption_errors(entry['errors'], 100 - clean['accuracy'] if clean else None))
            entry['accuracy'] = 100 - entry['mean_error']
            if name != 'c':  # AlexNet's errors are of ImageNet-C's files
                entry.update(mce=None, relative_mce=None)
    return list(entries.values())
