"""The result of a training run."""
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

__all__ = ['TrainResult']


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        output_dir: Folder of the run, with checkpoints, args.yaml, summary.csv, curves.png and `export`.
        best_metric: Best value of the metric that ranks checkpoints.
        best_epoch: Epoch of the best value, from 0.
        metrics: Validation metrics of the last epoch; accuracies in percent.
        seconds: Time of training and validation in seconds.
        gamma: Weight of the BatchNorm for adversarial images in validation (mbnat); None for one BatchNorm.
    """
    output_dir: Path
    best_metric: float
    best_epoch: int
    metrics: Dict[str, float]
    seconds: float
    gamma: Optional[float] = None

    @property
    def export(self) -> Path:
        """Folder of the best weights, which timm and transformers can load; with `gamma` 1 the adversarial branch.

        A mixture of two BatchNorms cannot be exported: then it is the branch for clean images.
        """
        return self.output_dir / ('export_aux' if self.gamma == 1 else 'export')
