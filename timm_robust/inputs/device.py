"""Where the work is done: the device, the processes, and float32 where a verdict hangs on it."""
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Tuple

import torch
from timm.utils.distributed import init_distributed_device_so

from ..errors import InputError

__all__ = ['Process', 'check_seed', 'float32_proper', 'init_process', 'resolve_device']

# torch's newer flags, which raise where the older ones are read after these were set
_CUDNN: Any = torch.backends.cudnn
_NEWER: Tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn)


def check_seed(seed: int) -> None:
    """Raise `InputError` for a seed that numpy would not take, from one process or several."""
    if not 0 <= seed < 2 ** 32 - 2 ** 16:
        raise InputError('must be at least 0 and below 2**32 - 2**16', argument='seed', value=seed)


def resolve_device(name: Optional[str]) -> str:
    """The named device, or the best there is.

    Raises:
        InputError: If there is no device of that name.
    """
    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InputError('no such device', "pass `device='cpu'` or `device='cuda'`", argument='device', value=name
                         ) from error
    if kind == 'cuda' and not torch.cuda.is_available():
        raise InputError('no CUDA device is available', "pass `device='cpu'`", argument='device', value=name)
    return name


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Attributes:
        device: Its device.
        rank: Its number.
        local_rank: Its number on this machine.
        world_size: How many there are.
    """
    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
        return torch.distributed.is_available() and torch.distributed.is_initialized()

    @property
    def primary(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0


def init_process(device: Optional[str] = None) -> Process:
    """Join the processes that torchrun or SLURM started, if any.

    Args:
        device: Name of the device, by default the best there is; of several GPUs each process takes its own.

    Raises:
        InputError: If there is no such device.
    """
    found = init_distributed_device_so(resolve_device(device))
    return Process(torch.device(found['device']), found['global_rank'], found['local_rank'], found['world_size'])


def _older_flags() -> Optional[Tuple[str, bool]]:
    """Precision of matrix products and whether cuDNN takes TF32, None where torch's newer flags were set."""
    try:
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return torch.get_float32_matmul_precision(), flags[0]
    except RuntimeError:
        return None


@contextmanager
def float32_proper() -> Iterator[None]:
    """Convolutions and matrix products in float32 as it is, and no autocast; torch's settings come back afterwards.

    With the ten bits of TF32, which a GPU may put in its place, images count as fooled that float32 classifies
    correctly.
    """
    older, newer = _older_flags(), [place.fp32_precision for place in _NEWER]
    with ExitStack() as stack:
        for kind in ('cpu', 'cuda'):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            if older is not None:
                torch.set_float32_matmul_precision('highest')
                torch.backends.cudnn.allow_tf32 = False
            else:
                for place in _NEWER:
                    place.fp32_precision = 'ieee'
            yield
        finally:
            if older is not None:
                torch.set_float32_matmul_precision(older[0])
                torch.backends.cudnn.allow_tf32 = older[1]
            else:
                for place, precision in zip(_NEWER, newer):
                    place.fp32_precision = precision
