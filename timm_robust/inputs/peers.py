"""The processes of a run, and what they tell each other."""
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Iterator, List, Optional, TypeVar

import torch.distributed as dist

from ..errors import InputError

__all__ = ['Peers']

T = TypeVar('T')


@contextmanager
def _noticing_who_ended() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, from a connection that the system closed
        raise InputError('another process of this run has ended', 'see what it wrote last') from error


class Peers:
    """The processes of the default group of torch.distributed, or this one alone.

    They talk over gloo, with a time limit of a month: the backend of training gives up after minutes, and some wait for
    hours while others attack, look at images or write. When a process ends the others notice at once.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self) -> None:
        grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self._group: Optional[Any] = dist.new_group(backend='gloo', timeout=timedelta(days=30)) if grouped else None

    def __enter__(self) -> 'Peers':
        return self

    def __exit__(self, *exception: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Talk no more."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def primary(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def positions(self, count: int, together: int = 1) -> List[int]:
        """Which of `count` images are this process's: every size-th, or every size-th batch of `together` images."""
        return [i for i in range(count) if i // together % self.size == self.rank]

    def gather(self, value: T) -> List[T]:
        """The value of each process.

        Raises:
            InputError: If a process has ended, as in all that waits for others.
        """
        if self._group is None:
            return [value]
        found: List[Any] = [None] * self.size
        with _noticing_who_ended():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def meet(self) -> None:
        """Wait until all are here."""
        self.gather(None)

    def broadcast(self, value: T) -> T:
        """The value of the primary process."""
        if self._group is None:
            return value
        values: List[Any] = [value]
        with _noticing_who_ended():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]
