from .adversarial import AdversarialTask
from .options import OBJECTIVES, TRAIN_ATTACKS, ObjectiveOptions, add_objective_arguments, create_task

__all__ = [
    'AdversarialTask',
    'OBJECTIVES',
    'ObjectiveOptions',
    'TRAIN_ATTACKS',
    'add_objective_arguments',
    'create_task',
]
