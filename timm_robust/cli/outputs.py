"""Output paths of commands, and the command to run next."""
import importlib
import secrets
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any, Mapping, Sequence

from ..errors import InputError
from ..inputs.files import file_name
from .flags import as_flags

__all__ = ['new_file', 'new_folder', 'print_next']


def new_folder(command: str, model: str) -> str:
    """A unique folder for the results of a command, named by time and model."""
    time = datetime.now().strftime('%Y%m%d-%H%M%S')
    return str(Path('output') / command / f'{time}-{file_name(model)}-{secrets.token_hex(3)}')


def new_file(output: str, suffix: str, argument: str = 'output') -> Path:
    """The output file that a flag names.

    Raises:
        InputError: If it has another suffix or its folder does not exist.
    """
    path = Path(output)
    if path.suffix != suffix:
        raise InputError(f'must end in {suffix}', argument=argument, value=output)
    if not path.parent.is_dir():
        raise InputError('no such folder', 'create it first', argument=argument, value=output)
    return path


def print_next(command: str, values: Mapping[str, Any], positional: Sequence[str] = ()) -> None:
    """Print the command that usually comes next, ready to paste.

    Args:
        command: Its name.
        values: Its flags by name; those that are None or '' are left out.
        positional: Its positional arguments.
    """
    parser = importlib.import_module(f'.{command}', __package__).build_parser()
    given = {name: value for name, value in values.items() if value not in (None, '')}
    print(f'\nNext:\n{shlex.join([*parser.prog.split(), *positional, *as_flags(parser, given)])}')
