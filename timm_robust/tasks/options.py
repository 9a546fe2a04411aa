"""From command line flags to a training task."""
import argparse
import logging
import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence, Type

import torch.nn as nn
from timm.task import ClassificationTask, TrainingTask

from ..attacks import ATTACKS, InputSpace, ThreatModel, friendly_pgd, nofrost_step_size
from ..attacks.context import NORM_MODES
from ..attacks.threat import NORMS
from ..data.augment import ViewsDataset
from ..errors import InputError, check_choice
from ..layers import NormPerturbation, convert_aux_norm, has_batch_statistics, set_gamma
from .adversarial import AdversarialTask
from .apart import ApartTask
from .base import RobustTask
from .fat import FriendlyTask, TradesFriendlyTask
from .mbnat import MbnatTask
from .nofrost_star import NoFrostStarTask
from .trades import TradesTask

__all__ = ['OBJECTIVES', 'TRAIN_ATTACKS', 'ObjectiveOptions', 'add_objective_arguments', 'create_task']

_logger = logging.getLogger(__name__)

OBJECTIVES = ('standard', 'sat', 'nofrost', 'nofrost_star', 'trades', 'fat', 'trades_fat', 'mbnat', 'apart')
_TRADES, _FRIENDLY = ('trades', 'trades_fat'), ('fat', 'trades_fat')
_TRADES_START_STD = 1e-3  # of the authors' code
TRAIN_ATTACKS = ('fgsm', 'fgsm_rs', 'bim', 'pgd', 'mim', 'cw_linf')


