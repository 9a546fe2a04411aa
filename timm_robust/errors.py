"""User-facing errors. Each holds argument, value, problem and remedy; the command line turns arguments into flags."""
import re
from typing import Any, Collection, Mapping, Optional

__all__ = [
    'InputError',
    'PretrainedWeightsError',
    'TrainingDivergedError',
    'check_at_least',
    'check_choice',
    'check_range',
]

_ABSENT = object()


class InputError(ValueError):
    """Bad input, explained in one line: `argument=value: problem; remedy`.

    `problem` and `remedy` put arguments in backticks, alone or with a value (`device='cpu'`). Python callers see them
    unchanged; the command line prints them as flags (--device cpu).

    Args:
        problem: What is wrong.
        remedy: What to do about it.
        argument: Name of the Python argument, with underscores; '' if the problem concerns no single argument.
        value: Its value.

    Attributes:
        argument, problem, remedy: As passed.
        has_value: Whether a value was passed.
        value: The value, or None.
    """

    def __init__(self, problem: str, remedy: str = '', *, argument: str = '', value: Any = _ABSENT):
        self.problem = problem
        self.remedy = remedy
        self.argument = argument
        self._given = value
        self.has_value = value is not _ABSENT
        self.value: Any = value if self.has_value else None
        super().__init__(problem, remedy)

    def about(self, argument: str, value: Any = _ABSENT) -> 'InputError':
        """The same error, attributed to the argument through which the caller passed the value."""
        error = type(self)(self.problem, self.remedy, argument=argument, value=value)
        error.__cause__ = self
        return error

    def renamed(self, names: Mapping[str, str]) -> 'InputError':
        """The same error with some arguments renamed, including those its text mentions."""
        def replace(text: str) -> str:
            return re.sub(r'`([\w.]+)', lambda match: f'`{names.get(match[1], match[1])}', text)

        error = type(self)(replace(self.problem), replace(self.remedy),
                           argument=names.get(self.argument, self.argument), value=self._given)
        error.__cause__ = self
        return error

    @property
    def explanation(self) -> str:
        """Problem and remedy, without the argument."""
        return f'{self.problem}; {self.remedy}' if self.remedy else self.problem

    def __str__(self) -> str:
        if not self.argument:
            return self.explanation
        return f"{self.argument}{f'={self.value!r}' if self.has_value else ''}: {self.explanation}"


class PretrainedWeightsError(InputError):
    """Pretrained weights are unavailable."""


class TrainingDivergedError(InputError):
    """The training loss is no longer finite."""


def check_choice(argument: str, value: Any, choices: Collection[str]) -> None:
    """Raise `InputError` unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        known = ', '.join(choice or "''" for choice in choices)
        raise InputError('unknown', f'choose one of {known}', argument=argument, value=value)


def check_at_least(argument: str, value: Any, least: int = 1) -> None:
    """Raise `InputError` unless the value is a whole number of at least `least` and below 2**31."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f'must be a whole number of at least {least}', argument=argument, value=value)
    if value >= 1 << 31:
        raise InputError('must be below 2**31', argument=argument, value=value)


def check_range(
        argument: str,
        value: Any,
        low: float,
        high: float = float('inf'),
        *,
        open_low: bool = False,
        note: Optional[str] = None,
) -> None:
    """Raise `InputError` unless the value is a finite number in [low, high], or (low, high] with `open_low`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and (low < value if open_low else low <= value) and value <= high and value < float('inf')):
        span = f'{"(" if open_low else "["}{low:g}, {high:g}]' if high < float('inf') else (
            f'{"above" if open_low else "of at least"} {low:g}')
        where = f'in {span}' if high < float('inf') else span
        raise InputError(f'must be a number {where}', note or '', argument=argument, value=value)
