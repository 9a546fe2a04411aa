"""Other packages' interfaces: their scripts run on this one after a changed import."""
from .autoattack import AutoAttack
from .state import EvaluationState

__all__ = ['AutoAttack', 'EvaluationState']
