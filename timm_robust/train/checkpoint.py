"""Checkpoints that are written whole or not at all, and read without running what strangers put in them."""
import os
import pickle
import shutil
from pathlib import Path
from typing import Optional
from zipfile import BadZipFile

import torch.nn as nn
from timm.models import load_checkpoint
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from ..errors import InputError

__all__ = ['AtomicCheckpointSaver', 'check_exists', 'explain', 'load_weights', 'resume', 'resume_ema']

_BROKEN_FILE_ERRORS = (OSError, EOFError, RuntimeError, KeyError, ValueError, BadZipFile, pickle.UnpicklingError)


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


def explain(flag: str, path: str, error: Exception) -> InputError:
    """Why a file does not load, in one line."""
    text = ' '.join(str(error).split())
    if 'Unsupported global' in f'{error} {error.__cause__}':
        why = 'it holds code, which is never run: ask its author for a safetensors file or a plain state dict'
    elif 'Unexpected key' in text and '.aux.' in text:
        mend = 'go on with that objective' if flag == '--resume' else (
            'evaluate it with --gamma, or take export/ or export_aux/ of its run')
        why = f'it has a second BatchNorm (--objective mbnat): {mend}'
    elif 'Missing key' in text and '.aux.' in text:
        mend = 'go on with the objective of its run' if flag == '--resume' else (
            'leave out --gamma and --sweep gamma')
        why = f'it has no second BatchNorm (--objective mbnat): {mend}'
    elif 'size mismatch' in text or 'Missing key' in text or 'Unexpected key' in text:
        detail = text.split(': ', 1)[-1][:160]
        why = f'it belongs to another architecture or number of classes ({detail}...): check --model and --num-classes'
    else:
        why = f'it is truncated or no checkpoint ({type(error).__name__}): copy it again or use an earlier one'
    return InputError(f'{flag} {path}: cannot be loaded, {why}')


def check_exists(flag: str, path: str) -> None:
    """Refuse a path where no file is."""
    if not os.path.isfile(path):
        raise InputError(f'{flag} {path}: no such file, give the path of a .safetensors, .pth or .pth.tar file')


def load_weights(model: nn.Module, path: str, use_ema: bool = True, flag: str = '--checkpoint') -> None:
    """Load weights strictly and without unpickling code.

    Args:
        model: Model to load into.
        path: A .safetensors file, a state dict or a training checkpoint.
        use_ema: Prefer averaged weights where the checkpoint has them.
        flag: How messages name the argument.

    Raises:
        InputError: If the file is missing, broken, holds code or does not fit.
    """
    check_exists(flag, path)
    try:
        load_checkpoint(model, path, use_ema=use_ema, strict=True)
    except Exception as error:  # safetensors has an exception class of its own, outside the usual families
        raise explain(flag, path, error) from error


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
    check_exists('--resume', path)
    try:
        return resume_task_checkpoint(task, path, optimizer=optimizer, loss_scaler=loss_scaler, log_info=log_info)
    except _BROKEN_FILE_ERRORS as error:
        raise explain('--resume', path, error) from error


def resume_ema(task: TrainingTask, path: str) -> None:
    """Restore the averaged weights of a training state."""
    try:
        load_task_ema_checkpoint(task, path)
    except _BROKEN_FILE_ERRORS as error:
        raise explain('--resume', path, error) from error
