"""Runs a command; on bad input prints one line to standard error and returns exit code 2."""
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
    # log only errors of the Hub client, not every retry: the variable works before its import, the logger after it
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
        # full disk, file instead of a folder, closed pipe: the system's message names the path
        print(f'{prog}: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{prog}: stopped', file=sys.stderr)
        return 130
    return 0
