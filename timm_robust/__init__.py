from . import models  # noqa: F401  registers the models with timm
from .version import __version__

__all__ = ['__version__']
