"""Python in README.md and docs/ runs as it is printed."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = [
    pytest.param(code, id=f'{path.stem}-{i}') for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
    for i, code in enumerate(re.findall(r'^```python\n(.*?)^```', path.read_text(), re.M | re.S))]


@pytest.mark.parametrize('code', SNIPPETS)
def test_snippet(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, 'snippet', 'exec'), {'__name__': 'snippet'})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4
