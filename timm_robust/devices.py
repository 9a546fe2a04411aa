"""What devices differ in: for what the host waits, whether they know float64, how much they hold."""
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
    """A copy of what is on the CPU, for which the host does not wait: a GPU stages what lies in ordinary memory."""
    return tensor.to(device, non_blocking=device.type != 'mps')  # which reads the memory later, when it may be gone


def in_float64(x: _Double) -> _Double:
    """A tensor or a network in float64, on the CPU if its device has none; a network is changed in place."""
    try:
        return x.double()
    except TypeError:  # Apple's
        return x.cpu().double()


@contextmanager
def naming_batch_size(batch_size: int) -> Iterator[None]:
    """Where memory ends: `InputError` that names the batch size."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ' '.join(str(error).split()).split('. ')[0] or 'out of memory'
        raise InputError(f'does not fit into memory ({reason})', 'choose a smaller one' if batch_size > 1 else '',
                         argument='batch_size', value=batch_size) from error


def halving(work: Callable[[int], T], batch_size: int, fixed: bool = False) -> Tuple[T, int]:
    """Do work in batches, of half the size where memory ends.

    Args:
        work: Takes the batch size, on which its result does not depend.
        batch_size: The size to begin with.
        fixed: The result does depend on it.

    Returns:
        The result, and the batch size that fitted.

    Raises:
        InputError: If no batch fits.
    """
    while True:
        with naming_batch_size(batch_size):
            try:
                return work(batch_size), batch_size
            except torch.OutOfMemoryError:
                if fixed or batch_size == 1:
                    raise
        # outside of the handler, which keeps what did not fit
        batch_size //= 2
        _logger.warning(f'Out of memory, continuing with batches of {batch_size} from here on')
