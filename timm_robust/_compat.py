"""Private names of timm and torch, imported only here, so that an upstream change needs a fix in one place."""
from timm.models._features import feature_take_indices
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active

__all__ = ['are_functorch_transforms_active', 'feature_take_indices']
