from .adversarial import AdversarialTask
from .apart import ApartTask, second_pass_size
from .fat import FriendlyTask, TradesFriendlyTask
from .mbnat import MbnatTask
from .nofrost_star import NoFrostStarTask
from .options import OBJECTIVES, TRAIN_ATTACKS, ObjectiveOptions, add_objective_arguments, create_task
from .trades import TradesTask

__all__ = [
    'AdversarialTask',
    'ApartTask',
    'FriendlyTask',
    'MbnatTask',
    'NoFrostStarTask',
    'OBJECTIVES',
    'ObjectiveOptions',
    'TRAIN_ATTACKS',
    'TradesFriendlyTask',
    'TradesTask',
    'add_objective_arguments',
    'create_task',
    'second_pass_size',
]
