"""The attack that objectives craft images with."""
from dataclasses import dataclass
from typing import ClassVar, Optional, Union

import torch
import torch.nn as nn

from ..attacks import (
    ATTACK_BN_MODES,
    NORMS,
    GradientAttack,
    InputSpace,
    ThreatModel,
    make_threat,
    nofrost_step_size,
    parse_attack,
    parse_eps,
)
from ..errors import InputError, check_at_least, check_choice, check_range
from ..settings import check_types, setting

__all__ = ['TRAINING_ATTACKS', 'TrainingAttack']

TRAINING_ATTACKS = ('fgsm', 'fgsm_rs', 'bim', 'pgd', 'mim', 'cw_linf')


@dataclass(frozen=True, kw_only=True)
class TrainingAttack:
    """Threat model and attack of training, with NoFrost's defaults.

    eps and step size are numbers or strings such as '8/255', in pixel units on [0, 1].

    Raises:
        InputError: On bad values.
    """
    prefix: ClassVar[str] = 'attack'

    attack: str = setting(
        'pgd', f"attack in training, one of {', '.join(TRAINING_ATTACKS)}", metavar='NAME', flat='attack')
    norm: str = setting('Linf', 'norm of the perturbation, Linf or L2', metavar='NORM')
    eps: Union[float, str] = setting('8/255', 'size of the perturbation in pixel units on [0, 1]', metavar='EPS')
    eps_warmup_epochs: float = setting(0., 'epochs over which eps rises to its full size', metavar='N')
    steps: int = setting(10, 'attack steps in training', metavar='N')
    step_size: Optional[Union[float, str]] = setting(
        None, 'attack step in pixel units (default: min(1.25 eps, eps + 4/255) / steps; 1.25 eps in fgsm_rs)',
        metavar='SIZE')
    random_start: Optional[bool] = setting(None, 'start pgd and cw_linf from a random point of the ball (default: yes)')
    bn_mode: str = setting('eval', 'normalization layers while crafting, eval or train', metavar='MODE')

    def __post_init__(self) -> None:
        check_types(self)
        check_choice('attack', self.attack, TRAINING_ATTACKS)
        check_choice('norm', self.norm.lower(), NORMS)
        check_choice('bn_mode', self.bn_mode, ATTACK_BN_MODES)
        check_at_least('steps', self.steps)
        check_range('eps_warmup_epochs', self.eps_warmup_epochs, 0)
        try:
            object.__setattr__(self, 'eps', self.threat.eps)
        except InputError as error:
            raise error.about('eps', self.eps) from error
        if self.step_size is not None:
            self._check_step_size(self.step_size)
        if self.random_start is not None and self.attack not in ('pgd', 'cw_linf'):
            raise InputError(f'is fixed by `attack={self.attack!r}`', 'leave it out, or choose pgd or cw_linf',
                             argument='random_start', value=self.random_start)

    def _check_step_size(self, given: Union[float, str]) -> None:
        try:
            object.__setattr__(self, 'step_size', parse_eps(given))
        except InputError as error:
            raise error.about('step_size', given) from error
        check_range('step_size', self.step_size, 0, open_low=True, note='for example 2/255')
        if self.attack == 'fgsm':
            raise InputError('the step of fgsm is eps', 'leave it out', argument='step_size', value=given)

    @property
    def threat(self) -> ThreatModel:
        """The perturbations allowed, at full size."""
        return make_threat(self.norm, self.eps)

    def craft(
            self,
            model: nn.Module,
            images: torch.Tensor,
            target: torch.Tensor,
            threat: ThreatModel,
            *,
            space: InputSpace,
            seed: int,
            start_std: Optional[float] = None,
            tau: Optional[int] = None,
            reference: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Adversarial images for a batch, the last iterate.

        Args:
            model: The network, which is left as it was.
            images: Clean images in `space`, shape (N, C, H, W).
            target: Class indices (N,) or soft targets (N, K).
            threat: Threat model of this step; a step size given by hand keeps its ratio to eps during warm-up.
            space: Input space of the network.
            seed: Seed of the noise.
            start_std: Start from the images under Gaussian noise of this standard deviation, in pixel units.
            tau: Stop each image this many steps after it first fools the network.
            reference: Soft targets (N, K) to ascend the cross-entropy of, while `target` decides what fools.
        """
        settings: dict = {}
        if self.random_start is not None:
            settings['random_start'] = self.random_start
        if self.attack != 'fgsm':
            settings['step_size'] = self._step_size(threat) or None
        if self.attack not in ('fgsm', 'fgsm_rs'):
            settings['steps'] = self.steps
        attack = parse_attack(self.attack, **settings)
        assert isinstance(attack, GradientAttack)
        return attack.craft(
            model, images, target, threat, space=space, seed=seed, bn_mode=self.bn_mode, start_std=start_std, tau=tau,
            reference=reference)

    def _step_size(self, threat: ThreatModel) -> Optional[float]:
        if self.step_size is not None:
            return parse_eps(self.step_size) * (threat.eps / self.threat.eps if self.threat.eps else 1.)
        return None if self.attack == 'fgsm_rs' else nofrost_step_size(threat, self.steps)
