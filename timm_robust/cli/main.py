"""A command: bad input ends in one line on standard error and exit code 2."""
import importlib
import logging
import os
import sys
from types import ModuleType
from typing import List, Optional

from timm_robust_command import COMMANDS, main

from ..errors import InputError
from .arguments import Parser
from .flagged import flagged
from .plugins import import_plugins

__all__ = ['COMMANDS', 'main', 'run_command']


def run_command(name: str, argv: List[str]) -> int:
    """Run a command; returns the exit code."""
    # of the Hub's client the error alone, not a line for each retry, whether it is imported already or not
    os.environ.setdefault('HF_HUB_VERBOSITY', 'error')
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
    prog = f'timm-robust {name}'
    command: Optional[ModuleType] = None
    try:
        command = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        command.run(import_plugins(prog, argv))
    except InputError as error:
        actions = getattr(command, 'build_parser', Parser)()._actions
        positional = {action.dest for action in actions if not action.option_strings}
        print(f'{prog}: error: {flagged(error, positional)}', file=sys.stderr)
        return 2
    except OSError as error:
        # a disk that is full, a file where a folder should be, a closed pipe: the system's own words name the path
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{prog}: stopped', file=sys.stderr)
        return 130
    return 0
