"""A training run from start to end, on timm's parts."""
import argparse
import json
import logging
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
import yaml
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, safe_model_name, save_for_hf
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import (
    NativeScaler,
    distribute_bn,
    init_distributed_device,
    is_primary,
    random_seed,
    unwrap_model,
    update_summary,
)
from timm.utils.summary import trim_summary

from ..attacks import InputSpace
from ..errors import InputError
from ..layers import has_batch_statistics, sync_norm_statistics
from ..tasks import ObjectiveOptions, create_task
from .checkpoint import AtomicCheckpointSaver, load_weights, resume, resume_ema
from .curves import plot_curves
from .datasets import create_datasets, create_loaders, fit_channels
from .loop import train_one_epoch, validate, validate_robust

__all__ = ['build_model', 'resolve_data', 'resolve_device', 'run_training']

_logger = logging.getLogger(__name__)

EVAL_METRICS = ('top1', 'top5', 'loss', 'robust_top1')


def resolve_device(name: Optional[str]) -> str:
    """The named device, or the best there is; `InputError` if there is none of that name."""
    if name is None:
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    if name.startswith('cuda') and not torch.cuda.is_available():
        raise InputError(f'--device {name}: no CUDA device is available, pass --device cpu')
    return name


def build_model(args: argparse.Namespace, **kwargs: Any) -> nn.Module:
    """Create the model of the arguments; `InputError` if there is none of that name or it refuses an argument."""
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    try:
        return create_model(
            args.model,
            pretrained=args.pretrained,
            in_chans=in_chans,
            num_classes=args.num_classes,
            **kwargs,
            **args.model_kwargs,
        )
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, OSError, AssertionError) as error:
        reason = ' '.join(str(error).split())
        raise InputError(f'--model {args.model}: {reason} (timm.list_models() lists the names)') from error


def build_criterion(args: argparse.Namespace) -> nn.Module:
    """timm's choice of training criterion."""
    mixup_active = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0. if mixup_active else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    if mixup_active:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def resolve_data(args: argparse.Namespace, model: nn.Module) -> Dict[str, Any]:
    """timm's data config with mean and std for the channels of the model."""
    data_config = resolve_data_config(vars(args), model=model)
    in_chans = getattr(model, 'in_chans', data_config['input_size'][0])
    data_config['input_size'] = (in_chans, *data_config['input_size'][1:])
    for name in ('mean', 'std'):
        data_config[name] = fit_channels(data_config[name], in_chans)
    return data_config


def resolve_lr(args: argparse.Namespace) -> None:
    """Set --lr from --lr-base and the global batch size, by timm's rule."""
    if args.lr:
        return
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


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


