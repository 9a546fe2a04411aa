"""The command `timm-robust`, up to the name of a command.

It stands outside of the package, whose import registers models and takes seconds, so that a look at the list of
commands does not wait for it.
"""
import sys
from typing import List, Optional

__all__ = ['COMMANDS', 'main']

COMMANDS = {
    'quickstart': 'harden a small network on real digits and show what it withstands (3 minutes, no data needed)',
    'train': "train any timm model, with timm's flags and an objective of this package",
    'timm-train': "the same objectives in timm's own train.py",
    'eval': 'measure clean and robust accuracy of any timm model, or --benchmarks of corruptions and shifts',
    'diagnose': 'look for signs that the robustness of a model is not real',
    'transfer': 'several models, each on images crafted on each other, as table and figure',
    'properties': 'decision margin, boundary thickness and smoothness',
    'statistics': 'what an attack does to normalization, and population against batch statistics',
    'compare': 'several networks side by side, over benchmarks and attacks, as table and figure',
    'convert': "turn checkpoints of the papers' authors and of training runs into safetensors",
    'fetch': "download a checkpoint of the papers' authors, for pretrained=True",
    'card': 'build the folder of a model for the Hugging Face Hub, every number measured',
    'push': 'publish that folder on the Hub, as one commit',
    'app': 'a page on this machine on which images are attacked, also for a Space of the Hub',
    'models': 'list the models of this package, their weights and what they withstand',
    'completion': 'print the script by which a shell completes these commands and their flags',
}


def _usage() -> str:
    lines = '\n'.join(f'  {name:<12}{text}' for name, text in COMMANDS.items())
    return f'usage: timm-robust COMMAND [flags]\n\n{lines}\n\ntimm-robust COMMAND --help lists the flags of a command.'


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
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
