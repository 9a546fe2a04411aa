"""Training states that are written whole or not at all, and resumed."""
import os
import shutil
from pathlib import Path
from typing import Optional

from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from ..errors import InputError
from ..inputs import convert_state_dict, read_checkpoint

__all__ = ['AtomicCheckpointSaver', 'resume', 'resume_ema']


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's saver, without the moment in which the old file is gone and the new one is not there yet."""

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


def resume(
        task: TrainingTask,
        path: str,
        optimizer=None,
        loss_scaler=None,
        log_info: bool = True,
) -> Optional[int]:
    """Restore a training state; returns the epoch to go on with.

    Raises:
        InputError: If the file is missing, broken, holds code or does not fit.
    """
    read = read_checkpoint(path, use_ema=False, argument='resume')
    try:
        convert_state_dict(read.state_dict, task.get_trainable_module())
        if 'optimizer' not in read.keys:
            raise InputError('holds weights alone, no training state', 'start from them by `initial_checkpoint`')
    except InputError as error:
        raise error.about('resume', path) from error
    try:
        return resume_task_checkpoint(task, path, optimizer=optimizer, loss_scaler=loss_scaler, log_info=log_info)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = ' '.join(str(error).split())[:160]
        raise InputError(
            f'its training state is of other settings ({reason})', 'give the optimizer and objective of its run',
            argument='resume', value=path) from error


def resume_ema(task: TrainingTask, path: str) -> None:
    """Restore the averaged weights of a training state that `resume` has read."""
    load_task_ema_checkpoint(task, path)
