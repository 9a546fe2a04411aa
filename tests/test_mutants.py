"""The list of mistakes that `python -m benchmarks.mutants` plants fits the source of today."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_mistake_can_be_planted(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.mutants import read_mutants
    mutants = read_mutants()
    assert len({m.name for m in mutants}) == len(mutants) > 20
    for mutant in mutants:
        copy = tmp_path / mutant.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        source = (ROOT / mutant.file).read_text()
        copy.write_text(source)
        assert mutant.plant(tmp_path), f'{mutant.name}: its text is not in {mutant.file} exactly once'
        changed, test = copy.read_text(), ROOT / mutant.tests.split()[0]
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), f'{mutant.name} changes nothing'
        assert test.is_file(), f'{mutant.name}: there is no {test}'
