"""Where commands write."""
import secrets
from datetime import datetime
from pathlib import Path

from ..errors import InputError
from ..inputs.files import file_name

__all__ = ['new_file', 'new_folder']


def new_folder(command: str, model: str) -> str:
    """A folder for the results of a command, named by time and model, that no other run has."""
    time = datetime.now().strftime('%Y%m%d-%H%M%S')
    return str(Path('output') / command / f'{time}-{file_name(model)}-{secrets.token_hex(3)}')


def new_file(output: str, suffix: str) -> Path:
    """The file of an `output` flag.

    Raises:
        InputError: If it has another suffix or its folder does not exist.
    """
    path = Path(output)
    if path.suffix != suffix:
        raise InputError(f'must end in {suffix}', argument='output', value=output)
    if not path.parent.is_dir():
        raise InputError('no such folder, make it first', argument='output', value=output)
    return path
