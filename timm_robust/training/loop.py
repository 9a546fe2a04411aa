"""One epoch of training, one pass of validation."""
import logging
import math
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, TypedDict

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad
from tqdm import tqdm

from ..attacks import PGD, InputSpace, ThreatModel
from ..errors import TrainingDivergedError
from ..tasks.base import crafting_model
from .build import Autocast
from .data import Loader

__all__ = ['PassSettings', 'trained_module', 'train_one_epoch', 'validate', 'validate_robust']

_logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 60


class PassSettings(TypedDict):
    """Shared arguments of training and validation passes."""
    device: torch.device
    autocast: Autocast
    channels_last: bool
    move_to_device: bool
    distributed: bool


def _mean_over_processes(value: float, device: torch.device, distributed: bool) -> float:
    if not distributed:
        return value
    total = torch.tensor(value, dtype=torch.float64 if device.type != 'mps' else torch.float32, device=device)
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def trained_module(task: TrainingTask, ema: bool = False) -> nn.Module:
    """The module that a task trains, or its moving average."""
    module = task.get_trainable_module(ema=ema)
    assert module is not None
    return module


class _Averages:
    """Averages of the values that steps report, read only now and then, since reading forces a GPU sync."""

    def __init__(self, device: torch.device):
        self.device = device
        self.meters: Dict[str, AverageMeter] = OrderedDict(loss=AverageMeter())
        self._unread: List[Tuple[int, str, Any, int, int]] = []

    def add(self, batch: int, loss: torch.Tensor, group_size: int, result: Dict[str, Any]) -> None:
        """Record the loss of a batch, already divided by `group_size`, and the scalars of the task."""
        size = len(result['output'])  # an image with several views is counted once
        self._unread.append((batch, 'loss', loss.detach(), group_size, size))
        for name, value in result.items():
            if name not in ('loss', 'output'):
                self._unread.append((batch, name, value.detach() if torch.is_tensor(value) else value, 1, size))

    def read(self) -> Optional[Tuple[int, float]]:
        """Update the averages; returns the first batch with a non-finite loss, and its loss."""
        tensors = [v.to(self.device).reshape(()) for _, _, v, _, _ in self._unread if torch.is_tensor(v)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())
        diverged = None
        for batch, name, reported, factor, size in self._unread:
            value = next(numbers) if torch.is_tensor(reported) else float(reported)
            self.meters.setdefault(name, AverageMeter()).update(value * factor, size)
            if name == 'loss' and diverged is None and not math.isfinite(value):
                diverged = batch, value * factor
        self._unread.clear()
        return diverged


