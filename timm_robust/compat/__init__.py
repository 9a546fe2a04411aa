"""Drop-in replacements for other packages: scripts written for them run after changing one import."""
from .autoattack import AutoAttack
from .state import EvaluationState

__all__ = ['AutoAttack', 'EvaluationState']
