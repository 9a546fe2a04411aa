"""A training run from start to end, on timm's parts."""
import argparse
import gc
import logging
import time
from collections import OrderedDict
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import torch
import torch.nn as nn
import yaml
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import distribute_bn, init_distributed_device, is_primary, random_seed, unwrap_model, update_summary
from timm.utils.summary import trim_summary

from ..attacks import InputSpace
from ..data import class_names
from ..errors import InputError
from ..inputs import export_model, load_weights, resolve_preprocessing, write_text
from ..layers import has_aux_norm, plain_branch, sync_norm_statistics
from .build import (
    build_criterion,
    build_network,
    check_arguments,
    mixed_precision,
    model_config,
    resolve_lr,
)
from .checkpoint import AtomicCheckpointSaver, resume, resume_ema
from .curves import plot_curves
from .datasets import create_datasets, create_loaders
from .loop import train_one_epoch, validate, validate_robust

__all__ = ['run_training']

_logger = logging.getLogger(__name__)


@contextmanager
def _naming(flag: str, value: str) -> Iterator[None]:
    """Where one of timm's factories refuses its arguments: `InputError` that names the flag."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise InputError(f'{flag} {value}: {error or "does not go with the other flags"}') from error


def _epoch_seed(seed: int, epoch: int) -> int:
    # every epoch starts from a state of its own, so that a resumed run repeats it
    return (seed + epoch * 10007) % (1 << 31)


def _set_loader_epoch(loader, epoch: int) -> None:
    for part in (loader.dataset, getattr(loader, 'sampler', None)):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)


def _last_checkpoint(output_dir: Optional[Path], resumed: str) -> str:
    last = output_dir and output_dir / 'last.pth.tar'
    return str(last) if last and last.exists() else resumed or 'none yet'


def _export(
        model: nn.Module,
        checkpoint: Path,
        directory: Path,
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        use_ema: bool,
) -> None:
    """Write the best weights as safetensors with a config, to be loaded by `local-dir:`."""
    load_weights(model, checkpoint, use_ema=use_ema)
    if has_aux_norm(model):
        _save(plain_branch(model, 'aux'), directory.with_name(f'{directory.name}_aux'), args, data_config)
        model = plain_branch(model, 'main')
    _save(model, directory, args, data_config)


def _save(model: nn.Module, directory: Path, args, data_config: Dict[str, Any]) -> None:
    export_model(
        model,
        directory,
        preprocessing=data_config,
        class_names=args.class_names,
        # these are not the weights of the tag the architecture came with
        pretrained_cfg={'tag': args.objective, 'description': f'trained with {args.objective}'},
    )


def _goes_on(args: argparse.Namespace, run: Path) -> bool:
    """Whether --resume is of the run in this folder."""
    return bool(args.resume) and Path(args.resume).resolve().parent == run.resolve()


def _lacks_export(args: argparse.Namespace) -> bool:
    """Whether the run that goes on was cut between its last checkpoint and the end of its export."""
    run = Path(args.output or './output/train') / args.experiment
    return _goes_on(args, run) and (run / 'model_best.pth.tar').is_file() and not (
        run / 'export' / 'config.json').is_file()


def _put_aside_other_columns(summary: Path, epoch: int, train_metrics, eval_metrics) -> None:
    """Rename a summary whose rows are of other metrics, of flags from before a resume: timm would mix them up."""
    columns = ['epoch', *(f'train_{k}' for k in train_metrics), *(f'eval_{k}' for k in eval_metrics), 'lr']
    if summary.is_file() and summary.read_text().splitlines()[:1] not in ([], [','.join(columns)]):
        summary.rename(summary.with_name(f'summary-before-{epoch}.csv'))


def _prepare_task(args: argparse.Namespace, task, optimizer, loss_scaler, device: torch.device) -> int:
    """Resume, average, compile and distribute, in timm's order; returns the epoch to start with."""
    primary, start_epoch = is_primary(args), 0
    if args.resume:
        start_epoch = resume(task, args.resume, optimizer, loss_scaler, log_info=primary) or 0
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None,
        )
        if args.resume:
            resume_ema(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(
            device_ids=None if device.type == 'cpu' else [device], broadcast_buffers=not args.no_ddp_bb)
    return start_epoch


def _check_same_validation(args: argparse.Namespace) -> None:
    """Refuse to go on with a run that held other images out of training: it has seen those of today."""
    before = Path(args.resume).parent / 'args.yaml'
    if not args.resume or not before.is_file():
        return
    held = (yaml.safe_load(before.read_text()) or {}).get('val_images', '')
    if held != args.val_images:
        raise InputError(
            'that run held other images out of training',
            'give the data, `seed` and `val_fraction` it had', argument='resume', value=args.resume)


def _open_saver(args: argparse.Namespace, task, optimizer, loss_scaler, output_dir: Path, start_epoch: int):
    """Saver of the primary process, with the history of the run it goes on with."""
    saver = AtomicCheckpointSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        args=args,
        amp_scaler=loss_scaler,
        checkpoint_dir=str(output_dir),
        recovery_dir=str(output_dir),
        decreasing=args.eval_metric == 'loss',
        max_history=args.checkpoint_hist,
        task=task,
    )
    if _goes_on(args, output_dir):
        saver.load_state_dict_from_checkpoint(args.resume)
    trim_summary(str(output_dir / 'summary.csv'), start_epoch)
    flags = {k: v for k, v in vars(args).items() if k not in ('class_names', 'data_config')}
    write_text(output_dir / 'args.yaml', yaml.safe_dump(flags, default_flow_style=False))
    return saver


