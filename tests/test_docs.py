"""Python in README.md and docs/ runs as printed, commands have existing flags, and links of the site lead somewhere."""
import importlib
import importlib.util
import re
import shlex
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from timm_robust.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')))
SNIPPETS = [
    pytest.param(code, id=f'{path.stem}-{i}') for path in PAGES
    for i, code in enumerate(re.findall(r'^```python\n(.*?)^```', path.read_text(), re.M | re.S))]


def module_of(command):
    return importlib.import_module(f"timm_robust.cli.{command.replace('-', '_')}")


def printed_commands(pages):
    """The words after `timm-robust` of every command in pages."""
    lines = [line for path in pages
             for block in re.findall(r'^ *```bash\n(.*?)^ *```', path.read_text(), re.M | re.S)
             for line in block.replace('\\\n', ' ').split('\n')]
    yield from words_of(lines)


def examples():
    """The words after `timm-robust` of every example in a help text."""
    for name in COMMANDS:
        yield from words_of(getattr(getattr(module_of(name), 'build_parser', object)(), 'examples', ()))


def words_of(lines):
    for line in lines:
        words = shlex.split(line.replace('-m timm_robust ', ' timm-robust ').split(' > ')[0], comments=True)
        if 'timm-robust' in words:
            yield words[words.index('timm-robust') + 1:]


@pytest.mark.parametrize('code', SNIPPETS)
def test_snippet(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for library in ('accelerate', 'lightning'):
        if f'{library} import' in code or f'import {library}' in code:
            pytest.importorskip(library, reason=f'{library} is not installed')
    exec(compile(code, 'snippet', 'exec'), {'__name__': 'snippet'})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize('words', [
    pytest.param(words, id=' '.join(words[:3])) for words in (*printed_commands(PAGES), *examples())])
def test_flags_of_a_printed_command(words):
    if words[-1] == '...' and not words[-2].startswith('--'):
        words.pop()
    if hasattr(module_of(words[0]), 'build_parser'):
        module_of(words[0]).build_parser().parse_args(words[1:])  # an unknown flag or a wrong value is an InputError


@pytest.mark.slow
def test_commands_of_the_evaluation_page(cifar10_archive, tmp_path, monkeypatch):
    """As printed, on ten images; those on ImageNet need images that are not available."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(cifar10_archive) as archive:
        taken = Counter()
        for member in archive:
            folder = str(Path(member.name).parent)
            if '/test/' in f'/{member.name}' and member.isfile() and not taken[folder]:
                taken[folder] += 1
                archive.extract(member, 'cifar10', filter='data')
    assert len(taken) == 10
    commands = [words for words in printed_commands([ROOT / 'docs' / 'evaluation.md'])
                if 'imagenet' not in words and words[-1] != '...']
    assert {words[0] for words in commands} == {'eval', 'transfer', 'compare', 'diagnose', 'properties', 'statistics'}
    for words in commands:
        assert main(words) == 0, words


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'docs' / 'site' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def site():
    return _script('build')


def test_links_lead_to_pages_of_the_site_or_name_a_file(site):
    texts = {name: site.linked(source.read_text(), source) for source, name in site.PAGES.items()}
    assert '[training](training.md)' in texts['index.md']
    assert 'the cards (`hub_cards`)' in texts['results.md'] and '[table](index.md)' in texts['harden.md']
    for text in texts.values():
        for target in re.findall(r'\]\((?!http)([^)#]+)', text):
            assert target in texts or (ROOT / 'docs' / target).suffix == '.png' and (ROOT / 'docs' / target).is_file()
    with pytest.raises(FileNotFoundError, match=r'README.md links to docs/none.md'):
        site.linked('[x](docs/none.md)', ROOT / 'README.md')


def test_the_site_lists_every_flag_and_every_public_name(site):
    flags = site.flags()
    assert '--gamma-sweep' in flags and '--trades-beta' in flags and '## quickstart' in flags
    assert '::: timm_robust.attacks.PGD\n' in site.reference('attacks')
    assert '::: timm_robust.evaluate\n' in site.reference('')


def test_flags_of_timm_that_are_lacking_have_a_reason_and_no_others(tmp_path):
    lists = _script('timm_flags')
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / 'version.py').write_text("__version__ = '1.2.3'")

    def write(script, *more):
        lacking = [flag for names, _ in lists.reasons(script) for flag in names]
        (tmp_path / script).write_text('\n'.join(
            f"group.add_argument('-x', '{flag}', type=int)" for flag in (*lacking, '--model', *more)))
        return len(lacking)

    counts = {script: write(script) for script in lists.COMMANDS}
    made, kept = lists.page(tmp_path), lists.PAGE.read_text()
    rows = [line for line in made.splitlines() if line.startswith('|')]
    assert rows == [line for line in kept.splitlines() if line.startswith('|')], 'write the page again'
    assert 'timm 1.2.3.' in made and f"train.py: {counts['train.py']} of {counts['train.py'] + 1} are not in" in made
    write('train.py', '--brand-new')
    with pytest.raises(SystemExit, match=r"train.py: \['--brand-new'\] need a reason"):
        lists.page(tmp_path)
    write('train.py')
    lists.REASONS['validate.py']['--eps'] = 'is a flag of ours'
    with pytest.raises(SystemExit, match=r"validate.py: .*\['--eps'\] no longer do"):
        lists.page(tmp_path)
