"""Base class and registry of objectives: settings that prepare network and data and create the training task.

A new objective is one file with its settings and its task, such as trades.py. Once registered, its fields become
command-line flags.
"""
import dataclasses
from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    Iterator,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Type,
    TypeVar,
)

import torch.nn as nn
from timm.task import TrainingTask

from ..attacks import InputSpace
from ..errors import InputError, check_choice
from ..settings import check_types, default_of, flat_names, from_flat, from_mapping, to_flat, to_mapping
from .attack import TrainingAttack
from .awp import AWP
from .base import RobustTask
from .teacher import Teacher

__all__ = [
    'OBJECTIVES',
    'Objective',
    'RunSettings',
    'create_task',
    'objective_from_dict',
    'objective_from_flat',
    'objective_to_flat',
    'register_objective',
]


class RunSettings(Protocol):
    """Settings of a training run that objectives may read, with the names and meanings of timm's train.py."""
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def opt(self) -> str: ...
    @property
    def mixup(self) -> float: ...
    @property
    def cutmix(self) -> float: ...
    @property
    def cutmix_minmax(self) -> Optional[Sequence[float]]: ...
    @property
    def grad_checkpointing(self) -> bool: ...
    @property
    def no_prefetcher(self) -> bool: ...
    @property
    def eval_metric(self) -> str: ...


