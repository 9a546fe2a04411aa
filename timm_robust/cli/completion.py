"""`timm-robust completion`: a shell script that completes commands and flags."""
import argparse
import importlib
from typing import List

import shtab

from timm_robust_command import COMMANDS

from ..errors import InputError
from .arguments import Parser

__all__ = ['build_parser', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust completion`."""
    parser = Parser(
        prog='timm-robust completion', description='Print a script that completes commands and flags.',
        examples=('timm-robust completion bash > ~/.local/share/bash-completion/completions/timm-robust',))
    parser.add_argument('shell', help=f"one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    return parser


def run(argv: List[str]) -> None:
    """Print the script."""
    shell = build_parser().parse_args(argv).shell
    if shell not in shtab.SUPPORTED_SHELLS:
        raise InputError('is not supported', f"choose from {', '.join(shtab.SUPPORTED_SHELLS)}", argument='shell',
                         value=shell)
    whole = argparse.ArgumentParser('timm-robust')
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
        parents = [module.build_parser()] if hasattr(module, 'build_parser') else []
        commands.add_parser(name, parents=parents, add_help=False, help=text)
    print(shtab.complete(whole, shell))
