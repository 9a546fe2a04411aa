"""Names timm keeps in private modules, gathered so that a move in timm is mended in one place."""
from timm.models._features import feature_take_indices

__all__ = ['feature_take_indices']