def _export(model: nn.Module, checkpoint: Path, directory: Path, args, data_config: Dict[str, Any]) -> None:
    """Write the best weights as safetensors with a config, to be loaded by `local-dir:`."""
    load_weights(model, str(checkpoint), use_ema=args.model_ema)
    save_for_hf(
        model,
        str(directory),
        safe_serialization=True,
        model_args=args.model_kwargs or None,
        # these are not the weights of the tag the architecture came with
        model_config={'pretrained_cfg': {'tag': args.objective, 'description': f'trained with {args.objective}'}},
        data_config={k: data_config[k] for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')},
    )


def run_training(args: argparse.Namespace) -> Dict[str, Any]:
    """Train as the command line says.

    A run stopped at any moment goes on from its last whole epoch with `--resume`; on a CPU the final weights are then
    those of an uninterrupted run, since every epoch starts from a random state of its own. What was done of the epoch
    that was cut is done again.

    Args:
        args: Parsed arguments of `timm-robust train`.

    Returns:
        'output_dir', 'best_metric', 'best_epoch', the 'metrics' of the last epoch and 'seconds'.

    Raises:
        InputError: On anything the user can mend, before training where it can be known.
    """
    options = ObjectiveOptions.from_args(args)
    options.check_schedule(args.epochs)
    if args.robust_eval_steps and args.robust_eval_samples < 1:
        raise InputError(f'--robust-eval-samples {args.robust_eval_samples}: must be at least 1')
    if args.eval_metric == 'robust_top1' and not args.robust_eval_steps:
        raise InputError('--eval-metric robust_top1: needs robust validation, set --robust-eval-steps 10')
    if args.eval_metric not in EVAL_METRICS:
        raise InputError(f"--eval-metric {args.eval_metric}: unknown, choose one of {', '.join(EVAL_METRICS)}")
    args.device = resolve_device(args.device)
    device = init_distributed_device(args)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    primary = is_primary(args)
    random_seed(args.seed, args.rank)

    model = build_model(args, drop_rate=args.drop, drop_path_rate=args.drop_path, global_pool=args.gp)
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint, flag='--initial-checkpoint')
    if args.batch_size == 1 and has_batch_statistics(model, training=True):
        raise InputError(
            f'--batch-size 1: {args.model} normalizes by the statistics of the batch, choose at least 2')
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except AssertionError as error:
            raise InputError(f'--grad-checkpointing: {args.model} does not support it, leave it out') from error
    data_config = resolve_data(args, model)
    train_set, validation_set = create_datasets(args, data_config['input_size'][0], model.num_classes)

    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    model.to(device=device, memory_format=memory_format)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''
        model = sync_norm_statistics(convert_sync_batchnorm(model))
    autocast, loss_scaler = nullcontext, None
    if args.amp:
        amp_dtype = torch.bfloat16 if args.amp_dtype == 'bfloat16' or device.type == 'cpu' else torch.float16
        autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)
        if amp_dtype == torch.float16:
            loss_scaler = NativeScaler(device=device.type)
    loader_train, loader_eval, loader_robust, mixup_fn = create_loaders(
        args, train_set, validation_set, data_config, device, model.num_classes)
    space = InputSpace(data_config['mean'], data_config['std'])
    resolve_lr(args)

    task = create_task(
        options,
        model,
        build_criterion(args).to(device),
        space=space,
        steps_per_epoch=len(loader_train),
        seed=args.seed,
        device=device,
        verbose=primary,
    )
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    start_epoch = 0
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

    eval_metric = args.eval_metric if loader_eval is not None else 'loss'
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args, decreasing_metric=eval_metric == 'loss'),
        updates_per_epoch=updates_per_epoch,
    )
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            lr_scheduler.step(start_epoch)

    output_dir = saver = None
    if primary:
        output_dir = _output_dir(args, data_config)
        saver = AtomicCheckpointSaver(
            model=task.get_trainable_module(),
            optimizer=optimizer,
            args=args,
            amp_scaler=loss_scaler,
            checkpoint_dir=str(output_dir),
            recovery_dir=str(output_dir),
            decreasing=eval_metric == 'loss',
            max_history=args.checkpoint_hist,
            task=task,
        )
        if args.resume and Path(args.resume).resolve().parent == output_dir.resolve():
            saver.load_state_dict_from_checkpoint(args.resume)
        trim_summary(str(output_dir / 'summary.csv'), start_epoch)
        (output_dir / 'args.yaml').write_text(yaml.safe_dump(vars(args), default_flow_style=False))
        _logger.info(
            f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, objective {options.objective}'
            + (f' against {options.attack} {options.threat}' if options.objective != 'standard' else '')
            + f', {len(train_set):,} images, epochs {start_epoch} to {num_epochs}, lr {args.lr:g}, in {output_dir}')

    common = dict(
        device=device,
        autocast=autocast,
        channels_last=args.channels_last,
        move_to_device=args.no_prefetcher,
        distributed=args.distributed,
    )
    start, eval_metrics, best = time.perf_counter(), {}, (None, None)
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
            distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
            if task.has_ema():
                distribute_bn(task.get_trainable_module(ema=True), args.world_size, args.dist_bn == 'reduce')
        if (epoch + 1) % args.val_interval and epoch + 1 != num_epochs:
            if lr_scheduler is not None:
                lr_scheduler.step(epoch + 1)
            continue
        if loader_eval is not None:
            eval_metrics = OrderedDict()
            # with EMA its figures are the ones that count, as in timm
            ema = task.has_ema() and not args.model_ema_force_cpu
            eval_metrics.update(validate(task, loader_eval, ema=ema, **common))
            if loader_robust is not None:
                eval_metrics.update(validate_robust(
                    task, loader_robust, options.threat, space, args.robust_eval_steps,
                    ema=ema, seed=args.seed, **common))
        metric = (eval_metrics or train_metrics)[eval_metric]
        if primary:
            _logger.info(f'Epoch {epoch}: ' + '  '.join(f'{k} {v:.4g}' for k, v in eval_metrics.items()))
            update_summary(
                epoch, train_metrics, eval_metrics, filename=str(output_dir / 'summary.csv'),
                lr=optimizer.param_groups[0]['lr'])
            best = saver.save_checkpoint(epoch, metric=metric)
        if lr_scheduler is not None:
            lr_scheduler.step(epoch + 1, metric)

    seconds = time.perf_counter() - start
    if args.distributed:
        torch.distributed.destroy_process_group()
    if not primary:
        return {}
    if best[0] is None and not (output_dir / 'model_best.pth.tar').exists():
        raise InputError(f'--epochs {args.epochs}: nothing left to train after epoch {start_epoch}')
    plot_curves(output_dir / 'summary.csv', output_dir / 'curves.png')
    plain = unwrap_model(task.get_trainable_module()).cpu().to(memory_format=torch.contiguous_format)
    _export(plain, output_dir / 'model_best.pth.tar', output_dir / 'export', args, data_config)
    _logger.info(
        f'Best {eval_metric} {saver.best_metric} (epoch {saver.best_epoch}); weights in {output_dir / "export"}, '
        f'curves in {output_dir / "curves.png"}')
    result = {
        'output_dir': str(output_dir),
        'best_metric': saver.best_metric,
        'best_epoch': saver.best_epoch,
        'metrics': dict(eval_metrics),
        'seconds': seconds,
    }
    (output_dir / 'result.json').write_text(json.dumps(result, indent=2))
    return result


def _output_dir(args: argparse.Namespace, data_config: Dict[str, Any]) -> Path:
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    path = Path(args.output or './output/train') / name
    if (path / 'last.pth.tar').exists() and not args.resume:
        raise InputError(
            f'--experiment {name}: {path} already holds a run, choose another name or go on with '
            f'--resume {path / "last.pth.tar"}')
    path.mkdir(parents=True, exist_ok=True)
    return path
