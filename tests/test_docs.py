"""Python in README.md and docs/ runs as printed, commands have existing flags, and links of the site lead somewhere."""
import importlib
import importlib.util
import re
import shlex
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
from helpers import make_image_folder
from hub_server import Repo

from timm_robust.cli import train
from timm_robust.cli.main import COMMANDS, main
from timm_robust.training.run import _Run

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


def take_images(archive, folder, **per_class):
    """Extract the first images of each class of the splits named."""
    taken = Counter()
    with tarfile.open(archive) as opened:
        for member in opened:
            split, name = Path(member.name).parts[-3:-1] if member.isfile() else ('', '')
            if taken[split, name] < per_class.get(split, 0):
                taken[split, name] += 1
                opened.extract(member, folder, filter='data')
    assert len(taken) == 10 * len(per_class)


@pytest.mark.slow
def test_commands_of_the_evaluation_page(cifar10_archive, tmp_path, monkeypatch):
    """As printed, on ten images; those on ImageNet need images that are not available."""
    monkeypatch.chdir(tmp_path)
    take_images(cifar10_archive, tmp_path / 'cifar10', test=1)
    commands = [words for words in printed_commands([ROOT / 'docs' / 'evaluation.md'])
                if 'imagenet' not in words and words[-1] != '...']
    assert {words[0] for words in commands} == {'eval', 'transfer', 'compare', 'diagnose', 'properties', 'statistics'}
    for words in commands:
        assert main(words) == 0, words


@pytest.mark.slow
@pytest.mark.parametrize('page', ['README.md', 'docs/harden.md', 'docs/training.md', 'docs/results.md'])
def test_commands_of_a_guide(page, hub, cifar10_archive, tmp_path, monkeypatch):
    """As printed and in order, on few images; those that need thousands are left out.

    ResNets are at 32 pixels, and training ends after an epoch, in float32, since many CPUs emulate bfloat16.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'train_scripts').symlink_to(ROOT / 'train_scripts')
    for folder, per_class in (('my data', 70), ('imagenet', 128)):
        make_image_folder(tmp_path / folder, splits=['train'], per_class=per_class)
        make_image_folder(tmp_path / folder, splits=['validation'], per_class=2)
    if page == 'docs/results.md':
        take_images(cifar10_archive, tmp_path / 'DIR', train=105)
    configs = timm.models._registry._model_pretrained_cfgs
    for name in [name for name in configs if name.split('.')[0] in ('resnet18', 'nofrost_resnet50')]:
        monkeypatch.setitem(configs, name, replace(configs[name], input_size=(3, 32, 32), test_input_size=None))
    repo = hub.repos['timm/resnet18.a1_in1k'] = Repo()
    repo.commits['0' * 40]['model.safetensors'] = safetensors.torch.save(timm.create_model('resnet18').state_dict())
    run_epochs, read_config = _Run.run_epochs, train.read_config

    def run_one(run):
        run.num_epochs = 1
        return run_epochs(run)

    monkeypatch.setattr(_Run, 'run_epochs', run_one)
    monkeypatch.setattr(train, 'read_config', lambda argv: replace(read_config(argv), amp=False))
    commands = [words for words in printed_commands([ROOT / page])
                if words[0] != 'quickstart' and words[-1] != '...' and '--num-examples' not in words]
    assert [words[0] for words in commands] == {
        'README.md': ['train', 'eval'], 'docs/harden.md': ['train', 'train', 'eval'], 'docs/training.md': ['train'],
        'docs/results.md': ['train']}[page]
    for words in commands:
        assert main(words) == 0, words


def test_the_badges_name_the_versions_of_pyproject():
    project, readme = ((ROOT / name).read_text() for name in ('pyproject.toml', 'README.md'))
    badges = dict(re.findall(r'^!\[(\w+):? ([\w.-]+)\+?\]\(https://img.shields.io/badge/', readme, re.M))
    assert badges == {
        'Python': re.search(r"requires-python = '>=([\d.]+)'", project)[1],
        'torch': re.search(r"'torch>=([\d.]+)'", project)[1],
        'timm': re.search(r"'timm>=([\d.]+),", project)[1], 'License': re.search(r"license = '([\w.-]+)'", project)[1]}
    assert all(readme.count(f'badge/{name}-{version.replace("-", "--")}') == 1 for name, version in badges.items())


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
