"""Differences between devices: asynchronous copies, float64 support, memory limits."""
import logging
from contextlib import contextmanager
from typing import Callable, Iterator, Tuple, TypeVar

import torch
import torch.nn as nn

from .errors import InputError

__all__ = ['halving', 'in_float64', 'naming_batch_size', 'without_wait']

T = TypeVar('T')
_Double = TypeVar('_Double', torch.Tensor, nn.Module)

_logger = logging.getLogger(__name__)


def without_wait(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device without waiting for the transfer; CUDA stages pageable memory, so this is safe."""
    return tensor.to(device, non_blocking=device.type != 'mps')  # MPS reads the memory later, when it may be freed


def in_float64(x: _Double) -> _Double:
    """Convert a tensor or a network to float64, on the CPU if its device lacks it; a network is changed in place."""
    try:
        return x.double()
    except TypeError:  # MPS has no float64
        return x.cpu().double()


@contextmanager
def naming_batch_size(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error into an `InputError` that names the batch size."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ' '.join(str(error).split()).split('. ')[0] or 'out of memory'
        raise InputError(f'does not fit into memory ({reason})', 'choose a smaller one' if batch_size > 1 else '',
                         argument='batch_size', value=batch_size) from error


def halving(work: Callable[[int], T], batch_size: int, fixed: bool = False) -> Tuple[T, int]:
    """Run work in batches, halving their size when memory runs out.

    Args:
        work: Takes the batch size. Its result must not depend on it, unless `fixed`.
        batch_size: Initial batch size.
        fixed: Whether the result depends on the batch size, which is then not halved.

    Returns:
        The result, and the batch size that fitted.

    Raises:
        InputError: If no batch size fits.
    """
    while True:
        with naming_batch_size(batch_size):
            try:
                return work(batch_size), batch_size
            except torch.OutOfMemoryError:
                if fixed or batch_size == 1:
                    raise
        # outside the handler, which keeps the failed tensors alive
        batch_size //= 2
        _logger.warning(f'Out of memory, continuing with batch size {batch_size}')
