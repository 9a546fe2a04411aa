"""Training: a configuration, a run, its loop and its checkpoints; and timm's own script with our objectives."""
from .config import TrainConfig
from .run import TrainResult, train

__all__ = ['TrainConfig', 'TrainResult', 'train']
