"""Communication between the processes of a run."""
import logging
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer
from typing import Any, Iterator, List, Optional, TypeVar

import torch.distributed as dist

from ..errors import InputError

__all__ = ['Peers']

T = TypeVar('T')

_PATIENCE = 30  # seconds

_logger = logging.getLogger(__name__)


@contextmanager
def _noticing_who_ended() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # raised by gloo when a connection is closed
        raise InputError('another process of this run has ended', 'see its last output') from error


class Peers:
    """The processes of the default group of torch.distributed if there is one, or this process alone.

    They communicate over gloo with a timeout of a month. The backend of training times out after minutes, but a process
    may wait for hours while others attack, check images or write. When a process ends, the others notice at once.

    Args:
        distributed: False for this process alone.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
    """

    def __init__(self, distributed: bool = True) -> None:
        grouped = distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self._group: Optional[Any] = None
        if grouped:
            # a call by one process alone, as in `if rank == 0: evaluate(...)`, would wait without a word
            timer = Timer(_PATIENCE, _logger.warning, [
                'Waiting for the other processes of torch.distributed. If this process is to evaluate alone, pass '
                '`distributed=False`.'])
            timer.start()
            try:
                self._group = dist.new_group(backend='gloo', timeout=timedelta(days=30))
            finally:
                timer.cancel()

    def __enter__(self) -> 'Peers':
        return self

    def __exit__(self, *exception: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """End the communication."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def primary(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def positions(self, count: int, together: int = 1) -> List[int]:
        """This process's share of `count` images: every size-th, or every size-th batch of `together` images."""
        return [i for i in range(count) if i // together % self.size == self.rank]

    def gather(self, value: T) -> List[T]:
        """The value of each process.

        Raises:
            InputError: If another process has ended; `meet` and `broadcast` raise it too.
        """
        if self._group is None:
            return [value]
        found: List[Any] = [None] * self.size
        with _noticing_who_ended():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def meet(self) -> None:
        """Wait for all processes."""
        self.gather(None)

    def broadcast(self, value: T) -> T:
        """The value of the primary process."""
        if self._group is None:
            return value
        values: List[Any] = [value]
        with _noticing_who_ended():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]
