"""`--plugin MODULE`, for every command: import a module that registers attacks, objectives, norms or models."""
import importlib
import os
import sys
from typing import List

from ..errors import InputError
from .arguments import Parser

__all__ = ['import_plugins']


def import_plugins(prog: str, argv: List[str]) -> List[str]:
    """Import the modules named by --plugin and --device-modules; the current folder is searched too.

    Args:
        prog: Name of the command, for error messages.
        argv: Its arguments.

    Returns:
        The arguments without these flags.

    Raises:
        InputError: If a module cannot be imported.
    """
    parser = Parser(prog=prog, add_help=False)
    parser.add_argument('--plugin', action='append', default=[])
    parser.add_argument('--device-modules', nargs='+', default=[])
    known, rest = parser.parse_known_args(argv)
    modules = [*known.plugin, *known.device_modules]
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f'cannot be imported ({error})', 'name a module in this folder or on PYTHONPATH, without .py',
                argument='plugin', value=name) from error
    return rest
