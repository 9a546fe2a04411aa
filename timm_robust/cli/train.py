"""`timm-robust train`: timm's training flags and ours.

Names, meanings and defaults are those of timm's train.py for everything offered here. Left to timm's own script:
augmentation splits (AugMix, JSD loss, split BN), scheduled resolutions, NaFlex loading, distillation and wandb.
"""
from typing import List

from timm.utils import ParseKwargs

from .arguments import (
    Parser,
    add_data_arguments,
    add_model_arguments,
    add_robust_eval_arguments,
    apply_config,
    start_logging,
)
from .flags import add_objective_flags

__all__ = ['build_parser', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust train`."""
    parser = Parser(prog='timm-robust train', description='Train a timm model to withstand adversarial images.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for these flags')
    add_objective_flags(parser)
    add_robust_eval_arguments(parser.add_argument_group('Robust validation parameters'))

    group = add_data_arguments(parser)
    group.add_argument('--train-split', metavar='NAME', default='train', help='train split (default: train)')
    group.add_argument('--val-split', metavar='NAME', default='validation',
                       help='validation split (default: validation)')
    group.add_argument('--val-fraction', default=0., type=float, metavar='F',
                       help='hold this share of the train split out of training and validate on it, class-balanced '
                            'and by --seed, instead of --val-split (default: 0)')
    group.add_argument('--train-num-samples', default=None, type=int, metavar='N',
                       help='samples in the train split, for iterable datasets')
    group.add_argument('--val-num-samples', default=None, type=int, metavar='N',
                       help='samples in the validation split, for iterable datasets')
    group.add_argument('--no-prefetcher', action='store_true', help='disable fast prefetcher')
    group.add_argument('--worker-seeding', default='all', help='worker seed mode (default: all)')

    group = add_model_arguments(parser)
    group.add_argument('--initial-checkpoint', default='', metavar='PATH', help='load this checkpoint into the model')
    group.add_argument('--resume', default='', metavar='PATH', help='resume full training state from a checkpoint')
    group.add_argument('--gp', default=None, metavar='POOL', help='global pool type')
    group.add_argument('-vb', '--validation-batch-size', type=int, default=None, metavar='N',
                       help='validation batch size override')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='gradient accumulation steps')
    group.add_argument('--grad-checkpointing', action='store_true', help='gradient checkpointing')
    group.add_argument('--torchcompile', nargs='?', default=None, const='inductor', help='compile with this backend')
    group.add_argument('--torchcompile-mode', default=None, help='torch.compile mode')
    group.add_argument('--amp', action='store_true', help='mixed precision training (bfloat16 on a CPU)')
    group.add_argument('--amp-dtype', default='float16', help='AMP dtype, float16 or bfloat16 (default: float16)')
    group.add_argument('--no-ddp-bb', action='store_true', help='no broadcast of buffers in DDP')

    group = parser.add_argument_group('Optimizer parameters')
    group.add_argument('--opt', default='sgd', metavar='OPTIMIZER', help='optimizer (default: sgd)')
    group.add_argument('--opt-eps', default=None, type=float, metavar='EPSILON')
    group.add_argument('--opt-betas', default=None, type=float, nargs='+', metavar='BETA')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='momentum (default: 0.9)')
    group.add_argument('--weight-decay', type=float, default=2e-5, help='weight decay (default: 2e-5)')
    group.add_argument('--clip-grad', type=float, default=None, metavar='NORM', help='clip gradients at this value')
    group.add_argument('--clip-mode', default='norm', help='gradient clipping mode: norm, value or agc')
    group.add_argument('--layer-decay', type=float, default=None, help='layer-wise learning rate decay')
    group.add_argument('--layer-decay-min-scale', type=float, default=0)
    group.add_argument('--layer-decay-no-opt-scale', type=float, default=None)
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')

    group = parser.add_argument_group('Learning rate schedule parameters')
    group.add_argument('--sched', default='cosine', metavar='SCHEDULER', help='LR scheduler (default: cosine)')
    group.add_argument('--sched-on-updates', action='store_true', help='step the scheduler on updates, not epochs')
    group.add_argument('--lr', type=float, default=None, metavar='LR', help='learning rate, overrides lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='LR',
                       help='lr = lr_base * global_batch_size / lr_base_size (default: 0.1)')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='DIV')
    group.add_argument('--lr-base-scale', default='', metavar='SCALE', help='linear or sqrt, by optimizer if empty')
    group.add_argument('--lr-noise', type=float, nargs='+', default=None, metavar='PCT')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='PERCENT')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='STDDEV')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='MULT')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='MULT')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N')
    group.add_argument('--lr-k-decay', type=float, default=1.0)
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='warmup lr (default: 1e-5)')
    group.add_argument('--min-lr', type=float, default=0, metavar='LR', help='lower lr bound (default: 0)')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs to train (default: 300)')
    group.add_argument('--epoch-repeats', type=float, default=0., metavar='N')
    group.add_argument('--decay-milestones', default=[90, 180, 270], type=int, nargs='+', metavar='MILESTONES')
    group.add_argument('--decay-epochs', type=float, default=90, metavar='N')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='lr warmup epochs (default: 5)')
    group.add_argument('--warmup-prefix', action='store_true', help='exclude warmup from the decay schedule')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE')

    group = parser.add_argument_group('Augmentation and regularization parameters')
    group.add_argument('--no-aug', action='store_true', help='disable all training augmentation')
    group.add_argument('--train-crop-mode', default=None, help='crop mode in train')
    group.add_argument('--crop-padding', type=int, default=0, metavar='N',
                       help='pad images by N black pixels and cut their size out at random, the custom for 32x32 '
                            'images, instead of a random resized crop (4 for CIFAR; default: 0)')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT',
                       help='random resize scale (default: 0.08 1.0)')
    group.add_argument('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='RATIO',
                       help='random resize aspect ratio (default: 0.75 1.33)')
    group.add_argument('--hflip', type=float, default=0.5, help='horizontal flip probability (default: 0.5)')
    group.add_argument('--vflip', type=float, default=0., help='vertical flip probability')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='PCT', help='color jitter (default: 0.4)')
    group.add_argument('--color-jitter-prob', type=float, default=None, metavar='PCT')
    group.add_argument('--grayscale-prob', type=float, default=None, metavar='PCT')
    group.add_argument('--gaussian-blur-prob', type=float, default=None, metavar='PCT')
    group.add_argument('--aa', default=None, metavar='NAME', help='AutoAugment policy')
    group.add_argument('--aug-repeats', type=float, default=0, help='augmentation repetitions (distributed only)')
    group.add_argument('--reprob', type=float, default=0., metavar='PCT', help='random erase probability')
    group.add_argument('--remode', default='pixel', help='random erase mode (default: pixel)')
    group.add_argument('--recount', type=int, default=1, help='random erase count')
    group.add_argument('--mixup', type=float, default=0.0, help='mixup alpha, enabled if > 0')
    group.add_argument('--cutmix', type=float, default=0.0, help='cutmix alpha, enabled if > 0')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', default=None)
    group.add_argument('--mixup-prob', type=float, default=1.0)
    group.add_argument('--mixup-switch-prob', type=float, default=0.5)
    group.add_argument('--mixup-mode', default='batch', help='batch, pair or elem')
    group.add_argument('--mixup-off-epoch', default=0, type=int, metavar='N')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing (default: 0.1)')
    group.add_argument('--bce-loss', action='store_true', help='BCE loss')
    group.add_argument('--bce-sum', action='store_true', help='sum over classes in the BCE loss')
    group.add_argument('--bce-target-thresh', type=float, default=None)
    group.add_argument('--bce-pos-weight', type=float, default=None)
    group.add_argument('--train-interpolation', default='random', help='training interpolation (default: random)')
    group.add_argument('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=float, default=None, metavar='PCT', help='drop path rate')
    group.add_argument('--sync-bn', action='store_true', help='synchronize BatchNorm and RobustNorm')
    group.add_argument('--dist-bn', default='reduce', help='running statistics after each epoch: broadcast, reduce, ""')

    group = parser.add_argument_group('Model exponential moving average parameters')
    group.add_argument('--model-ema', action='store_true', help='track a moving average of the weights')
    group.add_argument('--model-ema-force-cpu', action='store_true',
                       help='track it on the CPU; it is neither validated nor exported')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay factor (default: 0.9998)')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm the decay up')

    group = parser.add_argument_group('Miscellaneous parameters')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed (default: 42)')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='batches between log lines')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep (default: 10)')
    group.add_argument('--output', default='', metavar='PATH', help='output folder (default: ./output/train)')
    group.add_argument('--experiment', default='', metavar='NAME', help='name of the sub-folder for output')
    group.add_argument('--eval-metric', default='top1', metavar='METRIC',
                       help='metric of the best checkpoint: top1, top5, loss or robust_top1 (default: top1)')
    return parser


def run(argv: List[str]) -> None:
    """Train."""
    parser = build_parser()
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    from ..train import run_training
    run_training(args)
