"""The attack used in training."""
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Optional, Set, Type, Union

import torch
import torch.nn as nn

from ..attacks import (
    ATTACK_BN_MODES,
    ATTACKS,
    NORMS,
    GradientAttack,
    InputSpace,
    ThreatModel,
    make_threat,
    nofrost_step_size,
    norm_names,
    parse_attack,
    parse_eps,
)
from ..errors import InputError, check_at_least, check_choice, check_range
from ..settings import check_types, setting

__all__ = ['TrainingAttack', 'training_attacks']

_STEPS = 10


def training_attacks() -> Dict[str, Type[GradientAttack]]:
    """The registered attacks that objectives can use: gradient attacks on whole batches."""
    return {name: cls for name, cls in ATTACKS.items() if issubclass(cls, GradientAttack) and cls.whole_batch}


def _as_written(size: float) -> Union[float, str]:
    """A size in canonical notation, such as '8/255' or 0.2, so that equal settings compare equal."""
    in_255 = round(size * 255)
    return f'{in_255}/255' if 1 <= in_255 <= 32 and size == in_255 / 255 else size


@dataclass(frozen=True, kw_only=True)
class TrainingAttack:
    """Threat model and attack used in training, with NoFrost's defaults.

    `eps` and `step_size` are numbers or strings such as '8/255', in pixel units on [0, 1].

    Raises:
        InputError: On bad values, and on settings that the attack does not have.
    """
    prefix: ClassVar[str] = 'attack'

    attack: str = setting(
        'pgd', 'attack in training: pgd, fgsm, fgsm-rs, n-fgsm, bim, mim, cw-linf or a gradient attack of a plugin',
        metavar='NAME', flat='attack')
    norm: str = setting('Linf', lambda: f'norm of the perturbation: {norm_names()}', metavar='NORM')
    eps: Union[float, str, None] = setting(
        None, 'size of the perturbation in pixel units on [0, 1] (default: 8/255 for Linf, none for other norms)',
        metavar='EPS')
    eps_warmup_epochs: float = setting(0., 'epochs over which eps rises to its full size', metavar='N')
    steps: int = setting(_STEPS, 'attack steps in training', metavar='N')
    step_size: Optional[Union[float, str]] = setting(
        None, 'attack step size in pixel units (default: min(1.25 eps, eps + 4/255) / steps for Linf, 2.5 eps / '
        'steps for other norms, 1.25 eps for fgsm-rs, eps for n-fgsm)', metavar='SIZE')
    random_start: Optional[bool] = setting(None, 'start pgd and cw-linf from a random point of the ball (default: yes)')
    bn_mode: str = setting('eval', 'mode of normalization layers while crafting, eval or train', metavar='MODE')

    def __post_init__(self) -> None:
        check_types(self)
        known, name = training_attacks(), self.attack.strip().lower().replace('_', '-')
        name = next((n for n, cls in known.items() if name in (n, *cls.aliases)), self.attack)
        check_choice('attack', name, known)
        object.__setattr__(self, 'attack', name)
        check_choice('norm', self.norm.lower(), NORMS)
        object.__setattr__(self, 'norm', NORMS[self.norm.lower()].norm)
        check_choice('bn_mode', self.bn_mode, ATTACK_BN_MODES)
        check_at_least('steps', self.steps)
        check_range('eps_warmup_epochs', self.eps_warmup_epochs, 0)
        object.__setattr__(self, 'eps', _as_written(self.threat.eps))
        if self.step_size is not None:
            self._read_step_size(self.step_size)
        # attacks without steps have a single one, which a command line may say to override a recipe
        for field, given, more in (
                ('steps', self.steps not in (_STEPS, 1), ', or set it to 1'),
                ('step_size', self.step_size is not None, ''), ('random_start', self.random_start is not None, '')):
            if given and field not in self._fields:
                raise InputError(f'fixed by `attack={name!r}`', f'leave it out{more}', argument=field,
                                 value=getattr(self, field))
        self.built(self.threat).check(self.threat)

    def _read_step_size(self, given: Union[float, str]) -> None:
        try:
            size = parse_eps(given)
        except InputError as error:
            raise error.about('step_size', given) from error
        check_range('step_size', size, 0, open_low=True, note='for example 2/255')
        object.__setattr__(self, 'step_size', _as_written(size))

    @property
    def threat(self) -> ThreatModel:
        """The threat model at full eps."""
        return make_threat(self.norm, self.eps)

    @property
    def _fields(self) -> Set[str]:
        return {field.name for field in dataclasses.fields(training_attacks()[self.attack])}

    def _step_size(self, threat: ThreatModel) -> Optional[float]:
        if self.step_size is not None:
            return parse_eps(self.step_size) * (threat.eps / self.threat.eps if self.threat.eps else 1.)
        return nofrost_step_size(threat, self.steps) if 'steps' in self._fields else None

    def built(self, threat: ThreatModel) -> GradientAttack:
        """The attack for a threat model; if eps is smaller during warm-up, an explicit step size is scaled with it."""
        values: Dict[str, Any] = {
            'steps': self.steps, 'step_size': self._step_size(threat) or None, 'random_start': self.random_start}
        attack = parse_attack(
            self.attack, **{k: v for k, v in values.items() if k in self._fields and v is not None})
        assert isinstance(attack, GradientAttack)
        return attack

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
        """Adversarial images for a batch: the last iterate of the attack.

        Args:
            model: The network; its mode and flags are restored afterwards.
            images: Clean images in `space`, shape (N, C, H, W).
            target: Class indices (N,) or soft targets (N, K).
            threat: Threat model of this step.
            space: Input space of the network.
            seed: Seed of the noise.
            start_std: Start from the images plus Gaussian noise of this standard deviation, in pixel units.
            tau: Stop perturbing an image once it has been misclassified `tau` + 1 times.
            reference: Soft targets (N, K) for the cross-entropy to maximize; `target` decides what is misclassified.
        """
        return self.built(threat).craft(
            model, images, target, threat, space=space, seed=seed, bn_mode=self.bn_mode, start_std=start_std, tau=tau,
            reference=reference).to(images.dtype)
