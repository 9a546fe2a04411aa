"""`timm-robust timm-train TRAIN.PY ...`: timm's own training script, with the objectives of this package.

The user's file is loaded as it is. Where it looks up its parser, its loaders, its classification task and its
validation, it finds ours around its own; without `--objective` and `--robust-eval-steps` they do nothing.
"""
import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Tuple

import torch
from timm.utils import unwrap_model
from torch.utils.data import IterableDataset, Subset

from ..attacks import InputSpace
from ..data import balanced_indices, dataset_labels
from ..errors import InputError
from ..train.build import check_objective
from ..train.loop import validate_robust
from .arguments import add_robust_eval_arguments
from .flags import add_objective_flags

__all__ = ['Driver', 'load_script', 'run']

_SEAMS = ('parser', '_parse_args', 'create_model', 'create_loader', 'ClassificationTask', 'validate', 'main')
# switches of train.py whose batches or tasks are none of ours
_OTHER_TASKS = ('kd_model_name', 'naflex_loader', 'jsd_loss', 'aug_splits', 'split_bn', 'model_dtype', 'torchscript')
_NOT_ATTACKED = ('kd_model_name', 'naflex_loader', 'model_dtype')


def load_script(path: str) -> ModuleType:
    """Load a train.py as a module, without running its `main`.

    Raises:
        InputError: If there is no such file, or it has no loop of tasks.
    """
    if not Path(path).is_file():
        raise InputError(f'{path}: no such file, name the train.py of a checkout of timm')
    spec = importlib.util.spec_from_file_location('timm_train', path)
    if spec is None:
        raise InputError(f'{path}: is no Python file, name the train.py of a checkout of timm')
    script = importlib.util.module_from_spec(spec)
    sys.modules['timm_train'] = script  # where loader workers look for it
    sys.path.insert(0, str(Path(path).resolve().parent))  # as python does for a script
    try:
        spec.loader.exec_module(script)
    except ImportError as error:
        reason = ' '.join(str(error).split())
        raise InputError(f'{path}: cannot be imported ({reason}): install the timm it is of') from error
    lacking = [name for name in _SEAMS if not hasattr(script, name)]
    if lacking:
        raise InputError(
            f"{path}: is no train.py this can drive, it has no {', '.join(lacking)}; timm's has had a loop of tasks "
            'since 1.0.23')
    return script


class Driver:
    """Puts our parts where a train.py looks up its own.

    Args:
        script: The loaded train.py, changed in place.
    """

    def __init__(self, script: ModuleType):
        self.script, self.original = script, {name: getattr(script, name) for name in _SEAMS}
        self.task = self.evaluation = None
        add_objective_flags(script.parser)
        add_robust_eval_arguments(script.parser.add_argument_group('Robust validation parameters'))
        script._parse_args = self.parse_args
        script.create_model = self.create_model
        script.create_loader = self.create_loader
        script.ClassificationTask = self.create_task
        script.validate = self.validate

    def parse_args(self) -> Tuple[argparse.Namespace, str]:
        """The script's arguments and ours, checked."""
        args, text = self.original['_parse_args']()
        self.args, self.options = args, check_objective(args)
        trained, attacked = self.options.objective.name != 'standard', bool(args.robust_eval_steps)
        for ours, active, others in (
                (f'--objective {self.options.objective.name}', trained, _OTHER_TASKS),
                (f'--robust-eval-steps {args.robust_eval_steps}', attacked, _NOT_ATTACKED)):
            for name in others if active else ():
                if getattr(args, name, None):
                    raise InputError(
                        f"--{name.replace('_', '-')} {getattr(args, name)}: does not go with {ours}, leave one of them "
                        'out')
        if self.options.objective.name == 'mbnat' and getattr(args, 'sync_bn', False):
            raise InputError('--sync-bn: train.py would undo the two BatchNorms of mbnat, use timm-robust train')
        return args, text

    def create_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The script's network with what the objective needs."""
        return self.options.objective.prepare_model(self.original['create_model'](*args, **kwargs))

    def create_loader(self, dataset, *args: Any, is_training: bool = False, **kwargs: Any):
        """The script's loader; what it is made of is kept."""
        if is_training:
            dataset = self.options.objective.prepare_dataset(
                dataset, kwargs['input_size'][1:], kwargs.get('hflip', 0.5))
        loader = self.original['create_loader'](dataset, *args, is_training=is_training, **kwargs)
        if is_training:
            self.loader = loader
        elif self.args.robust_eval_steps:
            if isinstance(dataset, IterableDataset):
                raise InputError('--robust-eval-steps: needs a data set with an index, streaming data has none')
            count = min(self.args.robust_eval_samples, len(dataset))
            indices = balanced_indices(dataset_labels(dataset), len(dataset), count, seed=self.args.seed)
            # the data set has its transform by now
            self.evaluation = self.original['create_loader'](
                Subset(dataset, indices), *args, is_training=False, **kwargs)
        self.space = InputSpace(kwargs['mean'], kwargs['std'])
        return loader

    def create_task(self, model, criterion, **kwargs: Any):
        """The task of --objective; for 'standard' the script's own."""
        if self.options.objective.name == 'standard':
            self.task = self.original['ClassificationTask'](model, criterion, **kwargs)
        else:
            self.task = self.options.objective.create_task(
                model, criterion, attack=self.options.attack, awp=self.options.awp, space=self.space,
                steps_per_epoch=len(self.loader), seed=self.args.seed, **kwargs)
        return self.task

    def validate(self, model, loader, loss_fn, args: argparse.Namespace, **kwargs: Any) -> Dict[str, float]:
        """The script's metrics, and `robust_top1`."""
        metrics = self.original['validate'](model, loader, loss_fn, args, **kwargs)
        if self.evaluation is not None:
            metrics.update(validate_robust(
                self.task, self.evaluation, self.options.attack.threat, self.space, args.robust_eval_steps,
                device=kwargs['device'], autocast=kwargs['amp_autocast'], seed=args.seed,
                ema=self._is_average(model), channels_last=args.channels_last, move_to_device=not args.prefetcher,
                distributed=args.distributed))
        return metrics

    def _is_average(self, model: torch.nn.Module) -> bool:
        average = self.task.get_trainable_module(ema=True)
        return average is not None and unwrap_model(model) is unwrap_model(average)


def run(argv: List[str]) -> None:
    """Train with a train.py."""
    if not argv:
        raise InputError('name the train.py of a checkout of timm first')
    if argv[0] in ('-h', '--help'):
        print('usage: timm-robust timm-train /path/to/train.py [flags of train.py] [--objective ...]\n\n'
              '  --help after the path lists the flags of both')
        sys.exit(0)
    script = load_script(argv[0])
    Driver(script)
    sys.argv = argv
    script.main()
