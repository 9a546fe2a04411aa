from .build import build_model, resolve_data
from .run import run_training

__all__ = ['build_model', 'resolve_data', 'run_training']
