"""Send the rows of summary.csv, and attacked images, to Weights & Biases, Trackio and TensorBoard."""
import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import numpy as np
import torch
from torchvision.utils import make_grid

from ..attacks import InputSpace
from ..errors import InputError
from .config import TrainConfig

__all__ = ['Picture', 'Trackers', 'check_trackers', 'picture_of']

_logger = logging.getLogger(__name__)

_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Picture:
    """A row of clean images above a row of their adversarial versions.

    Attributes:
        pixels: Array (H, W, C) of uint8.
        caption: Prediction and true class of each adversarial image.
    """
    pixels: np.ndarray
    caption: str


def picture_of(
        clean: torch.Tensor,
        adversarial: torch.Tensor,
        target: torch.Tensor,
        output: torch.Tensor,
        space: InputSpace,
        class_names: Optional[Sequence[str]] = None,
) -> Picture:
    """Draw the first images of a batch; classes without a name are shown by index.

    Args:
        clean: Images in `space`, shape (N, C, H, W).
        adversarial: Attacked images, of the same shape.
        target: Class indices (N,).
        output: Logits of the attacked images, shape (N, K).
        space: Input space of the images.
        class_names: Names of the classes by index.
    """
    both = space.to_pixels(torch.cat([clean[:_SHOWN], adversarial[:_SHOWN]]).float()).clamp(0, 1)
    grid = make_grid(both, nrow=len(both) // 2)
    pairs = zip(output[:_SHOWN].argmax(dim=1).tolist(), target[:_SHOWN].tolist())
    names = dict(enumerate(class_names or ()))  # the network may have more classes than the data
    answers = ', '.join(' for '.join(str(names.get(i, i)) for i in pair) for pair in pairs)
    return Picture(grid.mul(255).round().byte().permute(1, 2, 0).cpu().numpy(), f'attacked (below): {answers}')


class _Hosted:
    """A run of a package with the interface of wandb."""

    def __init__(self, package: str, **kwargs: Any):
        self.module = importlib.import_module(package)
        self.run = self.module.init(**kwargs)
        self.finish = self.run.finish

    def log(self, row: Dict[str, Any], picture: Optional[Picture]) -> None:
        if picture:
            row['eval_robust_images'] = self.module.Image(picture.pixels, caption=picture.caption)
        self.run.log(row)


def _wandb(config: TrainConfig, folder: Path, start_epoch: int) -> _Hosted:
    return _Hosted(  # as timm's train.py does
        'wandb', project=config.wandb_project, name=folder.name, config=config.to_flat(), tags=list(config.wandb_tags),
        resume='must' if config.wandb_resume_id else None, id=config.wandb_resume_id or None)


def _trackio(config: TrainConfig, folder: Path, start_epoch: int) -> _Hosted:
    return _Hosted(
        'trackio', project=config.wandb_project or 'timm-robust', name=folder.name, config=config.to_flat(),
        resume='allow' if config.resume else 'never', embed=False)


class _TensorBoard:
    """Event files in the folder of the run; a resumed run replaces the epochs it repeats."""

    def __init__(self, config: TrainConfig, folder: Path, start_epoch: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder), purge_step=start_epoch or None)
        self.finish = self.writer.close

    def log(self, row: Dict[str, float], picture: Optional[Picture]) -> None:
        epoch = int(row['epoch'])
        for name in row.keys() - {'epoch'}:
            self.writer.add_scalar(name.replace('_', '/', 1), row[name], epoch)
        if picture:
            self.writer.add_image('eval/robust_images', picture.pixels, epoch, dataformats='HWC')
            self.writer.add_text('eval/robust_images', picture.caption, epoch)
        self.writer.flush()


# By name of package and extra: a function that opens a tracker with `log(row, picture)` and `finish()`.
_OPEN: Dict[str, Callable[[TrainConfig, Path, int], Any]] = {
    'wandb': _wandb, 'trackio': _trackio, 'tensorboard': _TensorBoard}


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        InputError: Naming the extra to install.
    """
    for name in _OPEN:
        if getattr(config, f'log_{name}'):
            try:
                importlib.import_module(name)
            except Exception as error:  # also if it is incompatible with other packages
                raise InputError(f'{name} cannot be imported ({error})', f"pip install 'timm-robust[{name}]'",
                                 argument=f'log_{name}') from error


class Trackers:
    """The trackers of a run. A failing tracker is switched off with a warning, so that training continues."""

    def __init__(
            self,
            config: TrainConfig,
            folder: Path,
            start_epoch: int,
            space: InputSpace,
            class_names: Optional[Sequence[str]],
    ):
        self.space, self.class_names = space, class_names
        self._picture: Optional[Picture] = None
        self._open: Dict[str, Any] = {}  # None if switched off
        for name, opener in _OPEN.items():
            if getattr(config, f'log_{name}'):
                self._open[name] = self._try(name, opener, config, folder, start_epoch)

    def _try(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # a third-party package may raise anything
            self._open[name] = None
            _logger.warning(f'{name} is switched off: {type(error).__name__}: {error}')

    def show(
            self,
            clean: torch.Tensor,
            adversarial: torch.Tensor,
            target: torch.Tensor,
            output: torch.Tensor,
    ) -> None:
        """Keep attacked images of one or three channels to send with the next row; arguments as in `picture_of`."""
        if any(self._open.values()) and clean.shape[1] in (1, 3):
            self._picture = picture_of(clean, adversarial, target, output, self.space, self.class_names)

    def log(self, row: Mapping[str, float]) -> None:
        """Send the metrics of an epoch: a row of summary.csv."""
        for name, tracker in self._open.items():
            if tracker:
                self._try(name, tracker.log, dict(row), self._picture)
        self._picture = None

    def finish(self) -> None:
        """Close all trackers."""
        for name, tracker in self._open.items():
            if tracker:
                self._try(name, tracker.finish)
