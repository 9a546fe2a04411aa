"""Interfaces of other packages: their scripts run on this one after changing an import."""
from .autoattack import AutoAttack
from .state import EvaluationState

__all__ = ['AutoAttack', 'EvaluationState']