def mixes_images(run: RunSettings) -> bool:
    """Whether mixup or CutMix is on."""
    return run.mixup > 0 or run.cutmix > 0 or run.cutmix_minmax is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Base class of the settings of training objectives.

    A subclass is a frozen keyword-only dataclass whose fields are made by `setting`. Each field is a keyword argument
    of the task, unless `task_kwargs` is overridden, and a flag `--PREFIX-FIELD` of the command line.

    Attributes:
        name: Name in `--objective` and in the registry.
        prefix: Prefix of the flags; the name if empty.
        crafts: Whether the task crafts adversarial images, and so takes an attack, AWP, a teacher and an input space.
        compares_labels: Whether the task needs a single label per image, and so excludes mixup and CutMix.
    """
    name: ClassVar[str]
    prefix: ClassVar[str] = ''
    crafts: ClassVar[bool] = True
    compares_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def flat_prefix(cls) -> str:
        """Prefix of the flat names of the fields."""
        return cls.prefix or cls.name

    def task_class(self) -> Type[TrainingTask]:
        """Class of the task."""
        raise NotImplementedError

    def task_kwargs(self) -> Dict[str, Any]:
        """The task's own keyword arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def create_task(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            attack: Optional[TrainingAttack] = None,
            awp: Optional[AWP] = None,
            teacher: Optional[Teacher] = None,
            space: Optional[InputSpace] = None,
            steps_per_epoch: int = 1,
            seed: int = 0,
            **kwargs: Any,
    ) -> TrainingTask:
        """Create the training task.

        Args:
            model: The network, after `prepare_model`.
            criterion: Any timm criterion.
            attack: The training attack. This and the following arguments apply only to objectives that craft images.
            awp: Adversarial weight perturbation.
            teacher: Teacher for robust distillation.
            space: Input space of the images.
            steps_per_epoch: Batches per epoch.
            seed: Seed of the noise.
            **kwargs: Further arguments of timm's `ClassificationTask`.
        """
        if self.crafts:
            kwargs.update(attack=attack, awp=awp, teacher=teacher, space=space, steps_per_epoch=steps_per_epoch,
                          seed=seed)
        task: Callable[..., TrainingTask] = self.task_class()
        return task(model, criterion, **self.task_kwargs(), **kwargs)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Prepare a network for the objective, before it is wrapped or passed to an optimizer.

        Raises:
            InputError: If the network lacks what the objective needs.
        """
        return model

    @contextmanager
    def naming_itself(self) -> Iterator[None]:
        """Turn a `ValueError` about an unsuitable network into an `InputError` that names the objective."""
        try:
            yield
        except ValueError as error:
            raise InputError(str(error), argument='objective', value=self.name) from error

    def prepare_dataset(self, dataset: Any, img_size: Sequence[int], hflip: float) -> Any:
        """Prepare training data for the objective, before a loader is created.

        Args:
            dataset: A timm data set.
            img_size: Height and width of the images.
            hflip: Probability of a horizontal flip.

        Raises:
            InputError: If the data lacks what the objective needs.
        """
        return dataset

    def check_run(self, run: RunSettings) -> None:
        """Reject run settings that the objective does not support.

        Raises:
            InputError: On an unsupported setting; the argument is `objective.FIELD` for a field of the objective.
        """
        if self.compares_labels and mixes_images(run):
            raise InputError(
                f'`objective={self.name!r}` stops attacks at misclassified images, but mixed images have two labels',
                'leave out `mixup` and `cutmix`', argument='mixup')

    def check_attack(self, attack: TrainingAttack) -> None:
        """Reject an attack that the objective cannot use.

        Raises:
            InputError: On an unsuitable setting; the argument is `attack.FIELD`.
        """
        task = self.task_class()
        if self.crafts and issubclass(task, RobustTask):
            task.check_attack(attack)

    def to_dict(self) -> Dict[str, Any]:
        """Name and fields, for JSON; `objective_from_dict` reads it back."""
        return {'objective': self.name, **to_mapping(self)}


OBJECTIVES: Dict[str, Type[Objective]] = {}

T = TypeVar('T', bound=Type[Objective])


def register_objective(cls: T) -> T:
    """Class decorator: register an objective by its name, which also makes it available on the command line.

    Raises:
        InputError: If the class has no name, or the name is taken.
    """
    if not getattr(cls, 'name', ''):
        raise InputError(f'{cls.__name__} has no name', "give it one: name: ClassVar[str] = 'mine'")
    if cls.name in OBJECTIVES:
        raise InputError(f'{cls.name!r} is the name of another objective', 'choose another', argument='name')
    OBJECTIVES[cls.name] = cls
    return cls


def _class_of(name: Any) -> Type[Objective]:
    check_choice('objective', name, OBJECTIVES)
    return OBJECTIVES[name]


def objective_from_dict(values: Mapping[str, Any]) -> Objective:
    """Rebuild an objective from `Objective.to_dict`.

    Raises:
        InputError: On an unknown objective or setting, and on bad values.
    """
    own = dict(values)
    return from_mapping(_class_of(own.pop('objective', None)), own)


def objective_from_flat(values: Mapping[str, Any]) -> Objective:
    """Build an objective from flags or a flat YAML file: `{'objective': 'trades', 'trades_beta': 3.}`.

    Args:
        values: Values by flat name. Settings of other objectives must have their defaults; other names are ignored.

    Raises:
        InputError: On an unknown objective, a setting of another objective, and bad values.
    """
    cls = _class_of(values.get('objective', 'standard'))
    own = flat_names(cls, cls.flat_prefix()).values()
    for flat, owners in flat_names_of_objectives().items():
        value = values.get(flat)
        if flat not in own and value not in (None, (), [], *owners.values()):
            raise InputError(
                f"is for `objective` {', '.join(owners)}, not {cls.name}", 'leave it out', argument=flat, value=value)
    return from_flat(cls, values, cls.flat_prefix())


def objective_to_flat(objective: Objective) -> Dict[str, Any]:
    """The inverse of `objective_from_flat`."""
    return {'objective': objective.name, **to_flat(objective, objective.flat_prefix())}


def flat_names_of_objectives() -> Dict[str, Dict[str, Any]]:
    """Map the flat name of each setting to the objectives that have it, with its default in each of them."""
    found: Dict[str, Dict[str, Any]] = {}
    for cls in OBJECTIVES.values():
        names = flat_names(cls, cls.flat_prefix())
        for field in dataclasses.fields(cls):
            found.setdefault(names[field.name], {})[cls.name] = default_of(field)
    return found


def create_task(
        objective: Objective,
        model: nn.Module,
        criterion: Optional[Callable] = None,
        **kwargs: Any,
) -> TrainingTask:
    """Call `objective.prepare_model`, then `objective.create_task`."""
    return objective.create_task(objective.prepare_model(model), criterion, **kwargs)
