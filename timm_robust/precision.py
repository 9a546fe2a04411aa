"""Full float32 precision, without TF32 or autocast."""
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, Optional, Tuple

import torch

__all__ = ['float32_proper']

# torch's newer flags; once they are set, reading the older ones raises
_CUDNN: Any = torch.backends.cudnn
_NEWER: Tuple[Any, ...] = tuple(
    place for place in (torch.backends.cuda.matmul, getattr(_CUDNN, 'conv', None), getattr(_CUDNN, 'rnn', None))
    if hasattr(place, 'fp32_precision'))  # none before torch 2.9


def _older_flags() -> Optional[Tuple[str, bool]]:
    """Matmul precision, and whether cuDNN may use TF32; None if torch's newer flags were set."""
    try:
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return torch.get_float32_matmul_precision(), flags[0]
    except RuntimeError:
        return None


@contextmanager
def float32_proper() -> Iterator[None]:
    """Run convolutions and matrix products in full float32, without autocast; torch's settings are restored afterwards.

    With the ten-bit mantissa of TF32, images that float32 classifies correctly can count as fooled.
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
