"""Errors that the user can mend. The command line prints them as one line and exits with code 2."""
from typing import Any, Iterable

__all__ = ['InputError', 'PretrainedWeightsError', 'TrainingDivergedError', 'check_choice', 'check_positive']


class InputError(ValueError):
    """Bad input: the message names the argument, its value and the mend in one line."""


class PretrainedWeightsError(InputError):
    """Pretrained weights were asked for and cannot be had."""


class TrainingDivergedError(InputError):
    """The training loss is no longer finite."""


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """`InputError` naming the flag of the argument `name` unless its value is one of the choices."""
    if value not in choices:
        known = ', '.join(choice or "''" for choice in choices)
        raise InputError(f"--{name.replace('_', '-')} {value}: unknown, choose one of {known}")


def check_positive(name: str, value: int) -> None:
    """`InputError` naming the flag of the argument `name` unless its value is at least 1."""
    if value < 1:
        raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
