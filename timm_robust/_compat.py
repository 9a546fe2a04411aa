"""Private names of timm and torch, gathered so that a move there is repaired in one place."""
from timm.models._features import feature_take_indices
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active

__all__ = ['are_functorch_transforms_active', 'feature_take_indices']
