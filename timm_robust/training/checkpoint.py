"""Checkpoints of the training state: written atomically, labelled with their run, and checked when resumed."""
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata

from ..errors import InputError
from ..inputs import Checkpoint, convert_state_dict, read_checkpoint
from .config import TrainConfig
from .loop import trained_module

__all__ = ['AtomicCheckpointSaver', 'is_recovery', 'is_resuming', 'open_saver', 'resume', 'resume_ema']

_logger = logging.getLogger(__name__)

# settings that do not affect what is trained, only where and for how long
_MAY_CHANGE = {
    'resume', 'output', 'experiment', 'epochs', 'workers', 'pin_mem', 'log_interval', 'checkpoint_hist', 'data_dir',
    'device', 'val_interval', 'validation_batch_size', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
    'log_trackio', 'log_tensorboard', 'start_epoch', 'recovery_interval'}


class _Described:
    """A task whose checkpoints contain the settings of their run."""

    def __init__(self, task: TrainingTask, run: Mapping[str, Any]):
        self.task, self.run = task, run

    def get_checkpoint_state(self, **kwargs: Any) -> Dict[str, Any]:
        """The task's state, and `args`."""
        return {**self.task.get_checkpoint_state(**kwargs), 'arch': self.run['model'], 'args': dict(self.run)}


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's saver with atomic writes: there is no moment without a checkpoint.

    Args:
        task: The task.
        run: Stored under `args` in each checkpoint: the settings by flat name, and the training data.
        **kwargs: Further arguments of timm's saver.
    """

    def __init__(self, task: TrainingTask, run: Mapping[str, Any], **kwargs: Any):
        super().__init__(model=task.get_trainable_module(), task=_Described(task, run), **kwargs)

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
        except RuntimeError as error:  # torch.save hides the error of the system
            raise OSError(f'cannot write {save_path}; is the disk full?') from error

    def _replace(self, src: str, dst: str) -> None:
        with open(src, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        part = f'{dst}.part'
        Path(part).unlink(missing_ok=True)
        try:
            os.link(src, part)
        except (OSError, NotImplementedError):
            shutil.copy2(src, part)
        os.replace(part, dst)

    def load_state_dict_from_checkpoint(self, checkpoint_path: str) -> bool:
        """Restore the history of checkpoints, and finish what a crash interrupted while this one was ranked."""
        known: bool = super().load_state_dict_from_checkpoint(checkpoint_path)
        saved = load_checkpoint_metadata(checkpoint_path)
        own, metric = self._checkpoint_path(saved['epoch']), saved.get('metric')  # no metric within an epoch
        if metric is not None and not Path(own).exists() and self._earns_a_place(metric):
            self._cleanup_checkpoints(1)
            self._duplicate(checkpoint_path, own)
            self._track_checkpoint(own, saved['epoch'], metric, update_best_file=False)
        if self.best_epoch is not None and Path(best := self._checkpoint_path(self.best_epoch)).exists():
            self._duplicate(best, str(Path(self.checkpoint_dir, f'model_best{self.extension}')))
        return known

    def _earns_a_place(self, metric: float) -> bool:
        worst = self.checkpoint_files[-1][1] if self.checkpoint_files else None
        return len(self.checkpoint_files) < self.max_history or worst is None or self.cmp(metric, worst)


def is_recovery(path: str) -> bool:
    """Whether a checkpoint was written within an epoch, judging by the name timm's saver gives it."""
    return Path(path).name.startswith('recovery-')


def is_resuming(config: TrainConfig, run: Path) -> bool:
    """Whether `resume` is a checkpoint of the run in this folder."""
    return bool(config.resume) and Path(config.resume).resolve().parent == run.resolve()


def _check_run(config: TrainConfig, read: Checkpoint, training_data: str) -> None:
    """Refuse different training data; warn about other settings that differ from the resumed run."""
    opt = read.run.get('opt', config.opt)
    if opt != config.opt:
        raise InputError(f'the resumed run has the optimizer {opt}, not {config.opt}', f'choose `opt={opt!r}`')
    before = read.run.get('training_data', '')
    if before and training_data and before != training_data:
        raise InputError(
            'the resumed run had other training data: images, labels, the held-out images or the teacher have changed',
            'use its data, `seed`, `val_fraction` and teacher')
    changed = [
        f'{name} {value!r} (was {read.run[name]!r})' for name, value in config.to_flat().items()
        if name not in _MAY_CHANGE and name in read.run and read.run[name] != value]
    if changed:
        _logger.warning(f"Resumed with different settings: {', '.join(changed)}")


