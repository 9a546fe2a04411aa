"""`timm-robust train`: timm's training flags and ours, from the fields of `TrainConfig`."""
import os
from typing import List

from ..training import TrainConfig, train
from .arguments import SettingsParser, start_logging
from .flags import add_flags, add_objective_flags
from .outputs import print_next

__all__ = ['build_parser', 'read_config', 'run']


def build_parser() -> SettingsParser:
    """The parser of `timm-robust train`."""
    parser = SettingsParser(
        data=True, prog='timm-robust train', description='Train a timm model to be robust against adversarial images.',
        examples=(
            'timm-robust train "my data" --model resnet18 --pretrained --objective trades --epochs 30',
            'timm-robust train "my data" --model nofrost_resnet26 --objective nofrost --attack-eps 4/255 --amp',
            'timm-robust train -c recipe.yaml --data-dir "my data" --resume output/train/mine/last.pth.tar'),
        first=(
            'config', 'objective', 'adv_weight', 'trades_beta', 'attack', 'attack_norm', 'attack_eps', 'attack_steps',
            'robust_eval_steps', 'data_dir', 'dataset', 'val_split', 'val_fraction', 'model', 'pretrained',
            'num_classes', 'img_size', 'device', 'epochs', 'batch_size', 'lr', 'opt', 'weight_decay', 'warmup_epochs',
            'amp', 'model_ema', 'eval_metric', 'workers', 'seed', 'resume', 'output', 'experiment'))
    add_objective_flags(parser)
    add_flags(parser, TrainConfig)
    return parser


def read_config(argv: List[str]) -> TrainConfig:
    """The settings of a command line; flags override the file of -c."""
    return TrainConfig.from_flat(build_parser().read(argv))


def run(argv: List[str]) -> None:
    """Train, and print the command that evaluates the result."""
    config = read_config(argv)
    start_logging()
    result = train(config)
    if int(os.environ.get('RANK', 0)):
        return
    threat = {'norm': config.attack.norm, 'eps': config.attack.eps} if config.objective.crafts else {}
    # never the training split, even if validation images were held out of it
    split = '' if config.val_split in ('validation', config.train_split) else config.val_split
    network = {'model': str(result.export)} if result.gamma in (None, 0, 1) else {
        'model': config.model, 'checkpoint': str(result.output_dir / 'model_best.pth.tar'), 'gamma': result.gamma}
    print_next('eval', {
        **network, **threat, 'attacks': 'clean,pgd20,autoattack', 'dataset': config.dataset,
        'class_map': config.class_map, 'split': split,
    }, [config.data_dir] if config.data_dir else [])
