"""Library errors on the command line: arguments become flags."""
import re
from typing import Any, Collection

from ..errors import InputError

__all__ = ['flag_name', 'flagged', 'word']

_MENTION = re.compile(r'`(\w+)(?:=([^`]*))?`')


def flag_name(argument: str) -> str:
    """The flag of an argument: '--attack-eps' for 'attack_eps'."""
    return '--' + argument.replace('_', '-')


def word(value: Any) -> str:
    """A value as one would type it on a command line: 0, not 0.0."""
    return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


def _flag(argument: str, value: Any) -> str:
    if value is True:
        return flag_name(argument)
    if value is False:
        return flag_name(f'no_{argument}')
    text = ' '.join(map(word, value)) if isinstance(value, (list, tuple)) else word(value)
    return f'{flag_name(argument)} {text}'.rstrip()


def flagged(error: InputError, positional: Collection[str] = ()) -> str:
    """The error in one line, with flags instead of Python arguments.

    Args:
        error: The error.
        positional: Arguments without a flag; only their value is shown.
    """
    def mention(match: 're.Match[str]') -> str:
        argument, value = match.groups()
        if value is None:
            return flag_name(argument)
        return _flag(argument, {'True': True, 'False': False}.get(value, value.strip('\'"')))

    text = _MENTION.sub(mention, error.explanation)
    if error.argument in positional:
        text = f'{word(error.value) if error.has_value else error.argument}: {text}'
    elif error.argument:
        text = f'{_flag(error.argument, error.value) if error.has_value else flag_name(error.argument)}: {text}'
    return ' '.join(text.split())