@dataclass
class ObjectiveOptions:
    """How to train and against which attack. Each field is a flag of the same name.

    Raises:
        InputError: On a value out of range; the message names the flag.
    """
    objective: str = 'standard'
    adv_weight: Optional[float] = None
    star_terms: Optional[int] = None
    deepaug_dirs: Sequence[str] = ()
    noise2net: bool = False
    trades_beta: float = 6.
    fat_tau_epochs: Sequence[float] = ()
    mbnat_gamma: Optional[float] = None
    apart_epsilon: float = 0.1
    apart_groups: int = 1
    apart_ratio: float = 1.
    attack: str = 'pgd'
    attack_norm: str = 'linf'
    attack_eps: str = '8/255'
    attack_eps_warmup_epochs: float = 0.
    attack_steps: int = 10
    attack_step_size: Optional[str] = None
    attack_random_start: Optional[bool] = None
    attack_bn_mode: str = 'eval'

    def __post_init__(self):
        check_choice('objective', self.objective, OBJECTIVES)
        check_choice('attack', self.attack, TRAIN_ATTACKS)
        check_choice('attack_norm', self.attack_norm, NORMS)
        check_choice('attack_bn_mode', self.attack_bn_mode, NORM_MODES)
        if self.adv_weight is None:
            self.adv_weight = 1. if self.objective == 'fat' else 0.5
        elif self.objective in _TRADES:
            raise InputError(
                f'--adv-weight {self.adv_weight}: --objective {self.objective} weighs by --trades-beta, leave it out')
        elif self.objective == 'nofrost_star':
            raise InputError(f'--adv-weight {self.adv_weight}: nofrost_star weighs all terms alike, leave it out')
        if not 0 <= self.adv_weight <= 1:
            raise InputError(f'--adv-weight {self.adv_weight}: must be in [0, 1]; 0.5 is NoFrost, 1 is Madry')
        if not 0 <= self.trades_beta < math.inf:
            raise InputError(f"--trades-beta {self.trades_beta}: must be a number of at least 0; 6 is the paper's")
        if isinstance(self.fat_tau_epochs, (int, float)):
            self.fat_tau_epochs = [self.fat_tau_epochs]
        if any(not 0 <= e < math.inf for e in self.fat_tau_epochs):
            raise InputError(f'--fat-tau-epochs {self.fat_tau_epochs}: must be numbers of at least 0')
        if self.fat_tau_epochs and self.objective not in _FRIENDLY:
            raise InputError(f'--fat-tau-epochs: is for --objective fat and trades_fat, not {self.objective}')
        if not 0 <= self.apart_epsilon < math.inf:
            raise InputError(f'--apart-epsilon {self.apart_epsilon}: must be a number of at least 0')
        if not isinstance(self.apart_groups, int) or self.apart_groups < 1:
            raise InputError(f'--apart-groups {self.apart_groups}: must be a whole number of at least 1')
        if not 0 < self.apart_ratio <= 1:
            raise InputError(
                f'--apart-ratio {self.apart_ratio}: must be in (0, 1], the share of a batch in the second pass')
        if self.mbnat_gamma is not None and self.objective != 'mbnat':
            raise InputError(f'--mbnat-gamma {self.mbnat_gamma}: is for --objective mbnat, not {self.objective}')
        if not 0 <= (self.mbnat_gamma or 0.) <= 1:
            raise InputError(
                f'--mbnat-gamma {self.mbnat_gamma}: must be in [0, 1]; 0 is the BatchNorm of clean images, 1 that of '
                'adversarial ones')
        if self.objective == 'mbnat' and self.adv_weight in (0, 1):
            raise InputError(
                f'--adv-weight {self.adv_weight}: leaves one BatchNorm of mbnat untrained, must be in (0, 1)')
        if self.objective in (*_TRADES, *_FRIENDLY):
            self._check_own_attack()
        if not isinstance(self.attack_steps, int) or self.attack_steps < 1:
            raise InputError(f'--attack-steps {self.attack_steps}: must be a whole number of at least 1')
        if not 0 <= self.attack_eps_warmup_epochs < math.inf:
            raise InputError(
                f'--attack-eps-warmup-epochs {self.attack_eps_warmup_epochs}: must be a number of at least 0')
        try:
            self.threat = ThreatModel(self.attack_norm, self.attack_eps)
        except InputError as error:
            raise InputError(f'--attack-eps {self.attack_eps}: {error}') from error
        self.step_size = None
        if self.attack_step_size is not None:
            try:
                self.step_size = ThreatModel('l2', self.attack_step_size).eps
            except InputError as error:
                raise InputError(f'--attack-step-size {self.attack_step_size}: {error}') from error
            if self.step_size == 0:
                raise InputError(f'--attack-step-size {self.attack_step_size}: must be positive, for example 2/255')
            if self.attack == 'fgsm':
                raise InputError(f'--attack-step-size {self.attack_step_size}: the step of fgsm is eps, leave it out')
        if self.attack_random_start is not None and self.attack not in ('pgd', 'cw_linf'):
            raise InputError(
                f'--attack-random-start is fixed by --attack {self.attack}: leave it out, or choose pgd or cw_linf')

        self._check_star()

    def _check_star(self) -> None:
        deep = bool(self.deepaug_dirs) + self.noise2net
        for flag, value in (('star-terms', self.star_terms), ('deepaug-dirs', ' '.join(self.deepaug_dirs)),
                            ('noise2net', self.noise2net)):
            if value and self.objective != 'nofrost_star':
                raise InputError(f'--{flag}: is for --objective nofrost_star, not {self.objective}')
        if deep == 2:
            raise InputError('--noise2net: stands in for --deepaug-dirs, leave one of them out')
        if self.star_terms is None:
            self.star_terms = 3 + deep
        if self.star_terms not in (3, 4):
            raise InputError(f"--star-terms {self.star_terms}: must be 3, the paper's, or 4, of the authors' code")
        if self.star_terms == 4 and not deep:
            raise InputError('--star-terms 4: needs deeply augmented images, --deepaug-dirs DIR or --noise2net')

    def _check_own_attack(self) -> None:
        if self.attack != 'pgd':
            raise InputError(f'--attack {self.attack}: --objective {self.objective} crafts by PGD, leave it out')
        if self.objective in _TRADES and self.attack_random_start is False:
            raise InputError(
                '--no-attack-random-start: the divergence of TRADES has no gradient at the clean image, leave it out')
        if self.attack_bn_mode != 'eval':
            raise InputError(
                f'--attack-bn-mode {self.attack_bn_mode}: --objective {self.objective} crafts in eval mode, leave it '
                'out')

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """What the objective needs of a network, before an optimizer or a wrapper gets hold of it.

        Raises:
            InputError: If the network does not have it.
        """
        if self.objective == 'mbnat':
            try:
                set_gamma(convert_aux_norm(model), self.mbnat_gamma or 0.)
            except ValueError as error:
                raise InputError(f'--objective mbnat: {error}') from error
        if self.objective == 'apart':
            try:
                NormPerturbation(model, self.apart_groups)
            except ValueError as error:
                raise InputError(f'--objective apart: {error}') from error
        return model

    def prepare_dataset(self, dataset: Any, img_size: Sequence[int], hflip: float) -> Any:
        """What the objective needs of training data, before a loader is made of it.

        Raises:
            InputError: If the data does not have it.
        """
        if self.objective != 'nofrost_star':
            return dataset
        return ViewsDataset(dataset, img_size, self.deepaug_dirs, one_view=self.star_terms == 3, hflip=hflip)

    @property
    def crafts(self) -> bool:
        """Whether the objective attacks images."""
        return self.objective not in ('standard', 'apart')

    @property
    def compares_labels(self) -> bool:
        """Whether the objective needs one label for each image."""
        return self.objective in _FRIENDLY

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> 'ObjectiveOptions':
        """Take the fields out of parsed arguments."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls)})

    def check_schedule(self, epochs: int) -> None:
        """Refuse a warm-up that outlasts training."""
        if self.attack_eps_warmup_epochs > epochs:
            raise InputError(
                f'--attack-eps-warmup-epochs {self.attack_eps_warmup_epochs:g}: longer than training, '
                f'choose at most --epochs {epochs}')

    def build_attack(self) -> Callable:
        """The attack for training: a function of (model, x, y, threat), `space` and `seed`."""
        fixed = dict(keep='last', norm_mode=self.attack_bn_mode)
        function = ATTACKS[self.attack]
        if self.objective in _FRIENDLY:
            fixed, function = {}, friendly_pgd
        if self.objective in _TRADES and self.attack_random_start is None:
            fixed['start_std'] = _TRADES_START_STD
        if self.attack == 'fgsm':
            return partial(function, **fixed)
        if self.attack_random_start is not None:
            fixed['random_start'] = self.attack_random_start
        if self.attack != 'fgsm_rs':
            fixed['steps'] = self.attack_steps

        def attack(model, x, y, threat, **kwargs):
            # follows eps through warm-up, keeping its ratio to a step size given by hand
            if self.step_size is not None:
                step_size = self.step_size * (threat.eps / self.threat.eps if self.threat.eps else 1.)
            elif self.attack == 'fgsm_rs':
                step_size = None  # its own
            else:
                step_size = nofrost_step_size(threat, self.attack_steps)
            return function(model, x, y, threat, step_size=step_size or None, **fixed, **kwargs)

        return attack


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of robust training flags to a parser (ours or timm's)."""
    group = parser.add_argument_group('Robust training parameters')
    default = ObjectiveOptions()
    group.add_argument('--objective', default=default.objective, metavar='NAME',
                       help=f'training objective, one of {", ".join(OBJECTIVES)} (default: %(default)s)')
    group.add_argument('--adv-weight', default=None, type=float, metavar='LAMBDA',
                       help='weight of the adversarial loss in sat, nofrost and fat, in [0, 1]; 1 leaves the clean '
                            'pass out (default: 0.5, 1 in fat)')
    group.add_argument('--star-terms', default=None, type=int, metavar='N',
                       help="terms of nofrost_star: 3 (the paper's: clean, augmented, adversarial) or 4 (the authors' "
                            'code: clean, deeply augmented, texture-debiased, adversarial) (default: 4 with '
                            '--deepaug-dirs or --noise2net)')
    group.add_argument('--deepaug-dirs', default=[], nargs='+', metavar='DIR',
                       help='deeply augmented images of nofrost_star, made beforehand: folders with the classes and '
                            'names of the training data, of which one is drawn for each image')
    group.add_argument('--noise2net', action='store_true',
                       help='deeply augment images of nofrost_star on the fly, by networks drawn at random')
    group.add_argument('--trades-beta', default=default.trades_beta, type=float, metavar='BETA',
                       help='weight of the divergence in trades and trades_fat (default: %(default)s)')
    group.add_argument('--fat-tau-epochs', default=[], type=float, nargs='*', metavar='EPOCH',
                       help='epochs at which an attack of fat and trades_fat goes on for one step more after it first '
                            'fools the network; 50 90 of 120 in the paper (default: never)')
    group.add_argument('--mbnat-gamma', default=None, type=float, metavar='GAMMA',
                       help='share of the BatchNorm of adversarial images when mbnat validates (default: 0)')
    group.add_argument('--apart-epsilon', default=default.apart_epsilon, type=float, metavar='EPS',
                       help='size of the perturbation of normalization in apart (default: %(default)s)')
    group.add_argument('--apart-groups', default=default.apart_groups, type=int, metavar='N',
                       help='groups of images in apart with a perturbation of their own (default: %(default)s)')
    group.add_argument('--apart-ratio', default=default.apart_ratio, type=float, metavar='R',
                       help='share of a batch in the second pass of apart, in (0, 1] (default: %(default)s)')
    group.add_argument('--attack', default=default.attack, metavar='NAME',
                       help=f'attack in training, one of {", ".join(TRAIN_ATTACKS)} (default: %(default)s)')
    group.add_argument('--attack-norm', default=default.attack_norm, metavar='NORM',
                       help='norm of the perturbation, linf or l2 (default: %(default)s)')
    group.add_argument('--attack-eps', default=default.attack_eps, metavar='EPS',
                       help='size of the perturbation in pixel units on [0, 1] (default: %(default)s)')
    group.add_argument('--attack-eps-warmup-epochs', default=default.attack_eps_warmup_epochs, type=float, metavar='N',
                       help='epochs over which eps rises to its full size (default: 0)')
    group.add_argument('--attack-steps', default=default.attack_steps, type=int, metavar='N',
                       help='attack steps in training (default: %(default)s)')
    group.add_argument('--attack-step-size', default=default.attack_step_size, metavar='SIZE',
                       help='attack step in pixel units (default: min(1.25 eps, eps + 4/255) / steps; 1.25 eps '
                            'in fgsm_rs)')
    group.add_argument('--attack-random-start', default=None, action=argparse.BooleanOptionalAction,
                       help='start pgd and cw_linf from a random point of the ball (default: yes)')
    group.add_argument('--attack-bn-mode', default=default.attack_bn_mode, metavar='MODE',
                       help='normalization layers while crafting: eval or train (default: %(default)s)')


