"""The parts of a run, built from command line arguments by timm's factories."""
import argparse
import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import NativeScaler

from ..errors import InputError, check_at_least, check_choice, check_range
from ..inputs import ModelConfig, check_seed, create_network, load_weights, resolve_device
from ..layers import has_batch_statistics
from ..settings import flat_names, from_flat
from ..tasks import AWP, Objective, TrainingAttack
from ..tasks.objective import objective_from_flat

__all__ = [
    'build_criterion',
    'build_network',
    'check_arguments',
    'check_objective',
    'mixed_precision',
    'model_config',
    'resolve_lr',
]

_CHOICES = {
    'eval_metric': ('top1', 'top5', 'loss', 'robust_top1'),
    'amp_dtype': ('float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'dist_bn': ('broadcast', 'reduce', ''),
    'lr_base_scale': ('linear', 'sqrt', ''),
}


@dataclass(frozen=True)
class RobustTraining:
    """What is trained against: an objective, its attack, and AWP."""
    objective: Objective
    attack: TrainingAttack
    awp: AWP


def check_objective(args: argparse.Namespace) -> RobustTraining:
    """Refuse what can be refused of objective and robust validation, whatever loop they go into.

    Raises:
        InputError: Naming the flag.
    """
    values = vars(args)
    objective = objective_from_flat(values)
    attack = from_flat(TrainingAttack, values, TrainingAttack.prefix)
    awp = from_flat(AWP, values, AWP.prefix)
    names = {f'{part}.{name}': flat for part, cls, prefix in (
        ('objective', type(objective), objective.flat_prefix()), ('attack', TrainingAttack, 'attack'),
        ('awp', AWP, 'awp')) for name, flat in flat_names(cls, prefix).items()}
    try:
        objective.check_attack(attack)
        objective.check_run(args)
        if attack.eps_warmup_epochs > args.epochs:
            raise InputError('longer than training', f'choose at most `epochs={args.epochs}`',
                             argument='attack.eps_warmup_epochs', value=attack.eps_warmup_epochs)
        if awp.gamma and not objective.crafts:
            raise InputError(f'perturbs weights against crafted images, of which {objective.name} has none',
                             'leave it out', argument='awp.gamma', value=awp.gamma)
        if awp.gamma and awp.start_epoch >= args.epochs:
            raise InputError(f'training ends before, after {args.epochs} epochs', 'begin earlier',
                             argument='awp.start_epoch', value=awp.start_epoch)
    except InputError as error:
        raise error.renamed(names) from error
    if args.robust_eval_steps < 0:
        raise InputError('must not be negative', argument='robust_eval_steps', value=args.robust_eval_steps)
    if args.robust_eval_steps:
        check_at_least('robust_eval_samples', args.robust_eval_samples)
    if args.eval_metric == 'robust_top1' and not (args.robust_eval_steps and args.val_split):
        raise InputError('needs `val_split` and robust validation', 'pass `robust_eval_steps=10`',
                         argument='eval_metric', value='robust_top1')
    return RobustTraining(objective, attack, awp)


def check_arguments(args: argparse.Namespace) -> RobustTraining:
    """Refuse what can be refused before anything is built.

    Raises:
        InputError: Naming the flag.
    """
    _check_data(args)
    options = check_objective(args)
    for name in ('batch_size', 'epochs', 'grad_accum_steps', 'val_interval', 'log_interval', 'checkpoint_hist'):
        check_at_least(name, getattr(args, name))
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(args, name), choices)
    check_seed(args.seed)
    args.device = resolve_device(args.device)
    return options


def _check_data(args: argparse.Namespace) -> None:
    """Refuse what contradicts a padded crop, or validation images held out of the training data."""
    check_range('val_fraction', args.val_fraction, 0, 0.5)
    if args.val_fraction:
        if args.val_split not in ('', 'validation', args.train_split):
            raise InputError('holds images out of the training data, and `val_split` names other ones',
                             'leave one of them out', argument='val_fraction', value=args.val_fraction)
        args.val_split = args.train_split
    if not args.crop_padding:
        return
    check_at_least('crop_padding', args.crop_padding, 0)
    for name, others in (('train_crop_mode', None), ('no_aug', False), ('scale', [0.08, 1.0]),
                         ('ratio', [3. / 4., 4. / 3.])):
        if getattr(args, name) not in (others, others and tuple(others), None):
            raise InputError(f'shifts the image as it is, and `{name}` crops otherwise', 'leave one of them out',
                             argument='crop_padding', value=args.crop_padding)
    if args.objective == 'nofrost_star':
        raise InputError('the views of nofrost_star have crops of their own', 'leave it out',
                         argument='crop_padding', value=args.crop_padding)


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Settings of the network; `InputError` if they are none."""
    return ModelConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(ModelConfig)})


def build_network(args: argparse.Namespace) -> nn.Module:
    """The model of the arguments, with weights and memory options, on the CPU."""
    model = create_network(
        model_config(args), pretrained=args.pretrained, adapt=True, drop_rate=args.drop, drop_path_rate=args.drop_path)
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint, argument='initial_checkpoint')
    if args.batch_size == 1 and has_batch_statistics(model, training=True):
        raise InputError(
            f'--batch-size 1: {args.model} normalizes by the statistics of the batch, choose at least 2')
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except AssertionError as error:
            raise InputError(f'--grad-checkpointing: {args.model} does not support it, leave it out') from error
    return model


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


def resolve_lr(args: argparse.Namespace) -> None:
    """Set --lr from --lr-base and the global batch size, by timm's rule."""
    if args.lr:
        return
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def mixed_precision(args: argparse.Namespace, device: torch.device):
    """Autocast context and loss scaler."""
    if not args.amp:
        return nullcontext, None
    low = torch.bfloat16 if args.amp_dtype == 'bfloat16' or device.type == 'cpu' else torch.float16
    scaler = NativeScaler(device=device.type) if low == torch.float16 else None
    return partial(torch.autocast, device_type=device.type, dtype=low), scaler
