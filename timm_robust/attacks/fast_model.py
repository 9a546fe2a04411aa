"""A faster stand-in for a network, to search with: what it decides is verified on the network itself."""
import copy
import logging
from typing import Optional

import torch
import torch.nn as nn

from ..layers import fold_for_inference, has_batch_statistics

__all__ = ['FastModel', 'make_fast_model']

_logger = logging.getLogger(__name__)

# Largest difference of the logits from the network's, as a share of the largest, above which an image is attacked again
# with the network. Folding reorders sums of float32; on a GPU convolutions may round to ten bits.
_TOLERANCE = {'cpu': 1e-5, 'cuda': 2e-3}
_LOW_PRECISION = 5e-2


class FastModel(nn.Module):
    """A network in channels_last layout and maybe in bfloat16; logits come out in float32.

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
        """Share of the largest logit by which its logits may differ from the network's."""
        device = next((p.device.type for p in self.parameters()), 'cpu')
        return _TOLERANCE.get(device, 2e-3) if self.dtype == torch.float32 else _LOW_PRECISION

    def float32(self) -> 'FastModel':
        """The same in float32, with the same weights."""
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
    """Fold, lay out and cast a copy of a network.

    Args:
        model: Maps pixels to logits, in eval mode, float32.
        x: Some images, shape (N, C, H, W).
        dtype: Precision of the search.

    Returns:
        The copy, or None for a network that normalizes by the batch or cannot be copied.
    """
    if has_batch_statistics(model):
        return None
    folded = fold_for_inference(model, x)
    try:
        folded = copy.deepcopy(model).requires_grad_(False) if folded is None else folded
    except (RuntimeError, TypeError) as error:  # weights made in the forward pass, handles of files
        _logger.debug(f'{type(model).__name__} is not copied: {error}')
        return None
    return FastModel(folded, dtype).eval()