def _leave_process_group(task, saver: Optional[AtomicCheckpointSaver]) -> None:
    # DistributedDataParallel must be gone first: if it holds the last reference to a gloo group, torch 2.11 can wait
    # for itself when the group ends with it
    task.trainable_module = unwrap_model(task.trainable_module)
    if saver is not None:
        saver.model = task.trainable_module
    gc.collect()
    torch.distributed.destroy_process_group()


def run_training(args: argparse.Namespace) -> Dict[str, Any]:
    """Train as the command line says.

    A run stopped at any moment goes on from its last whole epoch with `--resume`; on a CPU the final weights are then
    those of an uninterrupted run, since every epoch starts from a random state of its own. What was done of the epoch
    that was cut is done again.

    Args:
        args: Parsed arguments of `timm-robust train`.

    Returns:
        'output_dir', 'best_metric', 'best_epoch', the 'metrics' of the last epoch and 'seconds'; empty on other than
        the primary process.

    Raises:
        InputError: On anything the user can mend, before training where it can be known.
    """
    options = check_arguments(args)
    device = init_distributed_device(args)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    primary = is_primary(args)
    random_seed(args.seed, args.rank)

    model = build_network(args)
    data_config = resolve_preprocessing(model_config(args), model)
    train_set, validation_set = create_datasets(args, data_config['input_size'][0], model.num_classes)
    _check_same_validation(args)
    # a checkpoint holds the arguments, and whoever loads it wants to know
    args.class_names, args.data_config = class_names(train_set), dict(data_config)
    model.to(device=device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''
        model = sync_norm_statistics(model)
    model = options.objective.prepare_model(model)
    autocast, loss_scaler = mixed_precision(args, device)
    loader_train, loader_eval, loader_robust, mixup_fn = create_loaders(
        args, options.objective.prepare_dataset(train_set, data_config['input_size'][1:], args.hflip), validation_set,
        data_config, device, model.num_classes)
    if loader_eval is None:
        args.eval_metric = 'loss'
    space = InputSpace(data_config['mean'], data_config['std'])
    resolve_lr(args)

    task = options.objective.create_task(
        model,
        build_criterion(args).to(device),
        attack=options.attack,
        awp=options.awp,
        space=space,
        steps_per_epoch=len(loader_train),
        seed=args.seed,
        device=device,
        verbose=primary,
    )
    with _naming('--opt', args.opt):
        optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    start_epoch = _prepare_task(args, task, optimizer, loss_scaler, device)
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    with _naming('--sched', args.sched):
        lr_scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
            updates_per_epoch=updates_per_epoch,
        )
    if start_epoch > num_epochs or start_epoch == num_epochs and not _lacks_export(args):
        raise InputError(f'--epochs {args.epochs}: {args.resume} has {start_epoch} already, give more')
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            lr_scheduler.step(start_epoch)

    output_dir = saver = None
    if primary:
        output_dir = _output_dir(args, data_config)
        saver = _open_saver(args, task, optimizer, loss_scaler, output_dir, start_epoch)
        _logger.info(
            f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, objective '
            + options.objective.name
            + (f' against {options.attack.attack} {options.attack.threat}' if options.objective.crafts else '')
            + f', {len(train_set):,} images, epochs {start_epoch} to {num_epochs}, lr {args.lr:g}, in {output_dir}')

    common = dict(
        device=device,
        autocast=autocast,
        channels_last=args.channels_last,
        move_to_device=args.no_prefetcher,
        distributed=args.distributed,
    )
    # with EMA its figures are the ones that count, as in timm
    ema = task.has_ema() and not args.model_ema_force_cpu
    start, eval_metrics = time.perf_counter(), {}
    for epoch in range(start_epoch, num_epochs):
        random_seed(_epoch_seed(args.seed, epoch), args.rank)
        _set_loader_epoch(loader_train, epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            (mixup_fn or loader_train).mixup_enabled = False
        train_metrics = train_one_epoch(
            task,
            loader_train,
            optimizer,
            epoch,
            accum_steps=args.grad_accum_steps,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            loss_scaler=loss_scaler,
            lr_scheduler=lr_scheduler,
            mixup_fn=mixup_fn,
            log_interval=args.log_interval,
            last_checkpoint=_last_checkpoint(output_dir, args.resume),
            verbose=primary,
            **common,
        )
        if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
            for averaged in sorted({False, ema}):
                distribute_bn(
                    task.get_trainable_module(ema=averaged), args.world_size, args.dist_bn == 'reduce')
        if (epoch + 1) % args.val_interval and epoch + 1 != num_epochs:
            if lr_scheduler is not None:
                lr_scheduler.step(epoch + 1)
            continue
        if loader_eval is not None:
            eval_metrics = OrderedDict(validate(task, loader_eval, ema=ema, **common))
        if loader_robust is not None:
            eval_metrics.update(validate_robust(
                task, loader_robust, options.attack.threat, space, args.robust_eval_steps, ema=ema, seed=args.seed,
                **common))
        metric = (eval_metrics or train_metrics)[args.eval_metric]
        if primary:
            _logger.info(f'Epoch {epoch}: ' + '  '.join(f'{k} {v:.4g}' for k, v in eval_metrics.items()))
            _put_aside_other_columns(output_dir / 'summary.csv', epoch, train_metrics, eval_metrics)
            update_summary(
                epoch, train_metrics, eval_metrics, filename=str(output_dir / 'summary.csv'),
                lr=optimizer.param_groups[0]['lr'])
            saver.save_checkpoint(epoch, metric=metric)
        if lr_scheduler is not None:
            lr_scheduler.step(epoch + 1, metric)

    if args.distributed:
        _leave_process_group(task, saver)
    if not primary:
        return {}
    plot_curves(output_dir / 'summary.csv', output_dir / 'curves.png')
    plain = unwrap_model(task.get_trainable_module()).cpu().to(memory_format=torch.contiguous_format)
    _export(plain, output_dir / 'model_best.pth.tar', output_dir / 'export', args, data_config, use_ema=ema)
    _logger.info(
        f'Best {args.eval_metric} {saver.best_metric:g} (epoch {saver.best_epoch}); weights in '
        f'{output_dir / "export"}, curves in {output_dir / "curves.png"}')
    return {
        'output_dir': str(output_dir),
        'best_metric': saver.best_metric,
        'best_epoch': saver.best_epoch,
        'metrics': dict(eval_metrics),
        'seconds': time.perf_counter() - start,
    }


def _output_dir(args: argparse.Namespace, data_config: Dict[str, Any]) -> Path:
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    path = Path(args.output or './output/train') / name
    if (path / 'last.pth.tar').exists() and not _goes_on(args, path):
        raise InputError(
            f'--experiment {name}: {path} already holds a run, choose another name or go on with '
            f'--resume {path / "last.pth.tar"}')
    path.mkdir(parents=True, exist_ok=True)
    return path
