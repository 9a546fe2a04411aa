"""Float32 as it is, where a GPU would put TF32 in its place."""
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, Optional, Tuple

import torch

__all__ = ['float32_proper']

# torch's newer flags, which raise where the older ones are read after these were set
_CUDNN: Any = torch.backends.cudnn
_NEWER: Tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn)


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
