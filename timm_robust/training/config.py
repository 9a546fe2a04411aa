"""The settings of a training run: one object for Python, command line and YAML, checked in one place."""
import math
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import yaml
from timm.data import create_transform

from ..errors import InputError, check_at_least, check_choice, check_range
from ..inputs import DatasetConfig, ModelConfig, check_seed, read_yaml, resolve_device
from ..inputs.network import INTERPOLATIONS
from ..settings import setting
from ..tasks import NoFrostStar
from ..tasks.objective import mixes_images
from .robust import RobustConfig

__all__ = ['TrainConfig']

_CHOICES: Dict[str, Tuple[str, ...]] = {
    'eval_metric': ('top1', 'top5', 'loss', 'robust_top1'),
    'amp_dtype': ('float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'dist_bn': ('broadcast', 'reduce', ''),
    'lr_base_scale': ('linear', 'sqrt', ''),
    'train_size_schedule': ('constant', 'progressive'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'remode': ('const', 'rand', 'pixel'),
    'train_crop_mode': ('rrc', 'rkrc', 'rkrr'),
    'train_interpolation': ('random', *INTERPOLATIONS),
    'worker_seeding': ('all', 'part'),
}
# names of settings by the range of their values
_SHARES = (
    'hflip', 'vflip', 'reprob', 'smoothing', 'drop', 'drop_path', 'mixup_prob', 'mixup_switch_prob', 'momentum',
    'model_ema_decay', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'bce_target_thresh',
    'train_size_random_mix')
_NOT_NEGATIVE = (
    'mixup', 'cutmix', 'weight_decay', 'color_jitter', 'min_lr', 'warmup_lr', 'decay_rate', 'bce_pos_weight',
    'layer_decay_min_scale', 'train_size_schedule_spread')
_ABOVE_0 = ('lr', 'lr_base', 'clip_grad', 'layer_decay', 'opt_eps', 'decay_epochs', 'lr_cycle_mul')
_SCALE, _RATIO = (0.08, 1.0), (3. / 4., 4. / 3.)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig, DatasetConfig, RobustConfig):
    """Settings of `train`, with the names, meanings and defaults of timm's train.py.

    Augmentation splits (AugMix, JSD loss, split BN), NaFlex loading and distillation are left to timm's own script.

    Raises:
        InputError: Naming the argument, on a value of the wrong type, out of range, or in conflict with another.

    Examples:

        ```python
        TrainConfig(model='resnet18', data_dir='my data', objective=TRADES(beta=3.), attack=TrainingAttack(eps='4/255'))
        ```
    """
    train_split: str = setting('train', 'train split', metavar='NAME', group='Dataset parameters')
    val_split: str = setting('validation', "validation split, '' for none", metavar='NAME')
    val_fraction: float = setting(
        0., 'validate on this fraction of the train split, held out of training, instead of --val-split '
        '(class-balanced, chosen by --seed)', metavar='F')
    train_num_samples: Optional[int] = setting(None, 'samples in the train split, for iterable datasets', metavar='N')
    val_num_samples: Optional[int] = setting(
        None, 'samples in the validation split, for iterable datasets', metavar='N')
    no_prefetcher: bool = setting(False, 'disable fast prefetcher')
    worker_seeding: str = setting('all', 'worker seed mode')

    initial_checkpoint: str = setting(
        '', 'load this checkpoint into the model', metavar='PATH', group='Model parameters')
    resume: str = setting('', 'resume full training state from a checkpoint', metavar='PATH')
    batch_size: int = setting(128, 'batch size', short='-b', metavar='N')
    validation_batch_size: Optional[int] = setting(None, 'validation batch size override', short='-vb', metavar='N')
    grad_accum_steps: int = setting(1, 'gradient accumulation steps', metavar='N')
    grad_checkpointing: bool = setting(False, 'gradient checkpointing')
    torchcompile: Optional[str] = setting(None, 'compile with this backend', metavar='BACKEND', const='inductor')
    torchcompile_mode: Optional[str] = setting(None, 'torch.compile mode')
    amp: bool = setting(False, 'mixed precision training (bfloat16 on a CPU)')
    amp_dtype: str = setting('float16', 'AMP dtype, float16 or bfloat16')
    no_ddp_bb: bool = setting(False, 'no broadcast of buffers in DDP')

    opt: str = setting('sgd', 'optimizer', metavar='OPTIMIZER', group='Optimizer parameters')
    opt_eps: Optional[float] = setting(None, 'optimizer epsilon (default: depends on the optimizer)', metavar='EPSILON')
    opt_betas: Optional[Tuple[float, ...]] = setting(
        None, 'optimizer betas (default: depends on the optimizer)', metavar='BETA')
    momentum: float = setting(0.9, 'momentum', metavar='M')
    weight_decay: float = setting(2e-5, 'weight decay')
    clip_grad: Optional[float] = setting(None, 'clip gradients at this value (default: no clipping)', metavar='NORM')
    clip_mode: str = setting('norm', 'gradient clipping mode: norm, value or agc')
    layer_decay: Optional[float] = setting(None, 'layer-wise learning rate decay (default: none)')
    layer_decay_min_scale: float = setting(0., 'smallest scale of layer-wise decay')
    layer_decay_no_opt_scale: Optional[float] = setting(None, 'freeze layers below this scale (default: none)')
    opt_kwargs: Dict[str, Any] = setting({}, 'further arguments of the optimizer', metavar='KEY=VALUE')

    sched: str = setting('cosine', 'LR scheduler', metavar='SCHEDULER', group='Learning rate schedule parameters')
    sched_on_updates: bool = setting(False, 'step the scheduler on updates, not epochs')
    lr: Optional[float] = setting(
        None, 'learning rate (default: lr_base * global_batch_size / lr_base_size)', metavar='LR')
    lr_base: float = setting(0.1, 'learning rate for a batch of lr_base_size', metavar='LR')
    lr_base_size: int = setting(256, 'batch size that lr_base is for', metavar='DIV')
    lr_base_scale: str = setting('', 'linear or sqrt scaling of lr_base (default: by optimizer)', metavar='SCALE')
    lr_noise: Optional[Tuple[float, ...]] = setting(
        None, 'LR noise on/off epoch percentages (default: no noise)', metavar='PCT')
    lr_noise_pct: float = setting(0.67, 'LR noise limit percent', metavar='PERCENT')
    lr_noise_std: float = setting(1.0, 'LR noise std-dev', metavar='STDDEV')
    lr_cycle_mul: float = setting(1.0, 'LR cycle length multiplier', metavar='MULT')
    lr_cycle_decay: float = setting(0.5, 'amount to decay each LR cycle', metavar='MULT')
    lr_cycle_limit: int = setting(1, 'LR cycle limit', metavar='N')
    lr_k_decay: float = setting(1.0, 'LR k-decay for cosine and poly')
    warmup_lr: float = setting(1e-5, 'warmup lr', metavar='LR')
    min_lr: float = setting(0., 'lower lr bound', metavar='LR')
    epochs: int = setting(300, 'epochs to train', metavar='N')
    start_epoch: Optional[int] = setting(
        None, 'first epoch (default: 0, or the next one of a resumed run)', metavar='N')
    epoch_repeats: float = setting(0., 'repeats of the data set in an epoch, for iterable datasets', metavar='N')
    decay_milestones: Tuple[int, ...] = setting(
        (90, 180, 270), 'decay epochs of the multistep schedule', metavar='MILESTONES')
    decay_epochs: float = setting(90., 'epoch interval to decay LR', metavar='N')
    warmup_epochs: int = setting(5, 'lr warmup epochs', metavar='N')
    warmup_prefix: bool = setting(False, 'exclude warmup from the decay schedule')
    cooldown_epochs: int = setting(0, 'epochs to cool down LR at min_lr', metavar='N')
    patience_epochs: int = setting(10, 'patience epochs of the plateau schedule', metavar='N')
    decay_rate: float = setting(0.1, 'LR decay rate', short='--dr', metavar='RATE')

    no_aug: bool = setting(
        False, 'disable all training augmentation', group='Augmentation and regularization parameters')
    train_crop_mode: Optional[str] = setting(None, 'crop mode in train')
    crop_padding: int = setting(
        0, 'instead of a random resized crop, pad images by N black pixels and crop them at random to their original '
        'size; usual for 32x32 images (4 for CIFAR)', metavar='N')
    scale: Tuple[float, float] = setting(_SCALE, 'random resize scale', metavar='PCT')
    ratio: Tuple[float, float] = setting(_RATIO, 'random resize aspect ratio', metavar='RATIO')
    hflip: float = setting(0.5, 'horizontal flip probability')
    vflip: float = setting(0., 'vertical flip probability')
    color_jitter: float = setting(0.4, 'color jitter', metavar='PCT')
    color_jitter_prob: Optional[float] = setting(None, 'probability of color jitter (default: always)', metavar='PCT')
    grayscale_prob: Optional[float] = setting(None, 'probability of grayscale (default: never)', metavar='PCT')
    gaussian_blur_prob: Optional[float] = setting(None, 'probability of gaussian blur (default: never)', metavar='PCT')
    aa: Optional[str] = setting(None, 'AutoAugment policy (default: none)', metavar='NAME')
    aug_repeats: float = setting(0., 'augmentation repetitions (distributed only)')
    reprob: float = setting(0., 'random erase probability', metavar='PCT')
    remode: str = setting('pixel', 'random erase mode')
    recount: int = setting(1, 'random erase count')
    mixup: float = setting(0., 'mixup alpha, enabled if > 0')
    cutmix: float = setting(0., 'cutmix alpha, enabled if > 0')
    cutmix_minmax: Optional[Tuple[float, float]] = setting(
        None, 'cutmix min/max ratio, overrides alpha and enables cutmix (default: none)')
    mixup_prob: float = setting(1., 'probability of mixup or cutmix')
    mixup_switch_prob: float = setting(0.5, 'probability of cutmix where both are enabled')
    mixup_mode: str = setting('batch', 'batch, pair or elem')
    mixup_off_epoch: int = setting(0, 'turn mixup off after this epoch, never if 0', metavar='N')
    smoothing: float = setting(0.1, 'label smoothing')
    bce_loss: bool = setting(False, 'BCE loss')
    bce_sum: bool = setting(False, 'sum over classes in the BCE loss')
    bce_target_thresh: Optional[float] = setting(None, 'threshold of softened BCE targets (default: none)')
    bce_pos_weight: Optional[float] = setting(None, 'positive weighting of the BCE loss (default: none)')
    train_interpolation: str = setting('random', 'training interpolation')
    drop: float = setting(0., 'dropout rate', metavar='PCT')
    drop_path: Optional[float] = setting(None, 'drop path rate (default: depends on the model)', metavar='PCT')
    sync_bn: bool = setting(False, 'synchronize BatchNorm and RobustNorm')
    dist_bn: str = setting('reduce', "running statistics after each epoch: broadcast, reduce, '' for neither")

    model_ema: bool = setting(
        False, 'track a moving average of the weights', group='Model exponential moving average parameters')
    model_ema_force_cpu: bool = setting(False, 'keep the average on the CPU; it is then neither validated nor exported')
    model_ema_decay: float = setting(0.9998, 'decay factor of the average')
    model_ema_warmup: bool = setting(False, 'warm up the decay factor')

    seed: int = setting(42, 'random seed', metavar='S', group='Miscellaneous parameters')
    log_interval: int = setting(50, 'batches between log lines', metavar='N')
    val_interval: int = setting(1, 'epochs between validations', metavar='N')
    recovery_interval: int = setting(0, 'updates between recovery checkpoints within an epoch, none if 0', metavar='N')
    checkpoint_hist: int = setting(10, 'checkpoints to keep', metavar='N')
    output: str = setting('', 'output folder (default: ./output/train)', metavar='PATH')
    experiment: str = setting('', 'name of the sub-folder for output (default: time and model)', metavar='NAME')
    eval_metric: str = setting(
        'top1', 'metric of the best checkpoint: top1, top5, loss or robust_top1', metavar='METRIC')
    train_img_sizes: Optional[Tuple[int, ...]] = setting(
        None, 'per-batch square image sizes for scheduled resolution training', metavar='N',
        group='Scheduled resolution parameters')
    train_batch_sizes: Optional[Tuple[int, ...]] = setting(
        None, 'batch size for each of --train-img-sizes (default: --batch-size)', metavar='N')
    train_size_probs: Optional[Tuple[float, ...]] = setting(
        None, 'sampling weight of each of --train-img-sizes (default: uniform)', metavar='P')
    train_size_schedule: str = setting(
        'constant', 'constant, or progressive: from the first of --train-img-sizes to the last', metavar='NAME')
    train_size_schedule_spread: float = setting(
        0.65, 'width of the progressive schedule, in sizes', metavar='STDDEV')
    train_size_random_mix: float = setting(
        0.1, 'fraction of uniformly random sizes in a progressive schedule', metavar='PCT')
    log_wandb: bool = setting(False, 'log training and validation metrics to wandb')
    wandb_project: Optional[str] = setting(None, 'wandb project name, also used by trackio', metavar='NAME')
    wandb_tags: Tuple[str, ...] = setting((), 'wandb tags', metavar='TAG')
    wandb_resume_id: str = setting('', 'if resuming a run, the id of the run in wandb', metavar='ID')
    log_trackio: bool = setting(False, 'log training and validation metrics to trackio')
    log_tensorboard: bool = setting(
        False, 'write training and validation metrics for TensorBoard to the folder of the run')

    def __post_init__(self) -> None:
        for base in (ModelConfig, DatasetConfig, RobustConfig):
            base.__post_init__(self)
        for name in ('batch_size', 'epochs', 'grad_accum_steps', 'val_interval', 'log_interval', 'checkpoint_hist',
                     'lr_base_size'):
            check_at_least(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        for names, high in ((_SHARES, 1.), (_NOT_NEGATIVE, math.inf), (_ABOVE_0, math.inf)):
            for name in names:
                if getattr(self, name) is not None:
                    check_range(name, getattr(self, name), 0, high, open_low=names is _ABOVE_0)
        for name in ('scale', 'ratio', 'cutmix_minmax'):
            pair = getattr(self, name)
            if pair is not None and not 0 < pair[0] <= pair[1] < math.inf:
                raise InputError('must be two ascending numbers above 0', argument=name, value=pair)
        if self.cutmix_minmax and self.cutmix_minmax[1] > 1:
            raise InputError('must be shares of an image, at most 1', argument='cutmix_minmax',
                             value=self.cutmix_minmax)
        if self.opt_betas and len(self.opt_betas) < 2:
            raise InputError('needs at least two numbers', argument='opt_betas', value=self.opt_betas)
        if self.validation_batch_size is not None:
            check_at_least('validation_batch_size', self.validation_batch_size)
        check_seed(self.seed)
        resolve_device(self.device)
        if self.torchcompile:
            try:
                torch.compile(nn.Identity(), backend=self.torchcompile, mode=self.torchcompile_mode)
            except RuntimeError as error:
                raise InputError(f'does not compile ({error})', argument='torchcompile', value=self.torchcompile
                                 ) from error
        if self.wandb_resume_id and not self.resume:
            raise InputError('continues the log of a resumed run', 'give its checkpoint as `resume`',
                             argument='wandb_resume_id', value=self.wandb_resume_id)
        self._check_schedule()
        self._check_data()
        self._check_img_sizes()
        self.check_run(self)
        if self.eval_metric == 'robust_top1' and not self.validates:
            raise InputError('needs validation data', 'name its split in `val_split`', argument='eval_metric',
                             value='robust_top1')

    @property
    def validates(self) -> bool:
        """Whether there is validation data."""
        return bool(self.val_split or self.val_fraction)

    def _check_schedule(self) -> None:
        check_at_least('warmup_epochs', self.warmup_epochs, 0)
        check_at_least('recovery_interval', self.recovery_interval, 0)
        if self.start_epoch is not None:
            check_at_least('start_epoch', self.start_epoch, 0)
        if self.sched != 'none' and not self.warmup_prefix and self.warmup_epochs >= self.epochs:
            raise InputError(
                f'warm-up would last until training ends, after `epochs={self.epochs}`',
                f'choose less than {self.epochs}', argument='warmup_epochs', value=self.warmup_epochs)

    def _check_data(self) -> None:
        check_range('val_fraction', self.val_fraction, 0, 0.5)
        if self.val_fraction and self.val_split not in ('', 'validation', self.train_split):
            raise InputError('holds images out of the training data, but `val_split` names other images',
                             'remove one of them', argument='val_fraction', value=self.val_fraction)
        if mixes_images(self) and self.batch_size % 2:
            raise InputError('timm mixes pairs of images', 'choose an even number', argument='batch_size',
                             value=self.batch_size)
        if self.aa is not None:
            try:
                create_transform(32, is_training=True, auto_augment=self.aa)
            except (AssertionError, ValueError, TypeError, KeyError) as error:
                raise InputError(f'is not a policy of timm ({error})', argument='aa', value=self.aa) from error
        check_at_least('crop_padding', self.crop_padding, 0)
        if not self.crop_padding:
            return
        for name, default in (('train_crop_mode', None), ('no_aug', False), ('scale', _SCALE), ('ratio', _RATIO)):
            if getattr(self, name) != default:
                raise InputError(f'shifts whole images, but `{name}` crops differently', 'remove one of them',
                                 argument='crop_padding', value=self.crop_padding)
        if isinstance(self.objective, NoFrostStar):
            raise InputError('the views of nofrost_star define their own crops', 'remove it',
                             argument='crop_padding', value=self.crop_padding)

    def _check_img_sizes(self) -> None:
        sizes = self.train_img_sizes or ()
        for name in ('train_img_sizes', 'train_batch_sizes'):
            for number in getattr(self, name) or ():
                check_at_least(name, number)
        for name in ('train_batch_sizes', 'train_size_probs'):
            if len(getattr(self, name) or sizes) != len(sizes):
                raise InputError('needs a value for each of `train_img_sizes`', argument=name,
                                 value=getattr(self, name))
        if self.train_size_probs and not (min(self.train_size_probs) >= 0 < sum(self.train_size_probs) < math.inf):
            raise InputError('must be weights of at least 0, not all of them 0', argument='train_size_probs',
                             value=self.train_size_probs)
        if self.train_size_schedule == 'progressive' and len(sizes) < 2:
            raise InputError('needs at least two sizes', 'name them in `train_img_sizes`',
                             argument='train_size_schedule', value='progressive')
        if mixes_images(self) and any(size % 2 for size in self.train_batch_sizes or ()):
            raise InputError('timm mixes pairs of images', 'choose even numbers', argument='train_batch_sizes',
                             value=self.train_batch_sizes)
        if sizes and self.crop_padding:
            raise InputError('crops images to several sizes, but `crop_padding` uses one', 'remove one',
                             argument='train_img_sizes', value=sizes)

    @classmethod
    def from_yaml(cls, path: str) -> 'TrainConfig':
        """Settings from a YAML file of flat names, such as the args.yaml of a run.

        Raises:
            InputError: If the file cannot be read, has a duplicate or unknown name, or a bad value.
        """
        return cls.from_flat(read_yaml(path))

    def to_yaml(self) -> str:
        """All settings as YAML that `from_yaml` reads back."""
        return yaml.safe_dump(self.to_flat(), default_flow_style=False)