def train_one_epoch(
        task: TrainingTask,
        loader: Loader,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        *,
        device: torch.device,
        accum_steps: int = 1,
        clip_grad: Optional[float] = None,
        clip_mode: str = 'norm',
        autocast: Autocast = nullcontext,
        loss_scaler: Optional[NativeScaler] = None,
        lr_scheduler: Optional[Scheduler] = None,
        mixup_fn: Optional[Mixup] = None,
        channels_last: bool = False,
        move_to_device: bool = False,
        distributed: bool = False,
        log_interval: int = 50,
        num_epochs: int = 1,
        last_checkpoint: str = 'none yet',
        after_update: Optional[Callable[[int], None]] = None,
        verbose: bool = True,
) -> Dict[str, float]:
    """Train for one epoch.

    Args:
        task: timm training task; scalars in its result other than 'loss' and 'output' are averaged and reported.
        loader: Yields (input, target).
        optimizer: Optimizer of the task's parameters.
        epoch: Number of the epoch, from 0.
        device: Device of the task.
        accum_steps: Batches whose gradients are accumulated before an update.
        clip_grad: Gradient clipping value.
        clip_mode: timm's clipping mode: 'norm', 'value' or 'agc'.
        autocast: Returns a context for the forward pass.
        loss_scaler: timm's NativeScaler.
        lr_scheduler: timm scheduler, stepped per update.
        mixup_fn: Mixup on the device, if the loader does not do it.
        channels_last: Convert inputs to channels_last.
        move_to_device: Whether batches arrive on the CPU (no prefetcher).
        distributed: Average the reported values over processes.
        log_interval: Updates between log lines, and between checks of the loss on a GPU; at most a minute apart.
        num_epochs: Number of epochs of the run, to estimate the remaining time.
        last_checkpoint: Path to name in the error if training diverges.
        after_update: Called after each update with its number within the epoch, from 0.
        verbose: Show progress on this process.

    Returns:
        Averages over the epoch: 'loss' and the scalars of the task.

    Raises:
        TrainingDivergedError: If the loss is not finite; on a CPU before the weights change.
    """
    trained_module(task).train()
    averages = _Averages(device)
    num_batches = len(loader)
    updates_per_epoch = math.ceil(num_batches / accum_steps)
    num_updates = epoch * updates_per_epoch
    second_order = getattr(optimizer, 'is_second_order', False)
    start, num_images = time.perf_counter(), 0
    logged = start
    optimizer.zero_grad()
    progress = tqdm(loader, desc=f'epoch {epoch}', leave=False, disable=None if verbose else True, unit='batch')
    for index, (input, target) in enumerate(progress):
        group_start = index - index % accum_steps
        group_size = min(accum_steps, num_batches - group_start)
        need_update = index + 1 == group_start + group_size
        if move_to_device:
            input, target = input.to(device), target.to(device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        with nullcontext() if need_update else task.no_sync():
            with autocast():
                result = task(input, target)
                loss = result['loss'] / group_size
            averages.add(index, loss, group_size, result)
            update_index = index // accum_steps
            late = time.perf_counter() - logged > _SECONDS_BETWEEN_LINES
            logs = need_update and (late or update_index % log_interval == 0 or index + 1 == num_batches)
            diverged = averages.read() if logs or device.type == 'cpu' else None
            if diverged is not None:
                raise TrainingDivergedError(
                    f'training loss is {diverged[1]} in epoch {epoch}, batch {diverged[0]}',
                    f'lower `lr` or set `clip_grad=1`; last good checkpoint: {last_checkpoint}')
            clip_parameters = task.get_clip_parameters(exclude_head='agc' in clip_mode) if clip_grad else None
            if loss_scaler is not None:
                loss_scaler(
                    loss,
                    optimizer,
                    clip_grad=clip_grad,
                    clip_mode=clip_mode,
                    parameters=clip_parameters,
                    create_graph=second_order,
                    need_update=need_update,
                )
            else:
                loss.backward(create_graph=second_order)
                if need_update:
                    if clip_grad:
                        dispatch_clip_grad(clip_parameters, value=clip_grad, mode=clip_mode)
                    optimizer.step()

        num_images += len(result['output'])
        if not need_update:
            continue
        num_updates += 1
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        if verbose and logs:
            text = '  '.join(f'{name} {meter.avg:.4g}' for name, meter in averages.meters.items())
            logged = time.perf_counter()
            speed = num_images / (logged - start)
            batches_left = num_batches * (num_epochs - epoch) - index - 1
            left = timedelta(seconds=round((logged - start) / (index + 1) * batches_left))
            lr = optimizer.param_groups[0]['lr']
            progress.set_postfix_str(text)
            if progress.disable:
                _logger.info(
                    f'Train: {epoch} [{update_index + 1}/{updates_per_epoch}]  {text}  '
                    f'{speed:.1f} images/s  lr {lr:.3e}  {left} left')
        if lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates, metric=averages.meters['loss'].avg)
        if after_update is not None:
            after_update(update_index)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return OrderedDict((n, _mean_over_processes(m.avg, device, distributed)) for n, m in averages.meters.items())


def _batches(
        loader: Loader,
        device: torch.device,
        channels_last: bool,
        move_to_device: bool,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    for input, target in loader:
        if move_to_device:
            input, target = input.to(device), target.to(device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        yield input, target


def validate(
        task: TrainingTask,
        loader: Loader,
        *,
        device: torch.device,
        ema: bool = False,
        autocast: Autocast = nullcontext,
        channels_last: bool = False,
        move_to_device: bool = False,
        distributed: bool = False,
) -> Dict[str, float]:
    """Loss, top-1 and, for more than five classes, top-5 accuracy in percent on clean images, by timm's evaluator."""
    model = task.get_eval_model(ema=ema)
    assert model is not None
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    num_classes = 0
    with torch.inference_mode():
        for input, target in _batches(loader, device, channels_last, move_to_device):
            with autocast():
                output = model(input)
            evaluator.update(output, target)
            num_classes = output.shape[-1]
    metrics = evaluator.compute(distributed=distributed)
    return {name: value for name, value in metrics.items() if name != 'top5' or num_classes > 5}


def validate_robust(
        task: TrainingTask,
        loader: Loader,
        threat: ThreatModel,
        space: InputSpace,
        steps: int,
        *,
        device: torch.device,
        ema: bool = False,
        seed: int = 0,
        autocast: Autocast = nullcontext,
        channels_last: bool = False,
        move_to_device: bool = False,
        distributed: bool = False,
        show: Optional[Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]] = None,
) -> Dict[str, float]:
    """Accuracy in percent under PGD's last iterate from one random start, to monitor training.

    Do not publish it; use AutoAttack for that. The step size is 2.5 eps / steps, and the noise is the same in every
    epoch. `show` gets images, attacked images, targets and logits of the first batch.
    """
    model = crafting_model(task, ema).eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    for index, (input, target) in enumerate(_batches(loader, device, channels_last, move_to_device)):
        with autocast():
            # not 'best', which stops at the decision boundary: in low precision the pass below may see another boundary
            adv = PGD(steps=steps).craft(model, input, target, threat, space=space, seed=seed + index)
            with torch.no_grad():
                output = model(adv)
        if show is not None and index == 0:
            show(input, adv, target, output)
        evaluator.update(output, target)
    return OrderedDict(robust_top1=evaluator.compute(distributed=distributed)['top1'])
