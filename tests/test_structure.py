"""The shape of the package: which way imports go, who reads a command line, how long a file may be."""
import ast
import re
from pathlib import Path

import timm_robust

ROOT = Path(timm_robust.__file__).parent
FILES = sorted(ROOT.rglob('*.py'))
# a module imports what stands before it: rooms of earlier rows and its own, not its neighbour's
FLOW = (
    ('',),  # errors, settings and the other files beside the rooms
    ('layers', 'data'),
    ('models',),
    ('attacks',),
    ('tasks',),
    ('inputs',),
    ('evaluation', 'training'),
    ('hub', 'compat'),
    ('cli',),
    ('__init__', '__main__'),
)
ROW = {room: row for row, rooms in enumerate(FLOW) for room in rooms}
MAX_LINES = 400


def room_of(parts):
    """The room of a module, given by its path within the package."""
    first = parts[0] if parts else '__init__'
    if first in ROW or (ROOT / first).is_dir():
        return first
    return '' if (ROOT / f'{first}.py').is_file() else '__init__'  # a name that the package itself exports


def imports(path):
    """Line and full name, in parts, of everything a file imports, wherever in the file."""
    package = ('timm_robust', *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split('.'))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[:len(package) + 1 - node.level] if node.level else ()
            module = tuple(node.module.split('.')) if node.module else ()
            yield from ((node.lineno, (*start, *module, alias.name)) for alias in node.names)


def test_every_room_has_its_place_in_the_flow():
    assert {path.parent.name for path in ROOT.glob('*/__init__.py')} == set(ROW) - {'', '__init__', '__main__'}


def test_no_import_runs_against_the_flow():
    wrong = []
    for path in FILES:
        own = room_of(path.relative_to(ROOT).with_suffix('').parts)
        for line, (top, *parts) in imports(path):
            theirs = room_of(parts)
            if top == 'timm_robust' and theirs != own and ROW[theirs] >= ROW[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {'.'.join(parts)}")
    assert not wrong


def test_the_command_line_is_read_in_one_place():
    readers = {
        path.relative_to(ROOT) for path in FILES if any(name[0] == 'argparse' for _, name in imports(path))}
    assert readers
    assert {path for path in readers if path.parts[0] != 'cli'} == {Path('training/timm_script.py')}


def test_no_file_is_long():
    lines = {path.relative_to(ROOT): len(path.read_text(encoding='utf-8').splitlines()) for path in FILES}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_errors_of_the_library_name_arguments_and_not_flags():
    flags = []
    for path in (p for p in FILES if p.relative_to(ROOT).parts[0] != 'cli' and p.name != 'timm_script.py'):
        for statement in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(statement, ast.Raise):
                texts = [node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)]
                flags += [f'{path.relative_to(ROOT)}:{statement.lineno} {text}' for text in texts
                          if isinstance(text, str) and re.search(r'(^|\W)--[a-z]', text)]
    assert not flags