def create_task(
        options: ObjectiveOptions,
        model: nn.Module,
        criterion: Optional[nn.Module] = None,
        *,
        space: InputSpace,
        steps_per_epoch: int,
        seed: int = 0,
        **kwargs: Any,
) -> TrainingTask:
    """Build the task of an objective.

    Args:
        options: Objective and attack.
        model: The network to train.
        criterion: Training criterion.
        space: Input space of the network: mean and std of the loader.
        steps_per_epoch: Batches per epoch, the unit of warm-up.
        seed: Seed of the attack's noise.
        **kwargs: Arguments of timm's `ClassificationTask`.
    """
    if options.objective == 'standard':
        return ClassificationTask(model, criterion, **kwargs)
    if options.objective == 'apart':
        return ApartTask(
            model, criterion, epsilon=options.apart_epsilon, groups=options.apart_groups, ratio=options.apart_ratio,
            **kwargs)
    if options.objective in ('nofrost', 'nofrost_star') and has_batch_statistics(model, training=True):
        _logger.warning(
            f'--objective {options.objective} on {type(model).__name__}, which normalizes by the batch: NoFrost is '
            'for a normalizer-free network, with this one nofrost is SAT')
    task: Type[RobustTask] = {
        'trades': TradesTask, 'fat': FriendlyTask, 'trades_fat': TradesFriendlyTask, 'mbnat': MbnatTask,
        'nofrost_star': NoFrostStarTask,
    }.get(options.objective, AdversarialTask)
    own: Dict[str, Any] = {}
    if options.objective == 'nofrost_star':
        own.update(terms=options.star_terms, noise2net=options.noise2net)
    elif options.objective in _TRADES:
        own['beta'] = options.trades_beta
    else:
        own['adv_weight'] = options.adv_weight
    if options.objective in _FRIENDLY:
        own['tau_steps'] = [round(e * steps_per_epoch) for e in options.fat_tau_epochs]
    return task(
        model,
        criterion,
        attack=options.build_attack(),
        threat=options.threat,
        space=space,
        eps_warmup_steps=round(options.attack_eps_warmup_epochs * steps_per_epoch),
        seed=seed,
        **own,
        **kwargs,
    )
