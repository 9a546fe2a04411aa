"""`timm-robust COMMAND ...`: bad input ends in one line on standard error and exit code 2."""
import importlib
import logging
import os
import sys
from types import ModuleType
from typing import List, Optional

from ..errors import InputError
from ..version import __version__
from .arguments import Parser
from .flagged import flagged
from .plugins import import_plugins

__all__ = ['main']

COMMANDS = {
    'quickstart': 'harden a small network on real digits and show what it withstands (3 minutes, no data needed)',
    'train': "train any timm model, with timm's flags and an objective of this package",
    'timm-train': "the same objectives in timm's own train.py",
    'eval': 'measure clean and robust accuracy of any timm model, or --benchmarks of corruptions and shifts',
    'diagnose': 'look for signs that the robustness of a model is not real',
    'properties': 'decision margin, boundary thickness and smoothness',
    'statistics': 'what an attack does to normalization, and population against batch statistics',
    'compare': 'several networks side by side, over benchmarks and attacks, as table and figure',
    'convert': "turn checkpoints of the papers' authors and of training runs into safetensors",
    'card': 'build the folder of a model for the Hugging Face Hub, every number measured',
    'push': 'publish that folder on the Hub, as one commit',
    'models': 'list the models of this package, their weights and what they withstand',
}


def _usage() -> str:
    lines = '\n'.join(f'  {name:<12}{text}' for name, text in COMMANDS.items())
    return f'usage: timm-robust COMMAND [flags]\n\n{lines}\n\ntimm-robust COMMAND --help lists the flags of a command.'


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; returns the exit code."""
    # of the Hub's client the error alone, not a line for each retry, whether it is imported already or not
    os.environ.setdefault('HF_HUB_VERBOSITY', 'error')
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ('-h', '--help'):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == '--version':
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"timm-robust: error: {argv[0]}: unknown command, choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    prog = f'timm-robust {argv[0]}'
    command: Optional[ModuleType] = None
    try:
        command = importlib.import_module(f".{argv[0].replace('-', '_')}", __package__)
        command.run(import_plugins(prog, argv[1:]))
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
