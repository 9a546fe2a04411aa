"""Send the rows of summary.csv to Weights & Biases, Trackio and TensorBoard."""
import importlib
import logging
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

from ..errors import InputError
from .config import TrainConfig

__all__ = ['Trackers', 'check_trackers']

_logger = logging.getLogger(__name__)


def _wandb(config: TrainConfig, folder: Path, start_epoch: int) -> Any:
    return importlib.import_module('wandb').init(  # as timm's train.py does
        project=config.wandb_project, name=folder.name, config=config.to_flat(), tags=list(config.wandb_tags),
        resume='must' if config.wandb_resume_id else None, id=config.wandb_resume_id or None)


def _trackio(config: TrainConfig, folder: Path, start_epoch: int) -> Any:
    return importlib.import_module('trackio').init(
        project=config.wandb_project or 'timm-robust', name=folder.name, config=config.to_flat(),
        resume='allow' if config.resume else 'never', embed=False)


class _TensorBoard:
    """Event files in the folder of the run; a resumed run replaces the epochs it repeats."""

    def __init__(self, config: TrainConfig, folder: Path, start_epoch: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder), purge_step=start_epoch or None)
        self.finish = self.writer.close

    def log(self, row: Dict[str, float]) -> None:
        for name in row.keys() - {'epoch'}:
            self.writer.add_scalar(name.replace('_', '/', 1), row[name], int(row['epoch']))
        self.writer.flush()


# By name of package and extra: a function that opens a tracker with `log(row)` and `finish()`.
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

    def __init__(self, config: TrainConfig, folder: Path, start_epoch: int):
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

    def log(self, row: Mapping[str, float]) -> None:
        """Send the metrics of an epoch: a row of summary.csv."""
        for name, tracker in self._open.items():
            if tracker:
                self._try(name, tracker.log, dict(row))

    def finish(self) -> None:
        """Close all trackers."""
        for name, tracker in self._open.items():
            if tracker:
                self._try(name, tracker.finish)
