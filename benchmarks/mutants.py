"""Mutation testing: plant the mistakes of mutants.yaml one at a time and run the tests that should fail.

    python -m benchmarks.mutants [--only NAME ...] [--jobs N]

Each entry is a realistic mistake: `text` of `file`, which occurs there exactly once, becomes `instead`, and pytest with
the arguments `tests` must fail. It runs in a copy of the checkout, which stays untouched.
"""
import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import List, Optional

import yaml

ROOT = Path(__file__).resolve().parents[1]
_NOT_COPIED = shutil.ignore_patterns('.*', '__pycache__', 'output')


@dataclass(frozen=True)
class Mutant:
    """A mistake to plant.

    Attributes:
        name: Its name.
        file: Path from the root of the checkout.
        text: Text to replace, which occurs once in the file.
        instead: The replacement.
        tests: Arguments of pytest.
    """
    name: str
    file: str
    text: str
    instead: str
    tests: str

    def plant(self, root: Path) -> bool:
        """Change the file under a root; False if the text is not there exactly once."""
        path = root / self.file
        source = path.read_text() if path.is_file() else ''
        if source.count(self.text) != 1:
            return False
        path.write_text(source.replace(self.text, self.instead))
        return True


def read_mutants() -> List[Mutant]:
    """The entries of mutants.yaml."""
    return [Mutant(**entry) for entry in yaml.safe_load((ROOT / 'benchmarks' / 'mutants.yaml').read_text())]


def _outcome(tests: str, mutant: Optional[Mutant] = None) -> str:
    with TemporaryDirectory(prefix='mutant_') as folder:
        root = Path(folder) / 'checkout'
        shutil.copytree(ROOT, root, ignore=_NOT_COPIED)
        if mutant and not mutant.plant(root):
            return 'does not apply'
        done = subprocess.run(
            [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *shlex.split(tests)], cwd=root,
            capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})
        # pytest returns 1 if tests failed; higher codes mean that none could run, which proves nothing
        return {0: 'NOT CAUGHT', 1: 'caught'}.get(done.returncode, f'pytest ended with {done.returncode}')


def main() -> int:
    """Plant and test; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', default=None, metavar='NAME', help='only these mistakes')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='number of parallel jobs (default: 1)')
    args = parser.parse_args()
    mutants = [m for m in read_mutants() if args.only is None or m.name in args.only]
    unknown = set(args.only or ()) - {m.name for m in mutants}
    if unknown:
        parser.error(f"no such mistake: {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(args.jobs) as pool:
        commands = list(dict.fromkeys(m.tests for m in mutants))
        for command, outcome in zip(commands, pool.map(_outcome, commands)):
            if outcome != 'NOT CAUGHT':  # a test that always fails would catch everything
                print(f'without a mistake: pytest {command}: {outcome}')
                return 1
        caught = 0
        for mutant, outcome in zip(mutants, pool.map(_outcome, (m.tests for m in mutants), mutants)):
            print(f'{outcome:<14} {mutant.name} ({mutant.file})', flush=True)
            caught += outcome == 'caught'
    print(f'{caught} of {len(mutants)} caught')
    return int(caught < len(mutants))


if __name__ == '__main__':
    sys.exit(main())
