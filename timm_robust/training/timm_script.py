"""timm's own train.py, with the objectives of this package.

The user's file is loaded unchanged. Its parser, loaders, classification task and validation are then wrapped with ours;
without `--objective` and `--robust-eval-steps` the wrappers do nothing.
"""
import argparse
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Tuple

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..attacks import InputSpace
from ..errors import InputError
from ..tasks import RobustTask
from .build import build_teacher
from .data import robust_subset
from .loop import validate_robust
from .robust import RobustConfig

__all__ = ['TimmScript', 'load_script']

_logger = logging.getLogger(__name__)
_SEAMS = (
    'parser', '_parse_args', 'create_model', 'create_loader', 'ClassificationTask', 'train_one_epoch', 'validate',
    'main')
# flags of train.py that define their own tasks or batch layout
_OTHER_TASKS = ('kd_model_name', 'naflex_loader', 'jsd_loss', 'aug_splits', 'split_bn', 'model_dtype', 'torchscript')
_NOT_ATTACKED = ('kd_model_name', 'naflex_loader', 'model_dtype')


def load_script(path: str) -> ModuleType:
    """Load a train.py as a module, without running its `main`.

    Raises:
        InputError: If there is no such file, or its loop does not use tasks.
    """
    if not Path(path).is_file():
        raise InputError(f'{path}: no such file', 'name the train.py of a checkout of timm')
    spec = importlib.util.spec_from_file_location('timm_train', path)
    if spec is None or spec.loader is None:
        raise InputError(f'{path}: is not a Python file', 'name the train.py of a checkout of timm')
    script = importlib.util.module_from_spec(spec)
    sys.modules['timm_train'] = script  # loader workers look for it there
    sys.path.insert(0, str(Path(path).resolve().parent))  # as python does for scripts
    try:
        spec.loader.exec_module(script)
    except ImportError as error:
        reason = ' '.join(str(error).split())
        raise InputError(
            f'{path}: cannot be imported ({reason})', 'install the version of timm it belongs to') from error
    lacking = [name for name in _SEAMS if not hasattr(script, name)]
    if lacking:
        raise InputError(
            f"{path}: is not a supported train.py, it has no {', '.join(lacking)}; timm's train.py has used tasks "
            'since 1.0.23')
    return script


class TimmScript:
    """Replaces parts of a train.py with ours.

    Args:
        script: The loaded train.py, changed in place.
        add_flags: Adds the flags of `RobustConfig` to a parser, under its flat names, with None as their default.
    """

    def __init__(self, script: ModuleType, add_flags: Callable[[argparse.ArgumentParser], None]):
        self.script = script
        self.original: Dict[str, Any] = {name: getattr(script, name) for name in _SEAMS}
        self.evaluation: Any = None
        add_flags(self.script.parser)
        for name, ours in {
                '_parse_args': self.parse_args,
                'create_model': self.create_model,
                'create_loader': self.create_loader,
                'ClassificationTask': self.create_task,
                'validate': self.validate,
                'train_one_epoch': self.train_one_epoch,
        }.items():
            setattr(script, name, ours)

    def parse_args(self) -> Tuple[argparse.Namespace, str]:
        """Parse the script's arguments and ours, and check them."""
        args, text = self.original['_parse_args']()
        self.args = args
        values = {name: getattr(args, name, None) for name in RobustConfig.all_flat_names()}
        self.config = RobustConfig.from_flat({k: v for k, v in values.items() if v is not None}, run=args)
        objective = self.config.objective.name
        for ours, active, others in (
                (f'`objective={objective!r}`', objective != 'standard', _OTHER_TASKS),
                (f'`robust_eval_steps={self.config.robust_eval_steps}`', self.config.robust_eval_steps, _NOT_ATTACKED)):
            for name in others if active else ():
                if getattr(args, name, None):
                    raise InputError(f'is incompatible with {ours}', 'remove one of them', argument=name,
                                     value=getattr(args, name))
        if args.eval_metric == 'robust_top1' and not args.val_split:
            raise InputError('needs validation data', 'name its split in `val_split`', argument='eval_metric',
                             value='robust_top1')
        if objective == 'mbnat' and getattr(args, 'sync_bn', False):
            raise InputError('train.py would undo the two BatchNorms of mbnat', 'use timm-robust train',
                             argument='sync_bn', value=True)
        return args, text

    def create_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The script's network, prepared for the objective."""
        return self.config.objective.prepare_model(self.original['create_model'](*args, **kwargs))

    def create_loader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """The script's loader; for robust validation a second one is created."""
        if is_training:
            self.teacher = build_teacher(
                self.config.teacher, dataset, kwargs['input_size'], kwargs['device'],
                channels_last=self.args.channels_last)
            dataset = self.config.objective.prepare_dataset(
                dataset, kwargs['input_size'][1:], kwargs.get('hflip', 0.5))
        loader = self.original['create_loader'](dataset, *args, is_training=is_training, **kwargs)
        if is_training:
            self.loader = loader
        elif self.config.robust_eval_steps:
            # the call above has set the transform of the data set
            subset = robust_subset(dataset, self.config.robust_eval_samples, self.args.seed)
            self.evaluation = self.original['create_loader'](subset, *args, is_training=False, **kwargs)
        self.space = InputSpace(kwargs['mean'], kwargs['std'])
        return loader

    def create_task(self, model: torch.nn.Module, criterion: Any, **kwargs: Any) -> TrainingTask:
        """The task of the objective; for 'standard' the script's own."""
        config = self.config
        if config.warning and kwargs.get('verbose', True):
            _logger.warning(config.warning)
        self.task: TrainingTask
        if config.objective.name == 'standard':
            self.task = self.original['ClassificationTask'](model, criterion, **kwargs)
        else:
            self.task = config.objective.create_task(
                model, criterion, attack=config.attack, awp=config.awp, teacher=self.teacher, space=self.space,
                steps_per_epoch=len(self.loader), seed=self.args.seed, **kwargs)
        return self.task

    def train_one_epoch(self, epoch: int, *args: Any, **kwargs: Any) -> Any:
        """The script's epoch; schedules within the task follow it also after `start_epoch` and recovery checkpoints."""
        if isinstance(self.task, RobustTask):
            self.task.step = epoch * len(self.loader)
        return self.original['train_one_epoch'](epoch, *args, **kwargs)

    def validate(
            self,
            model: torch.nn.Module,
            loader: Any,
            loss_fn: Any,
            args: argparse.Namespace,
            **kwargs: Any,
    ) -> Dict[str, float]:
        """The script's metrics, and `robust_top1`."""
        metrics = self.original['validate'](model, loader, loss_fn, args, **kwargs)
        if self.evaluation is not None:
            metrics.update(validate_robust(
                self.task, self.evaluation, self.config.attack.threat, self.space, self.config.robust_eval_steps,
                device=kwargs['device'], autocast=kwargs['amp_autocast'], seed=args.seed,
                ema=self._is_average(model), channels_last=args.channels_last, move_to_device=not args.prefetcher,
                distributed=args.distributed))
        return metrics

    def _is_average(self, model: torch.nn.Module) -> bool:
        average = self.task.get_trainable_module(ema=True)
        return average is not None and unwrap_model(model) is unwrap_model(average)
