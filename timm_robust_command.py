"""Entry point of `timm-robust`: lists the commands and runs one.

It is outside the package because importing the package registers models and takes seconds. Listing the commands does
not have to wait for that.
"""
import os
import sys
from typing import List, Optional

__all__ = ['COMMANDS', 'main']

COMMANDS = {
    'quickstart': 'train a small robust network on real digits and attack it (3 minutes, no data needed)',
    'train': "train any timm model with timm's flags and the objectives of this package",
    'timm-train': "use the same objectives in timm's own train.py",
    'eval': 'measure clean and robust accuracy of any timm model, or accuracy on corruptions and shifts',
    'diagnose': 'look for gradient masking and other false robustness',
    'transfer': 'measure how attacks transfer between models, as table and figure',
    'properties': 'measure decision margin, boundary thickness and smoothness',
    'statistics': 'measure how an attack shifts normalization, and compare population with batch statistics',
    'compare': 'compare networks over benchmarks and attacks, as table and figure',
    'convert': "convert checkpoints of training runs and of the papers' authors to safetensors",
    'fetch': "download a checkpoint of the papers' authors, for pretrained=True",
    'card': 'build the Hugging Face Hub folder of a model from measured results',
    'push': 'publish that folder on the Hub in one commit',
    'app': 'serve a local web page for attacking images, which also runs as a Space on the Hub',
    'models': 'list the models of this package, their weights and their accuracies',
    'completion': 'print a shell completion script for these commands and their flags',
}


def _usage() -> str:
    lines = '\n'.join(f'  {name:<12}{text}' for name, text in COMMANDS.items())
    return f'usage: timm-robust COMMAND [flags]\n\n{lines}\n\ntimm-robust COMMAND --help lists the flags of a command.'


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; returns the exit code."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of `timm-robust ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 1


def _run(argv: List[str]) -> int:
    if not argv or argv[0] in ('-h', '--help'):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == '--version':
        from timm_robust.version import __version__
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"timm-robust: error: {argv[0]}: unknown command, choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from timm_robust.cli.main import run_command
    return run_command(argv[0], argv[1:])


if __name__ == '__main__':
    sys.exit(main())
