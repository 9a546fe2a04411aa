"""A training run from start to end, built from timm's parts.

The steps, in order: build the network and check the data; create loaders, task, optimizer and schedule; resume; train
and validate epoch by epoch; keep the best checkpoint and export it with class names.
"""
import gc
import logging
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Dict, Iterator, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import distribute_bn, random_seed, unwrap_model

from ..attacks import InputSpace
from ..devices import naming_batch_size
from ..errors import InputError
from ..inputs import (
    Peers,
    Preprocessing,
    Process,
    export_model,
    init_process,
    load_weights,
    num_outputs,
    resolve_preprocessing,
    weights_sha256,
    write_text,
)
from ..layers import has_aux_norm, plain_branch, sync_norm_statistics
from ..tasks import MBNAT, RobustTask
from .build import (
    build_criterion,
    build_network,
    build_teacher,
    check_img_sizes,
    mixed_precision,
    replace_classifier,
    resolve_lr,
)
from .checkpoint import is_recovery, open_saver, resume, resume_ema
from .config import TrainConfig
from .data import average_batch_size, classes_of_data, create_loaders, open_training_data, set_loader_epoch
from .folder import export_incomplete, locked, output_dir
from .loop import PassSettings, train_one_epoch, trained_module, validate, validate_robust
from .result import TrainResult
from .summary import add_row, plot_curves, trim
from .trackers import Trackers, check_trackers

__all__ = ['TrainResult', 'train']

_logger = logging.getLogger(__name__)


