"""Build the documentation site into build/docs/site; a warning is an error.

    pip install '.[docs]'
    python docs/site/build.py

Its pages are README, docs/*.md, CONTRIBUTING and the benchmarks' results, the help text of every command, and the
docstrings of what the package exports. A link to any other file is replaced by that file's path.
"""
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

from timm_robust_command import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / 'build' / 'docs'
PAGES: Dict[Path, str] = {
    ROOT / 'README.md': 'index.md',
    ROOT / 'CONTRIBUTING.md': 'contributing.md',
    ROOT / 'benchmarks' / 'RESULTS.md': 'benchmarks.md',
    **{path: path.name for path in sorted((ROOT / 'docs').glob('*.md'))},
}
PACKAGES = ('', 'attacks', 'tasks', 'training', 'evaluation', 'layers', 'models', 'hub', 'compat')


def linked(text: str, source: Path) -> str:
    """A page with its links rewritten to pages and pictures of the site.

    Raises:
        FileNotFoundError: On a link to a file that does not exist.
    """
    def link(match: 're.Match[str]') -> str:
        picture, label, target, anchor = match.groups()
        path = (source.parent / target).resolve()
        if path in PAGES:
            return f'[{label}]({PAGES[path]}{anchor or ""})'
        if not path.exists():
            raise FileNotFoundError(f'{source.relative_to(ROOT)} links to {target}')
        if picture:
            return f'![{label}]({path.name})'
        return f'{label} (`{path.relative_to(ROOT)}`)'

    return re.sub(r'(!?)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)', link, text)


def flags() -> str:
    """The help text of every command."""
    parts = ['# Flags']
    for name in COMMANDS:
        module = importlib.import_module(f"timm_robust.cli.{name.replace('-', '_')}")
        if hasattr(module, 'build_parser'):
            parser = module.build_parser()
            parser.first = ()
            parts.append(f'## {name}\n\n```text\n{parser.format_help().rstrip()}\n```')
    return '\n\n'.join(parts) + '\n'


def reference(package: str) -> str:
    """The page of a package: its docstring and its exported names, which mkdocstrings documents."""
    name = f'timm_robust.{package}'.rstrip('.')
    module = importlib.import_module(name)
    exported: List[str] = [n for n in module.__all__ if getattr(getattr(module, n), '__doc__', None) and (
        callable(getattr(module, n)))]
    listed = '\n\n'.join(f'::: {name}.{n}' for n in exported)
    return f'# {name}\n\n{(module.__doc__ or "").strip()}\n\n{listed}\n'


def main() -> int:
    """Gather the pages and build the site; returns the exit code."""
    shutil.rmtree(BUILD, ignore_errors=True)
    pages = BUILD / 'pages'
    (pages / 'reference').mkdir(parents=True)
    for source, name in PAGES.items():
        (pages / name).write_text(linked(source.read_text(), source))
    for picture in (ROOT / 'docs').glob('*.png'):
        shutil.copy(picture, pages)
    (pages / 'flags.md').write_text(flags())
    for package in PACKAGES:
        (pages / 'reference' / f"{package or 'timm_robust'}.md").write_text(reference(package))
    shutil.copy(Path(__file__).with_name('zensical.toml'), BUILD)
    done = subprocess.run(
        [sys.executable, '-m', 'zensical', 'build', '--strict'], cwd=BUILD, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    print(done.stdout)
    return done.returncode or int('griffe: ' in done.stdout)  # --strict ignores malformed docstrings


if __name__ == '__main__':
    sys.exit(main())