def _hyperparameters(optimizer: torch.optim.Optimizer) -> List[Dict[str, Any]]:
    """The settings of each parameter group; a schedule changes `lr` and keeps its initial value in `initial_lr`."""
    return [{'lr': g.get('initial_lr', g['lr']), **{k: v for k, v in g.items() if k not in (
        'params', 'lr', 'initial_lr', 'lookahead_step')}} for g in optimizer.param_groups]


def _check_optimizer(asked: List[Dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizer settings that resuming would silently replace with the settings of the resumed run."""
    for own, restored in zip(asked, _hyperparameters(optimizer)):
        for name, value in own.items():
            if name in restored and restored[name] != value:
                raise InputError(
                    f'the resumed run has {name} {restored[name]!r}, but these settings give {value!r}',
                    f'choose settings that give {restored[name]!r}')


def resume(
        config: TrainConfig,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Any = None,
        *,
        training_data: str = '',
        log_info: bool = True,
) -> int:
    """Restore the training state of `config.resume`.

    Args:
        config: Settings of the run.
        task, optimizer, loss_scaler: Objects to restore.
        training_data: Fingerprint of the training data, compared if the checkpoint has one.
        log_info: Log what is restored.

    Returns:
        The epoch to continue with; the epoch of a recovery checkpoint is repeated, starting from its weights.

    Raises:
        InputError: If the file is missing or broken, holds code or only weights, or has different data or settings.
    """
    path = config.resume
    read = read_checkpoint(path, use_ema=False, argument='resume')
    asked = _hyperparameters(optimizer)
    try:
        convert_state_dict(read.state_dict, trained_module(task))
        if 'optimizer' not in read.keys:
            raise InputError('holds only weights, no training state', 'start from them with `initial_checkpoint`')
        _check_run(config, read, training_data)
        epoch: Optional[int] = resume_task_checkpoint(
            task, path, optimizer=optimizer, loss_scaler=loss_scaler, log_info=log_info)
        _check_optimizer(asked, optimizer)
    except InputError as error:
        raise error.about('resume', path) from error
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = ' '.join(str(error).split())[:160]
        raise InputError(
            f'its training state does not fit these settings ({reason})', 'give the optimizer and objective of its run',
            argument='resume', value=path) from error
    return (epoch or 0) - is_recovery(path)


def resume_ema(task: TrainingTask, path: str) -> None:
    """Restore the averaged weights of a checkpoint that `resume` has read."""
    load_task_ema_checkpoint(task, path)


def open_saver(
        config: TrainConfig,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Any,
        run: Mapping[str, Any],
        folder: Path,
        metric: str,
) -> AtomicCheckpointSaver:
    """The saver of a run; a resumed run keeps its history of checkpoints if they were ranked by the same metric.

    Args:
        config: Settings of the run.
        task, optimizer, loss_scaler: What is saved.
        run: See `AtomicCheckpointSaver`.
        folder: Where to write.
        metric: Name of the metric that ranks checkpoints.
    """
    saver = AtomicCheckpointSaver(
        task, {**run, 'ranked_by': metric}, optimizer=optimizer, amp_scaler=loss_scaler, checkpoint_dir=str(folder),
        recovery_dir=str(folder), decreasing=metric == 'loss', max_history=config.checkpoint_hist)
    if not is_resuming(config, folder):
        if config.resume:
            _logger.warning(
                f'{config.resume} is in another folder than this run, {folder}: earlier epochs are neither ranked nor '
                'listed in summary.csv')
        return saver
    before = read_checkpoint(config.resume, argument='resume').run
    if before.get('ranked_by', before.get('eval_metric')) == metric:
        saver.load_state_dict_from_checkpoint(config.resume)
    else:
        _logger.warning(
            f'The best epoch is selected again by {metric}; the resumed run used {before.get("ranked_by")}.')
    return saver