@contextmanager
def _naming(argument: str, value: str) -> Iterator[None]:
    """Turn an error of one of timm's factories into an `InputError` that names our argument."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise InputError(
            str(error) or 'is incompatible with the other settings', argument=argument, value=value) from error


def _epoch_seed(seed: int, epoch: int) -> int:
    # every epoch has its own seed, so that a resumed run repeats it
    return (seed + epoch * 10007) % (1 << 31)


class _Run:
    """The parts of a run, in the order in which they are created."""

    def __init__(self, config: TrainConfig, process: Process, peers: Peers):
        random_seed(config.seed, process.rank)
        model = build_network(config)
        self.preprocessing: Preprocessing = resolve_preprocessing(config, model)
        in_chans, num_classes = self.preprocessing['input_size'][0], num_outputs(model)
        if config.num_classes is None:
            found = classes_of_data(config, in_chans) or num_classes
            config = replace(config, num_classes=found)
            if found != num_classes:
                if process.primary:
                    _logger.info(f'{found} classes, taken from the training data')
                random_seed(config.seed, process.rank)
                model, num_classes = build_network(config), found
        if config.eval_metric == 'top5' and num_classes <= 5:
            raise InputError(f'is always 100 % with {num_classes} classes', "choose 'top1'", argument='eval_metric',
                             value='top5')
        check_img_sizes(config, model, in_chans)
        self.config, self.process, self.peers = config, process, peers
        self.data = open_training_data(config, in_chans, num_classes, process)
        if replace_classifier(config, model, self.data.class_names) and process.primary:
            _logger.info(f'The classifier of {config.model} is for other classes than the data: it is reinitialized')
        model.to(process.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.dist_bn = config.dist_bn
        if process.distributed and config.sync_bn:
            self.dist_bn = ''
            model = sync_norm_statistics(model)
        self.model = config.objective.prepare_model(model)
        self.autocast, self.loss_scaler = mixed_precision(config, process.device)
        self.loaders = create_loaders(config, self.data, self.preprocessing, process, num_classes)
        self.metric = config.eval_metric if self.loaders.validation is not None else 'loss'
        self.space = InputSpace(self.preprocessing['mean'], self.preprocessing['std'])
        self.lr = resolve_lr(config, process.world_size, average_batch_size(self.loaders.train))
        self.task = self._create_task()
        with _naming('opt', config.opt):
            self.optimizer = create_optimizer_v2(
                trained_module(self.task), **optimizer_kwargs(replace(config, lr=self.lr)), **config.opt_kwargs)
        self.start_epoch = self._prepare_task()
        self.updates_per_epoch = -(-len(self.loaders.train) // config.grad_accum_steps)
        with _naming('sched', config.sched):
            self.lr_scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer,
                **scheduler_kwargs(config, decreasing_metric=self.metric == 'loss'),
                updates_per_epoch=self.updates_per_epoch,
            )
        self._catch_up()
        # with EMA, the averaged weights are validated, as in timm
        self.ema = self.task.has_ema() and not config.model_ema_force_cpu
        self.common = PassSettings(
            device=process.device,
            autocast=self.autocast,
            channels_last=config.channels_last,
            move_to_device=config.no_prefetcher,
            distributed=process.distributed,
        )
        self.eval_metrics: Dict[str, float] = {}

    def _create_task(self) -> TrainingTask:
        config = self.config
        teacher = build_teacher(
            config.teacher, self.data.train, self.preprocessing['input_size'], self.process.device,
            channels_last=config.channels_last)
        if teacher:
            check_img_sizes(config, teacher.model, self.preprocessing['input_size'][0], config.teacher.model)
        self.training_data = self.data.fingerprint
        if teacher and self.training_data:
            self.training_data += f' {weights_sha256(teacher.model)}'
        return config.objective.create_task(
            self.model,
            build_criterion(config).to(self.process.device),
            attack=config.attack,
            awp=config.awp,
            teacher=teacher,
            space=self.space,
            steps_per_epoch=len(self.loaders.train),
            seed=config.seed,
            device=self.process.device,
            verbose=self.process.primary,
        )

    def _prepare_task(self) -> int:
        """Resume, set up EMA, compile and distribute, in timm's order; returns the first epoch."""
        config, task, start_epoch = self.config, self.task, 0
        if config.resume:
            start_epoch = resume(
                config, task, self.optimizer, self.loss_scaler, training_data=self.training_data,
                log_info=self.process.primary)
        if config.model_ema:
            task.setup_ema(
                decay=config.model_ema_decay,
                use_warmup=config.model_ema_warmup,
                device=torch.device('cpu') if config.model_ema_force_cpu else None,
            )
            if config.resume:
                resume_ema(task, config.resume)
        if config.torchcompile:
            task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        if self.process.distributed:
            self.peers.meet()  # wait until the primary process has checked all images
            task.prepare_distributed(
                device_ids=None if self.process.device.type == 'cpu' else [self.process.device],
                broadcast_buffers=not config.no_ddp_bb)
        start_epoch = start_epoch if config.start_epoch is None else config.start_epoch
        if isinstance(task, RobustTask) and (config.start_epoch is not None or is_recovery(config.resume)):
            task.step = start_epoch * len(self.loaders.train)  # warm-up, noise and schedules depend on it
        return start_epoch

    def _catch_up(self) -> None:
        """Advance the schedule to the first epoch of a resumed run."""
        config, start = self.config, self.start_epoch
        if start > self.num_epochs or start == self.num_epochs and not export_incomplete(config):
            known = (f'{config.resume} has already trained {start}' if config.start_epoch is None
                     else f'training would start at epoch {start}')
            raise InputError(known, 'choose more', argument='epochs', value=config.epochs)
        if self.lr_scheduler is not None and start > 0:
            if config.sched_on_updates:
                self.lr_scheduler.step_update(start * self.updates_per_epoch)
            else:
                self.lr_scheduler.step(start)

    def open_folder(self, stack: ExitStack) -> None:
        """Open the folder of the primary process, which stays locked until the stack is closed."""
        config = self.config
        self.folder = output_dir(config, self.preprocessing['input_size'][-1])
        stack.enter_context(locked(self.folder))
        described = {
            **config.to_flat(), 'class_names': self.data.class_names, 'data_config': dict(self.preprocessing),
            'training_data': self.training_data}
        self.saver = open_saver(
            config, self.task, self.optimizer, self.loss_scaler, described, self.folder, self.metric)
        trim(self.folder / 'summary.csv', self.start_epoch)
        write_text(self.folder / 'args.yaml', config.to_yaml())
        self.trackers = Trackers(config, self.folder, self.start_epoch, self.space, self.data.class_names)
        stack.callback(self.trackers.finish)
        if config.warning:
            _logger.warning(config.warning)
        attack = f' against {config.attack.attack} {config.attack.threat}' if config.objective.crafts else ''
        data = f' (fingerprint {self.data.fingerprint[:12]})' if self.data.fingerprint else ''
        warmup = f', after {config.warmup_epochs} epochs of warm-up' if config.warmup_epochs else ''
        _logger.info(
            f'{config.model}: {sum(p.numel() for p in self.model.parameters()):,} parameters, objective '
            f'{config.objective.name}{attack}, {len(self.data.train):,} images{data}, epochs {self.start_epoch} to '
            f'{self.num_epochs - 1}, lr {self.lr:g}{warmup}, in {self.folder}')

    def _last_checkpoint(self) -> str:
        last = self.folder / 'last.pth.tar' if self.process.primary else None
        return str(last) if last and last.exists() else self.config.resume or 'none yet'

    def _recover(self, epoch: int, update: int) -> None:
        if (update + 1) % self.config.recovery_interval == 0:
            self.saver.save_recovery(epoch, update)

    def train_epoch(self, epoch: int) -> Dict[str, float]:
        """Train for an epoch; returns its averages."""
        config, loaders, world = self.config, self.loaders, self.process
        random_seed(_epoch_seed(config.seed, epoch), world.rank)
        set_loader_epoch(loaders.train, epoch)
        if config.mixup_off_epoch and epoch >= config.mixup_off_epoch:
            (loaders.mixup_fn or loaders.train).mixup_enabled = False
        metrics = train_one_epoch(
            self.task,
            loaders.train,
            self.optimizer,
            epoch,
            accum_steps=config.grad_accum_steps,
            clip_grad=config.clip_grad,
            clip_mode=config.clip_mode,
            loss_scaler=self.loss_scaler,
            lr_scheduler=self.lr_scheduler,
            mixup_fn=loaders.mixup_fn,
            log_interval=config.log_interval,
            num_epochs=self.num_epochs,
            last_checkpoint=self._last_checkpoint(),
            after_update=partial(self._recover, epoch) if world.primary and config.recovery_interval else None,
            verbose=world.primary,
            **self.common,
        )
        if world.distributed and self.dist_bn in ('broadcast', 'reduce'):
            for averaged in sorted({False, self.ema}):
                distribute_bn(
                    self.task.get_trainable_module(ema=averaged), world.world_size, self.dist_bn == 'reduce')
        return metrics

    def validate(self) -> None:
        """Validate on clean and on attacked images."""
        if self.loaders.validation is not None:
            self.eval_metrics = dict(validate(self.task, self.loaders.validation, ema=self.ema, **self.common))
        if self.loaders.robust is not None:
            self.eval_metrics.update(validate_robust(
                self.task, self.loaders.robust, self.config.attack.threat, self.space, self.config.robust_eval_steps,
                ema=self.ema, seed=self.config.seed, show=self.trackers.show if self.process.primary else None,
                **self.common))

    def keep(self, epoch: int, train_metrics: Dict[str, float], metric: float, left: timedelta) -> None:
        """Log an epoch, write its row and checkpoint, and send the row to the trackers."""
        shown = '  '.join(f'{k} {v:.4g}' for k, v in self.eval_metrics.items())
        _logger.info(f'Epoch {epoch}: {shown}  {str(left).split(".")[0]} left')
        row = add_row(self.folder / 'summary.csv', epoch, train_metrics, self.eval_metrics,
                      mean(group['lr'] for group in self.optimizer.param_groups))
        self.saver.save_checkpoint(epoch, metric=metric)
        self.trackers.log(row)

    def run_epochs(self) -> float:
        """Run all epochs; returns the seconds they took."""
        start = time.perf_counter()
        for epoch in range(self.start_epoch, self.num_epochs):
            self.peers.meet()  # wait until the primary process has written the last epoch
            train_metrics = self.train_epoch(epoch)
            metric: Optional[float] = None
            if (epoch + 1) % self.config.val_interval == 0 or epoch + 1 == self.num_epochs:
                self.validate()
                metric = (self.eval_metrics or train_metrics)[self.metric]
                if self.process.primary:
                    share = (time.perf_counter() - start) / (epoch + 1 - self.start_epoch)
                    self.keep(epoch, train_metrics, metric, timedelta(seconds=share * (self.num_epochs - epoch - 1)))
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(epoch + 1, metric)
        return time.perf_counter() - start

    def result(self, seconds: float) -> TrainResult:
        """The result after the last epoch, which is always validated and ranked."""
        metric, epoch = self.saver.best_metric, self.saver.best_epoch
        assert metric is not None and epoch is not None
        return TrainResult(self.folder, float(metric), int(epoch), dict(self.eval_metrics), seconds,
                           self.config.objective.gamma if isinstance(self.config.objective, MBNAT) else None)

    def leave_process_group(self) -> None:
        """Leave the process group."""
        # delete DistributedDataParallel first: if it holds the last reference to a gloo group, torch 2.11 can
        # deadlock when the group is destroyed with it
        self.task.trainable_module = unwrap_model(self.task.trainable_module)
        if self.process.primary:
            self.saver.model = self.task.trainable_module
        self.peers.leave()
        gc.collect()
        dist.destroy_process_group()

    def export(self, seconds: float) -> None:
        """Write the best weights, for `local-dir:` names of timm, and the curves; log the `seconds` of all epochs."""
        plot_curves(self.folder / 'summary.csv', self.folder / 'curves.png')
        model = unwrap_model(self.task.get_trainable_module()).cpu().to(memory_format=torch.contiguous_format)
        load_weights(model, self.folder / 'model_best.pth.tar', use_ema=self.ema)
        if has_aux_norm(model):
            self._export_to(self.folder / 'export_aux', plain_branch(model, 'aux'))
            model = plain_branch(model, 'main')
        self._export_to(self.folder / 'export', model)
        # the time of earlier processes is not known
        took = '' if self.start_epoch else f', trained in {timedelta(seconds=round(seconds))}'
        _logger.info(
            f'Best {self.metric} {self.saver.best_metric:g} (epoch {self.saver.best_epoch}){took}; weights in '
            f"{self.folder / 'export'}, curves in {self.folder / 'curves.png'}")

    def _export_to(self, folder: Path, model: nn.Module) -> None:
        name = self.config.objective.name
        export_model(
            model,
            folder,
            preprocessing=self.preprocessing,
            class_names=self.data.class_names,
            # not the tag of the pretrained weights
            pretrained_cfg={'tag': name, 'description': f'trained with {name}'},
        )


def train(config: TrainConfig) -> TrainResult:
    """Train a network.

    With `resume`, a run stopped at any moment continues after its last complete epoch and repeats the interrupted one.
    On a CPU the final weights then equal those of an uninterrupted run, since every epoch has its own seed. The
    plateau schedule starts over, since timm does not save its state.

    Args:
        config: All settings.

    Returns:
        The result, on every process.

    Raises:
        InputError: On invalid settings, data or files; where possible before training starts.
        TrainingDivergedError: If the loss is not finite; the last good checkpoint is kept.
    """
    check_trackers(config)
    process = init_process(config.device)
    if process.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    with naming_batch_size(config.batch_size), ExitStack() as stack:
        peers = stack.enter_context(Peers())
        run = _Run(config, process, peers)
        if process.primary:
            run.open_folder(stack)
        seconds = run.run_epochs()
        result = peers.broadcast(run.result(seconds) if process.primary else None)
        assert result is not None
        if process.distributed:
            run.leave_process_group()
        if process.primary:
            run.export(seconds)
    return result
