"""Seeded, class-balanced choices of images."""
from typing import List, Optional

import numpy as np

from ..errors import InputError

__all__ = ['balanced_indices']


def balanced_indices(labels: Optional[np.ndarray], size: int, num_examples: Optional[int], seed: int) -> List[int]:
    """Choose images at random with as equal a share of each class as possible.

    Args:
        labels: Class index of every image, or None to choose regardless of class.
        size: Number of images there are.
        num_examples: Number of images to choose, None for all.
        seed: Seed of the choice.

    Returns:
        Indices in a random order in which every prefix is balanced, so that batches are mixed too.

    Raises:
        InputError: If `num_examples` is not positive or more than there are.
    """
    num_examples = size if num_examples is None else num_examples
    if not 0 < num_examples <= size:
        raise InputError(f'--num-examples {num_examples}: must be between 1 and {size}, the size of the data set')
    order = np.random.default_rng(seed).permutation(size)
    if labels is not None:
        # sort by how many images of the same class stand before; ties stay in random order
        rank = np.empty(size, dtype=np.int64)
        for label in np.unique(labels):
            own = order[labels[order] == label]
            rank[own] = np.arange(len(own))
        order = order[np.argsort(rank[order], kind='stable')]
    return order[:num_examples].tolist()
