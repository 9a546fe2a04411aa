"""A faster copy of a network to run attacks on; every result is verified on the original."""
import copy
import logging
from typing import Optional

import torch
import torch.nn as nn

from ..layers import fold_for_inference, has_batch_statistics

__all__ = ['FastModel', 'make_fast_model']

_logger = logging.getLogger(__name__)

# Maximum difference from the network's logits, relative to the largest logit; above it an image is attacked again on
# the network itself. Folding reorders float32 sums; on a GPU convolutions may use TF32, with 10 mantissa bits.
_TOLERANCE = {'cpu': 1e-5, 'cuda': 2e-3}
_LOW_PRECISION = 5e-2


class FastModel(nn.Module):
    """A network in channels_last layout, optionally in bfloat16, that returns float32 logits.

    Args:
        model: The network.
        dtype: torch.float32 or torch.bfloat16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.dtype = dtype

    @property
    def tolerance(self) -> float:
        """Maximum difference from the network's logits, relative to the largest logit."""
        device = next((p.device.type for p in self.parameters()), 'cpu')
        return _TOLERANCE.get(device, 2e-3) if self.dtype == torch.float32 else _LOW_PRECISION

    def float32(self) -> 'FastModel':
        """The same network in float32, with shared weights."""
        return FastModel(self.model).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(x.contiguous(memory_format=torch.channels_last))
        return output.float() if isinstance(output, torch.Tensor) else output


def make_fast_model(
        model: nn.Module,
        x: torch.Tensor,
        dtype: torch.dtype = torch.float32,
) -> Optional[FastModel]:
    """Make a folded copy of a network in the layout and precision of `FastModel`.

    Args:
        model: Maps pixels to logits, in eval mode, float32.
        x: Some images, shape (N, C, H, W).
        dtype: Precision of the copy.

    Returns:
        The copy, or None for a network that uses batch statistics or cannot be copied.
    """
    if has_batch_statistics(model):
        return None
    folded = fold_for_inference(model, x)
    try:
        folded = copy.deepcopy(model).requires_grad_(False) if folded is None else folded
    except (RuntimeError, TypeError) as error:  # for example weights computed in the forward pass, or file handles
        _logger.debug(f'{type(model).__name__} cannot be copied: {error}')
        return None
    return FastModel(folded, dtype).eval()
