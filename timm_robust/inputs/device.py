"""The device and the processes of a run."""
from dataclasses import dataclass
from typing import Optional

import torch
from timm.utils.distributed import init_distributed_device_so

from ..errors import InputError

__all__ = ['Process', 'check_seed', 'init_process', 'resolve_device']


def check_seed(seed: int) -> None:
    """Raise `InputError` for a seed that numpy would not accept, with one process or several."""
    if not 0 <= seed < 2 ** 32 - 2 ** 16:
        raise InputError('must be at least 0 and below 2**32 - 2**16', argument='seed', value=seed)


def resolve_device(name: Optional[str]) -> str:
    """The named device, or by default CUDA if available.

    Raises:
        InputError: If there is no device of that name.
    """
    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        if device.type != 'cuda':  # that would take memory on the first GPU in every process
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this kind
        reason = ' '.join(str(error).split()).split('. ')[0]
        raise InputError(f'no such device here ({reason})', "pass `device='cpu'` or `device='cuda'`",
                         argument='device', value=name) from error
    if device.type == 'cuda' and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f'this machine has {count} CUDA devices', "pass `device='cpu'`" if not count else '',
                         argument='device', value=name)
    return name


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Attributes:
        device: Its device.
        rank: Its rank.
        local_rank: Its rank on this machine.
        world_size: Number of processes.
    """
    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def distributed(self) -> bool:
        """Whether there is a process group."""
        return torch.distributed.is_available() and torch.distributed.is_initialized()

    @property
    def primary(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0


def init_process(device: Optional[str] = None) -> Process:
    """Join the processes that torchrun or SLURM started, if any.

    Args:
        device: Name of the device, by default CUDA if available; each process takes its own GPU.

    Raises:
        InputError: If there is no such device.
    """
    found = init_distributed_device_so(resolve_device(device))
    return Process(torch.device(found['device']), found['global_rank'], found['local_rank'], found['world_size'])
