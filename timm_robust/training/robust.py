"""Robustness settings of training, in our loop or timm's: objective, attack, AWP and robust validation."""
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Set, Type, TypeVar

from ..errors import InputError, check_at_least
from ..settings import check_types, flat_names, from_flat, setting, to_flat, to_mapping
from ..tasks import AWP, Objective, RobustTeacher, Standard, TrainingAttack
from ..tasks.objective import RunSettings, flat_names_of_objectives, objective_from_flat, objective_to_flat

__all__ = ['RobustConfig']

T = TypeVar('T', bound='RobustConfig')

# nested settings and their classes
_PARTS: Dict[str, Any] = {'attack': TrainingAttack, 'awp': AWP, 'teacher': RobustTeacher}


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """Objective, attack and robust validation.

    Attributes:
        objective: Training objective.
        attack: Threat model and attack of training; robust validation uses the same threat model.
        awp: Adversarial weight perturbation.
        teacher: Robust distillation.
    """
    objective: Objective = field(default_factory=Standard)
    attack: TrainingAttack = field(default_factory=TrainingAttack)
    awp: AWP = field(default_factory=AWP)
    teacher: RobustTeacher = field(default_factory=RobustTeacher)
    robust_eval_steps: int = setting(
        0, 'PGD steps of robust validation after each epoch, under the threat model of training; gives robust_top1 for '
        '--eval-metric (default: 0, none)', metavar='N', group='Robust validation parameters')
    robust_eval_samples: int = setting(1000, 'validation images to attack, class-balanced', metavar='N')

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least('robust_eval_steps', self.robust_eval_steps, 0)
        check_at_least('robust_eval_samples', self.robust_eval_samples)

    @property
    def warning(self) -> str:
        """What a user should know before training begins; '' if nothing."""
        if not self.objective.crafts and not self.robust_eval_steps and self.attack != TrainingAttack():
            return (f'Settings of the attack have no effect, since {self.objective.name} crafts no adversarial images: '
                    'choose another objective, or turn on robust validation (`robust_eval_steps`).')
        steps = getattr(self.attack.built(self.attack.threat), 'steps', 1)
        if not self.objective.crafts or steps > 2 or self.robust_eval_steps:
            return ''
        return (f"Training with {steps} attack step{'s' * (steps > 1)} can overfit catastrophically: robust accuracy "
                'falls to 0 while the loss improves. Robust validation (`robust_eval_steps`) detects it.')

    def check_run(self, run: RunSettings) -> None:
        """Refuse robustness settings that conflict with the other settings of a run.

        Raises:
            InputError: Naming the argument; nested settings as `attack.eps_warmup_epochs`.
        """
        self.objective.check_attack(self.attack)
        self.objective.check_run(run)
        if self.attack.eps_warmup_epochs > run.epochs:
            raise InputError('is longer than training', f'choose at most `epochs={run.epochs}`',
                             argument='attack.eps_warmup_epochs', value=self.attack.eps_warmup_epochs)
        if self.awp.gamma:
            self._check_awp(run)
        if self.teacher.model and (not self.objective.crafts or self.objective.compares_labels):
            raise InputError(f'gives soft targets for attacked images, which {self.objective.name} cannot use',
                             'remove it, or choose madry, sat or trades', argument='teacher.model',
                             value=self.teacher.model)
        if run.eval_metric == 'robust_top1' and not self.robust_eval_steps:
            raise InputError('needs robust validation', 'pass `robust_eval_steps=10`',
                             argument='eval_metric', value='robust_top1')

    def _check_awp(self, run: RunSettings) -> None:
        if not self.objective.crafts:
            raise InputError(f'perturbs weights against crafted images, but {self.objective.name} crafts none',
                             'remove it', argument='awp.gamma', value=self.awp.gamma)
        if self.awp.start_epoch >= run.epochs:
            raise InputError(f'training ends before that, after {run.epochs} epochs', 'start earlier',
                             argument='awp.start_epoch', value=self.awp.start_epoch)
        if run.grad_checkpointing:
            raise InputError('recomputes in the backward pass, after the weight perturbation has been removed',
                             'remove it or `awp.gamma`', argument='grad_checkpointing', value=True)

    @classmethod
    def _own_names(cls) -> List[str]:
        return [f.name for f in dataclasses.fields(cls) if f.name not in ('objective', *_PARTS)]

    @classmethod
    def all_flat_names(cls) -> Set[str]:
        """Every name that `from_flat` reads."""
        parts = [flat_names(part, part.prefix).values() for part in _PARTS.values()]
        return {'objective', *cls._own_names(), *flat_names_of_objectives(), *(n for part in parts for n in part)}

    @classmethod
    def _flat_of_dotted(cls, objective: Objective) -> Dict[str, str]:
        """Flat names of the nested settings, by their names in errors: `attack.steps`."""
        parts = {'objective': flat_names(type(objective), objective.flat_prefix())}
        parts.update({name: flat_names(part, part.prefix) for name, part in _PARTS.items()})
        return {f'{part}.{name}': flat for part, names in parts.items() for name, flat in names.items()}

    @classmethod
    def from_flat(cls: Type[T], values: Mapping[str, Any], run: Optional[RunSettings] = None) -> T:
        """Settings from flat names, as in flags and YAML files: `{'objective': 'trades', 'attack_steps': 5}`.

        Args:
            values: Flat names and values.
            run: Settings of the run to check them against, if `values` does not contain them.

        Raises:
            InputError: On an unknown name and on bad values, naming the flat name.
        """
        for name in values:
            if name not in cls.all_flat_names():
                raise InputError('unknown setting', argument=str(name), value=values[name])
        objective = objective_from_flat(values)
        parts = {name: from_flat(part, values, part.prefix) for name, part in _PARTS.items()}
        own = {name: values[name] for name in cls._own_names() if name in values}
        try:
            config = cls(objective=objective, **parts, **own)
            if run is not None:
                config.check_run(run)
            return config
        except InputError as error:
            raise error.renamed(cls._flat_of_dotted(objective)) from error

    def to_flat(self) -> Dict[str, Any]:
        """The inverse of `from_flat`."""
        own = {k: v for k, v in to_mapping(self).items() if k in self._own_names()}
        parts = [to_flat(getattr(self, name), part.prefix) for name, part in _PARTS.items()]
        return {**objective_to_flat(self.objective), **{k: v for part in parts for k, v in part.items()}, **own}
