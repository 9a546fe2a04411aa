"""`timm-robust timm-train TRAIN.PY ...`: timm's own training script, with the objectives of this package."""
import argparse
import sys
from typing import List

from ..errors import InputError
from ..training.robust import RobustConfig
from ..training.timm_script import TimmScript, load_script
from .flags import add_flags, add_objective_flags

__all__ = ['run']


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_objective_flags(parser)
    add_flags(parser, RobustConfig)


def run(argv: List[str]) -> None:
    """Train with timm's train.py."""
    if not argv:
        raise InputError("pass the path of timm's train.py first")
    if argv[0] in ('-h', '--help'):
        print('usage: timm-robust timm-train /path/to/train.py [flags of train.py] [--objective ...]\n\n'
              '  --help after the path lists the flags of both')
        sys.exit(0)
    script = TimmScript(load_script(argv[0]), _add_flags)
    sys.argv = argv
    script.script.main()
