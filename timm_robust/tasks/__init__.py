"""Training objectives: for each, a dataclass of settings and a timm task."""
from .adversarial import SAT, Madry, MadryTask, NoFrost, NoFrostTask, SatTask
from .apart import APART, ApartTask
from .attack import TrainingAttack, training_attacks
from .awp import AWP
from .base import RobustTask, TwoPassTask
from .fat import FAT, FatTask, TradesFAT, TradesFatTask
from .mbnat import MBNAT, MbnatTask
from .nofrost_star import NoFrostStar, NoFrostStarTask
from .objective import OBJECTIVES, Objective, create_task, objective_from_dict, register_objective
from .standard import Standard
from .teacher import RobustTeacher, Teacher
from .trades import TRADES, TradesTask

__all__ = [
    'APART',
    'AWP',
    'ApartTask',
    'FAT',
    'FatTask',
    'MBNAT',
    'Madry',
    'MadryTask',
    'MbnatTask',
    'NoFrost',
    'NoFrostStar',
    'NoFrostStarTask',
    'NoFrostTask',
    'OBJECTIVES',
    'Objective',
    'RobustTask',
    'RobustTeacher',
    'SAT',
    'SatTask',
    'Standard',
    'TRADES',
    'Teacher',
    'TradesFAT',
    'TradesFatTask',
    'TradesTask',
    'TrainingAttack',
    'TwoPassTask',
    'create_task',
    'objective_from_dict',
    'register_objective',
    'training_attacks',
]
