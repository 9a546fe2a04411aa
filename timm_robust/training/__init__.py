"""Training: a configuration, a run, its loop and its checkpoints; and timm's own script with our objectives."""
from .config import TrainConfig
from .result import TrainResult
from .run import train

__all__ = ['TrainConfig', 'TrainResult', 'train']
