"""Errors that the user can mend. The command line prints them as one line and exits with code 2."""

__all__ = ['InputError', 'PretrainedWeightsError', 'TrainingDivergedError']


class InputError(ValueError):
    """Bad input: the message names the argument, its value and the mend in one line."""


class PretrainedWeightsError(InputError):
    """Pretrained weights were asked for and cannot be had."""


class TrainingDivergedError(InputError):
    """The training loss is no longer finite."""
