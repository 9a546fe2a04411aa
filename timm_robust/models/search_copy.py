"""A faster stand-in for a network, to search with: what it finds is checked on the network itself."""
import contextlib
import copy
from typing import Optional

import torch
import torch.nn as nn

from ..layers import fold_for_inference, has_batch_statistics

__all__ = ['SearchModel', 'make_search_model']


class SearchModel(nn.Module):
    """A network in channels_last layout and maybe in bfloat16; logits come out in float32.

    Args:
        model: The network.
        dtype: torch.float32 or torch.bfloat16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.dtype = dtype

    def float32(self) -> 'SearchModel':
        """The same in float32, with the same weights."""
        return SearchModel(self.model).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low_precision = self.dtype != torch.float32
        autocast = torch.autocast(x.device.type, self.dtype) if low_precision else contextlib.nullcontext()
        with autocast:
            return self.model(x.contiguous(memory_format=torch.channels_last)).float()


def make_search_model(
        model: nn.Module,
        x: torch.Tensor,
        dtype: torch.dtype = torch.float32,
) -> Optional[SearchModel]:
    """Fold, lay out and cast a copy of a network.

    Args:
        model: Maps pixels to logits, in eval mode, float32.
        x: Some images, shape (N, C, H, W).
        dtype: Precision of the search.

    Returns:
        The copy, or None for a network that normalizes by the batch, of which none is made.
    """
    if has_batch_statistics(model):
        return None
    folded = fold_for_inference(model, x)
    if folded is None:
        folded = copy.deepcopy(model).requires_grad_(False)
    return SearchModel(folded, dtype).eval()
