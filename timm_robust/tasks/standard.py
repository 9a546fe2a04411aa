"""Training without an attack: timm's own task."""
from dataclasses import dataclass
from typing import ClassVar, Type

from timm.task import ClassificationTask, TrainingTask

from .objective import Objective, register_objective

__all__ = ['Standard']


@register_objective
@dataclass(frozen=True, kw_only=True)
class Standard(Objective):
    """L(x), the criterion on clean images."""
    name: ClassVar[str] = 'standard'
    crafts: ClassVar[bool] = False

    def task_class(self) -> Type[TrainingTask]:
        """timm's `ClassificationTask`."""
        return ClassificationTask
