"""Cards, publishing and loading, with huggingface_hub and timm as they are against a Hub on this machine."""
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import READER, WRITER
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from safetensors.torch import load_file, save_file

from timm_robust.attacks import L2, Linf
from timm_robust.cli.card import _training, training_command
from timm_robust.cli.main import main
from timm_robust.evaluation import (
    AttackOutcome,
    DataFacts,
    EvaluationReport,
    Finding,
    ModelFacts,
    RunFacts,
    ThreatFacts,
    read_reports,
)
from timm_robust.evaluation.plan import threat_facts
from timm_robust.hub import Card, build_card_folder, card_text
from timm_robust.hub.benchmark import task_id
from timm_robust.hub.card import _eval_results, read_card, result_rows
from timm_robust.hub.metadata import doubts, overlap
from timm_robust.hub.papers import citations
from timm_robust.inputs import weights_sha256
from timm_robust.inputs.weights import logits_of_fixed_input

NAME = 'nofrost_resnet11_mnist.nofrost_test'
REPO = f'someone/{NAME}'
CARDS = Path(__file__).resolve().parents[2] / 'hub_cards'


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A small network, evaluated twice, and the args.yaml of a run."""
    from helpers import make_image_folder
    root = tmp_path_factory.mktemp('hub')
    torch.manual_seed(0)
    model = timm.create_model('nofrost_resnet11_mnist', num_classes=4, in_chans=3).eval()
    save_file(model.state_dict(), root / 'weights.safetensors')
    data = make_image_folder(root / 'data', splits=('test',), classes=tuple('abcd'), per_class=4, size=28)
    common = ['eval', '--model', 'nofrost_resnet11_mnist', '--num-classes', '4', '--in-chans', '3', '--checkpoint',
              str(root / 'weights.safetensors'), '--data-dir', str(data), '--split', 'test', '-j', '0', '-b', '8',
              '--allow-chance', '--device', 'cpu']
    assert main([*common, '--attacks', 'clean,fgsm,pgd2', '--output', str(root / 'first')]) == 0
    assert main([*common, '--attacks', 'square20', '--save-images', '0', '--output', str(root / 'second')]) == 0
    (root / 'args.yaml').write_text(yaml.safe_dump({
        'objective': 'nofrost', 'model': 'nofrost_resnet11_mnist', 'epochs': 3, 'warmup_epochs': 0, 'lr': .005,
        'data_dir': '/secret/place',
        'initial_checkpoint': 'start.safetensors',
        'attack_steps': 2, 'model_ema': True, 'scale': [.7, 1.]}))
    return root


def card(measured, output, *more, name=NAME, results=('first', 'second')):
    return main([
        'card', name, '--checkpoint', str(measured / 'weights.safetensors'), '--num-classes', '4', '--in-chans', '3',
        '--results', *(str(measured / r / 'results.json') for r in results), '--data-name', *['Squares'] * len(results),
        '--train-args', str(measured / 'args.yaml'), '--repo-id', REPO, '--output', str(output), *more])


@pytest.fixture(scope='module')
def folder(measured, tmp_path_factory):
    output = tmp_path_factory.mktemp('cards')
    assert card(measured, output) == 0
    return output / NAME


def test_results_may_be_given_by_their_folders(measured, folder, tmp_path):
    folders = ['--results', *(str(measured / name) for name in ('first', 'second'))]
    assert card(measured, tmp_path, *folders) == 0
    made = {name: path.read_bytes() for name, path in files(tmp_path / NAME).items()}
    assert made == {name: path.read_bytes() for name, path in files(folder).items()} and 'images.png' in made


def files(folder):
    """Everything in a folder, by path."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob('*') if path.is_file()}


def one_line(capsys, *words):
    error = capsys.readouterr().err.strip()
    assert '\n' not in error and all(word in error for word in words), error


def check_numbers(folder):
    """Every accuracy in the card is one of results.json, and the weights, if there, are those measured."""
    content = json.loads((folder / 'results.json').read_text())
    reports = [report for _, report in read_reports(folder / 'results.json')]
    assert {report.model.weights_sha256 for report in reports} == {content['weights_sha256']}
    assert json.loads((folder / 'config.json').read_text())['weights_sha256'] == content['weights_sha256']
    text = (folder / 'README.md').read_text()
    body = text.split('\n---\n', 1)[1]
    shown, low, high = zip(*re.findall(r'^\|.*\| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$', body, flags=re.M))
    numbers = {  # what two evaluations of the same images agree on is one number
        (outcome.name, str(outcome.threat), report.data.indices, report.settings.seed, report.accuracy(outcome.name),
         report.interval(outcome.name)) for report in reports for outcome in report.attacks}
    wanted = sorted(accuracy for *_, accuracy, _ in numbers)
    assert sorted(map(float, shown)) == [round(v, 2) for v in wanted]
    intervals = sorted(tuple(round(v, 1) for v in interval) for *_, interval in numbers)
    assert sorted(zip(map(float, low), map(float, high))) == intervals
    metadata = ModelCard(text).data.eval_results
    assert sorted(r.metric_value for r in metadata) == [round(v, 2) for v in wanted]
    for result in metadata:
        assert {'num_examples', 'seed'} <= set(result.metric_args)
        assert result.metric_name == 'Clean accuracy' or {'attack', 'norm', 'eps'} <= set(result.metric_args)
    for name in re.findall(r'!\[.*?\]\((.*?)\)', body):
        assert (folder / name).exists()


def test_every_number_of_a_card_was_measured(folder):
    check_numbers(folder)


@pytest.mark.parametrize('path', sorted(CARDS.glob('*/README.md')), ids=lambda p: p.parent.name)
def test_every_number_of_every_card(path):
    check_numbers(path.parent)
    card, evaluations, _ = read_card(path.parent)
    assert card.name == path.parent.name and path.read_text() == card_text(card, evaluations)


def test_an_attack_on_the_images_that_others_left_says_so(measured):
    report = EvaluationReport.load(measured / 'first')
    clean, fgsm, pgd = report.attacks
    left = dataclasses.replace(pgd, correct=[c if f else None for c, f in zip(pgd.correct, fgsm.correct)])
    card = Card(name=NAME, repo_id=REPO, origin='x')
    for attacks, shown in ((report.attacks, False), ((clean, fgsm, left), None in left.correct)):
        text = card_text(card, [('Squares', dataclasses.replace(report, attacks=attacks))])
        assert ('| pgd2 after fgsm |' in text) == ('worst case over both' in text) == shown
    assert None in left.correct


@pytest.mark.parametrize('path', sorted(CARDS.glob('*/README.md')), ids=lambda p: p.parent.name)
def test_the_training_command_of_every_card_is_that_of_its_log(path):
    args = CARDS.parent / 'train_scripts' / 'reproduce' / 'logs' / path.parent.name / 'args.yaml'
    run = yaml.safe_load(args.read_text())
    assert f'\n{training_command(run)}\n' in path.read_text()
    only_adversarial = run.get('adv_weight') == 1  # Madry's training under another name
    objective = 'madry' if only_adversarial and run['objective'] == 'nofrost' else run['objective']
    assert read_card(path.parent)[0].objective == _training(str(args)).objective == objective
    assert ('madry' in path.parent.name) == (objective == 'madry')


def test_what_a_card_says(folder, measured, tmp_path, monkeypatch):
    text = (folder / 'README.md').read_text()
    assert 'no network' not in text
    monkeypatch.setattr('timm_robust.hub.card.WEIGHTS_DIR', tmp_path)
    (tmp_path / f'{NAME}.safetensors').touch()
    assert card(measured, tmp_path, '--selection', 'Epoch 3, the last') == 0
    more = (tmp_path / NAME / 'README.md').read_text()
    assert f"`timm.create_model('{NAME}', pretrained=True)` needs no download" in more
    assert '\n```\n\nEpoch 3, the last.\n\n## Evaluation commands' in more
    assert 'NOT CHECKED' in text and 'NO AUTOATTACK' in text
    assert 'timm-robust train --objective nofrost' in text and '/secret/place' not in text and '--scale 0.7 1' in text
    assert '--initial-checkpoint start.safetensors' in text
    assert '@inproceedings{wang2022removing' in text and 'license: apache-2.0' in text
    assert f"timm.create_model('hf-hub:{REPO}', pretrained=True)" in text and 'import timm, timm_robust' in text
    evaluations = read_reports(folder / 'results.json')
    rows = result_rows(evaluations)
    assert result_rows([*evaluations, *evaluations]) == rows, 'a number stands there twice'
    assert [r[3] for r in rows][2] == 'clean' and rows[0][2] == 'Linf 8/255' and rows[0][0] == 'Squares'


def test_the_same_input_gives_the_same_bytes(measured, folder, tmp_path):
    assert card(measured, tmp_path) == 0
    again = tmp_path / NAME
    first, second = ({name: path.read_bytes() for name, path in files(f).items()} for f in (folder, again))
    assert first == second and '.eval_results/squares.yaml' in first
    # and written again from its results, without weights
    (again / 'model.safetensors').unlink()
    (again / 'README.md').write_text('spoiled')
    assert main(['card', str(again)]) == 0
    second = {name: path.read_bytes() for name, path in files(again).items()}
    assert second == {name: content for name, content in first.items() if name != 'model.safetensors'}
    assert main(['card', str(again), '--train-data', 'torch/mnist', '--repo-id', 'team/x']) == 0
    text = (again / 'README.md').read_text()
    assert 'Training set: `torch/mnist`' in text and 'hf-hub:team/x' in text
    assert ModelCard(text).data.datasets == ['ylecun/mnist']
    assert main(['card', str(again), '--checkpoint', 'x']) == 2


@pytest.mark.parametrize('objective', ['nofrost', 'nofrost_star'])
def test_an_objective_is_cited_whatever_the_network(objective):
    assert any('Removing Batch Normalization' in entry for entry in citations('resnet50', objective, False))
    assert not any('Removing Batch Normalization' in entry for entry in citations('resnet50', 'trades', False))


def test_networks_of_timm_are_named_as_timm_does(tmp_path):
    model = timm.create_model('nofrost_resnet26', num_classes=3).eval()
    EvaluationReport(
        model=ModelFacts(
            name='x', weights_sha256=weights_sha256(model), input_size=(3, 64, 64), mean=[.5] * 3, std=[.5] * 3,
            interpolation='bicubic', crop_pct=1., crop_mode='center'),
        data=DataFacts(split='test', indices=range(4), labels=[0] * 4),
        threat=ThreatFacts('Linf', .1, 'Linf 0.1'),
        settings=RunFacts(command='timm-robust eval'),
        attacks=[AttackOutcome('clean', {'attack': 'clean'}, None, '', [True, False, False, False])],
    ).save(tmp_path)
    build_card_folder(
        tmp_path / 'card', Card(name='nofrost_resnet26.some_tag', repo_id='a/b', origin='nowhere'), model,
        [str(tmp_path / 'results.json')], ['Squares'])
    text = (tmp_path / 'card' / 'README.md').read_text()
    assert 'Plain timm loads it too, as `nf_resnet26`' in text and 'transformers' in ModelCard(text).data.tags
    script = (
        'import sys, timm, torch; m = timm.create_model(sys.argv[1], pretrained=True); '
        'assert "timm_robust" not in sys.modules; print(type(m).__name__, m.num_classes)')
    done = subprocess.run(
        [sys.executable, '-c', script, f'local-dir:{tmp_path / "card"}'], capture_output=True, text=True)
    assert done.stdout.strip() == 'NormFreeNet 3', done.stderr


def test_a_card_of_other_weights_is_refused(measured, tmp_path, capsys):
    other = tmp_path / 'other.safetensors'
    weights = load_file(measured / 'weights.safetensors')
    save_file({k: v + 1 for k, v in weights.items()}, other)
    assert card(measured, tmp_path, '--checkpoint', str(other)) == 2
    one_line(capsys, 'was measured on other weights')
    assert not (tmp_path / NAME / 'README.md').exists()
    assert main(['card', 'resnet99', '--checkpoint', 'x', '--results', 'y', '--data-name', 'z']) == 2
    one_line(capsys, 'must be MODEL.TAG')
    weights = ['--checkpoint', str(other), '--results', 'y', '--data-name', 'z']
    assert main(['card', NAME, *weights, '--repo-id', REPO]) == 2
    one_line(capsys, 'say where the weights are from; give --train-args or --origin')
    assert main(['card', NAME, *weights, '--origin', 'nowhere', '--repo-id', 'a/b/c']) == 2
    one_line(capsys, '--repo-id a/b/c: ')
    for content, message in (
            ('epochs: 3', 'lacks objective or model'), ('a: [', 'cannot be read as YAML'),
            ('objective: nofrost\nmodel: resnet18\nepochs: x', "epochs='x': must be a whole number")):
        (tmp_path / 'args.yaml').write_text(content)
        assert card(measured, tmp_path, '--train-args', str(tmp_path / 'args.yaml')) == 2
        one_line(capsys, f"--train-args {tmp_path / 'args.yaml'}: ", message)
    assert card(measured, tmp_path, '--model', 'resnet18') == 2
    one_line(capsys, 'unrecognized arguments: --model resnet18')
    assert card(measured, tmp_path, '--pretrained') == 2
    one_line(capsys, 'unrecognized arguments: --pretrained')
    assert card(measured, tmp_path, '--results', str(measured / 'args.yaml'), '--data-name', 'x') == 2
    one_line(capsys, '--results', 'args.yaml: cannot be read as JSON')


EVIL = '`` | *x* <script>alert(1)</script>\n# Heading [a](b)'


def test_all_text_of_a_card_is_shown_as_it_is(measured):
    report = read_reports(measured / 'first' / 'results.json')[0][1]
    attacks = [dataclasses.replace(a, name=a.name + EVIL if i else a.name) for i, a in enumerate(report.attacks)]
    evil = dataclasses.replace(
        report, attacks=tuple(attacks), findings=(Finding('odd_' + EVIL, 'alarm', EVIL, {}),),
        settings=dataclasses.replace(report.settings, command='timm-robust eval ```\n# Heading', surrogate=EVIL))
    card = Card(
        name=NAME, repo_id=REPO, origin=EVIL, objective='', command='train ```` \n```\n# Heading', selection=EVIL,
        base_model=EVIL, model_args={'act_layer': EVIL})
    text = card_text(card, [(EVIL, evil)])
    body = text.split('\n---\n', 1)[1]
    outside = re.sub(r'^(`{3,})\w*\n.*?^\1$', '', body, flags=re.M | re.S)  # blocks of code end where they should
    assert [line for line in outside.splitlines() if line.startswith('#')] == [
        f'# {NAME}'.replace('_', r'\_'), '## Accuracy', '## Use', '## Training', '## Evaluation commands',
        '## Citation']
    in_line = re.sub(r'(`+) ?[^`].*?[^`] ?\1(?!`)', '', re.sub(r'\\`', '', outside))
    assert '<script' not in in_line and '[a](b)' not in in_line and '*x*' not in in_line.replace(r'\*x\*', '')
    rows = [line for line in outside.splitlines() if line.startswith('|')]
    assert {len(re.findall(r'(?<!\\)\|', row)) for row in rows} == {9}, 'a cell broke its row'
    own = dataclasses.replace(evil, settings=dataclasses.replace(evil.settings, surrogate=''))
    for attacked, results in ((evil, 1), (own, 3)):  # and the metadata is read back
        assert len(ModelCard(card_text(card, [(EVIL, attacked)])).data.eval_results) == results
    assert '<https://example.org/a_b>' in card_text(
        dataclasses.replace(card, origin='https://example.org/a_b', command=''), [('x', report)])


def publish(folder, *more, token=WRITER, monkeypatch=None):
    monkeypatch.setenv('HF_TOKEN', token)
    return main(['push', str(folder), '--repo-id', REPO, *more])


def names(hub, revision='main'):
    repo = hub.repos[REPO]
    return set(repo.commits[repo.commit_of(revision)]) - {'.gitattributes'}


def test_from_publishing_to_the_same_logits(hub, folder, monkeypatch, capsys):
    assert publish(folder, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert f'Uploaded: {hub.url}/{REPO}/commit/' in printed and WRITER not in printed
    assert names(hub) == set(files(folder)) and hub.repos[REPO].private
    assert len(hub.repos[REPO].commits) == 2, 'more than one commit'
    assert not any(name.endswith(('.bin', '.pth', '.pt', '.pkl')) for name in names(hub))
    info = HfApi().model_info(REPO)
    assert info.private and 'model.safetensors' in {f.rfilename for f in info.siblings}
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    own = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(logits_of_fixed_input(model), logits_of_fixed_input(own))
    assert weights_sha256(model) == json.loads((folder / 'config.json').read_text())['weights_sha256']
    # again, with nothing changed, and a change on a branch of its own
    assert publish(folder, monkeypatch=monkeypatch) == 0 and len(hub.repos[REPO].commits) == 2
    changed = shutil.copytree(folder, folder.parent / 'changed' / NAME, dirs_exist_ok=True)
    (changed / 'README.md').write_text((folder / 'README.md').read_text() + '\nMore.\n')
    assert publish(changed, '--revision', 'next', monkeypatch=monkeypatch) == 0
    repo = hub.repos[REPO]
    assert repo.commits[repo.commit_of('next')]['README.md'] != repo.commits[repo.commit_of('main')]['README.md']
    assert timm.create_model(f'hf-hub:{REPO}@next', pretrained=True).num_classes == 4
    assert publish(changed, '--create-pr', monkeypatch=monkeypatch) == 0
    assert len(repo.pull_requests) == 1 and 'discussions/1' in capsys.readouterr().out


def test_public_dry_run_and_organization(hub, measured, folder, tmp_path, monkeypatch, capsys):
    assert publish(folder, '--dry-run', monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in files(folder)) and 'Nothing was uploaded' in printed
    assert not hub.repos and not hub.log
    monkeypatch.setenv('HF_TOKEN', WRITER)
    assert main(['push', str(folder), '--org', 'team', '--public']) == 0
    assert list(hub.repos) == [f'team/{NAME}'] and not hub.repos[f'team/{NAME}'].private


def test_what_is_published_names_its_own_repository(hub, folder, tmp_path, monkeypatch, capsys):
    own = shutil.copytree(folder, tmp_path / NAME)
    with open(own / 'README.md', 'a') as file:
        file.write('\nA word of mine.\n')
    monkeypatch.setenv('HF_TOKEN', WRITER)
    assert main(['push', str(own)]) == 0
    assert list(hub.repos) == [f'me/{NAME}']
    repo = hub.repos[f'me/{NAME}']
    sent = repo.commits[repo.commit_of('main')]
    readme = sent['README.md'].decode()
    assert f'hf-hub:me/{NAME}' in readme and 'someone' not in readme and readme.endswith('\nA word of mine.\n')
    assert json.loads(sent['results.json'])['card']['repo_id'] == f'me/{NAME}'
    entries = parse_eval_result_entries(yaml.safe_load(sent['.eval_results/squares.yaml']))
    assert {e.source_url for e in entries} == {f'https://huggingface.co/me/{NAME}/blob/main/results.json'}
    assert 'someone' in (own / 'README.md').read_text(), 'the folder was changed'
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    assert main(['push', str(own)]) == 2
    one_line(capsys, '--repo-id: is missing', 'hf auth login')


def test_results_as_benchmarks_of_the_hub_collect_them(measured, folder, tmp_path):
    reports = [report for _, report in read_reports(folder / 'results.json')]
    entries = parse_eval_result_entries(yaml.safe_load((folder / '.eval_results' / 'squares.yaml').read_text()))
    found = {e.task_id: e.value for e in entries}
    expected = {(a.name, round(r.accuracy(a.name), 2)) for r in reports for a in r.attacks}
    assert len(found) == len(expected) == 4  # both evaluations have clean images
    for name, value in expected:
        task, = [t for t in found if f'-{name}' in t]
        assert found[task] == value and task.startswith('squares-16-')
    # the protocol of all cards in the folder above
    listed = yaml.safe_load((folder.parent / 'benchmark' / 'eval.yaml').read_text())
    assert {t['id'] for t in listed['tasks']} == set(found) and {t['split'] for t in listed['tasks']} == {'test'}
    assert all(set(t) == {'id', 'config', 'split'} for t in listed['tasks'])
    protocol = json.loads((folder.parent / 'benchmark' / 'protocol.json').read_text())
    pgd = next(own for task, own in protocol['tasks'].items() if 'pgd2' in task)
    assert pgd['attack']['steps'] == 2 and pgd['threat'] == {'norm': 'Linf', 'eps': 8 / 255}
    assert protocol['images'][pgd['images']]['indices'] == list(reports[0].data.indices)


def test_an_attack_after_others_is_a_task_of_its_own():
    names = [t['id'] for t in yaml.safe_load((CARDS / 'benchmark' / 'eval.yaml').read_text())['tasks']]
    assert any('autoattack-after-pgd20' in name for name in names)
    for path in CARDS.glob('*/.eval_results/*.yaml'):
        entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        assert entries and {e.task_id for e in entries} <= set(names)
        assert any('-autoattack-' in e.task_id for e in entries) == (
            '**NO AUTOATTACK**' not in (path.parents[1] / 'README.md').read_text())
    _, evaluations, _ = read_card(CARDS / 'nofrost_resnet20_cifar.madry_linf8_cifar10')
    of_today = {task_id(name, report, outcome) for name, report in evaluations for outcome in report.attacks}
    assert of_today <= set(names) and any('autoattack-after-pgd20' in name for name in of_today)


@pytest.mark.parametrize('path', sorted(CARDS.glob('*/config.json')), ids=lambda p: p.parent.name)
def test_every_config_loads_in_transformers(path):
    config = json.loads(path.read_text())
    assert 'num_classes' not in config['model_args'] and len(config['label_names']) == config['num_classes'] == 10


def test_cards_say_whether_plain_timm_has_the_network():
    script = 'import timm; print(*timm.list_models())'
    plain = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True).stdout.split()
    found = {}
    for path in CARDS.glob('*/config.json'):
        card, evaluations, _ = read_card(path.parent)
        architecture, text = json.loads(path.read_text())['architecture'], card_text(card, evaluations)
        assert (path.parent / 'README.md').read_text().startswith(text)
        found[architecture] = 'which plain timm does not have' in text
        assert found[architecture] == (architecture not in plain), architecture
    assert found['resnet20_cifar'] and not found['nf_resnet26']


def test_metadata_of_a_card():
    data = ModelCard((CARDS / 'nofrost_resnet20_cifar.nofrost_linf8_cifar10' / 'README.md').read_text()).data
    assert data.datasets == ['uoft-cs/cifar10']
    assert {'linf', 'eps-8-255', 'arxiv:2207.01156', 'arxiv:2003.01690', 'adversarial-robustness'} <= set(data.tags)
    assert 'transformers' not in data.tags, 'it needs an import'
    card, evaluations, _ = read_card(CARDS / 'nofrost_resnet20_cifar.nofrost_linf8_cifar10')
    fine_tuned = ModelCard(card_text(dataclasses.replace(card, base_model='timm/x'), evaluations)).data
    assert fine_tuned.base_model == 'timm/x' and fine_tuned.base_model_relation == 'finetune'


@pytest.mark.parametrize('train_data, train_split, split, doubtful', [
    ('torch/cifar10', 'train', 'test', False), ('CIFAR-10', 'train', 'train', True), ('cifar10', '', 'test', True),
    ('', '', 'test', True), ('imagenet', 'train', 'train', False), ('cifar10', 'train', 'all', True)])
def test_whether_images_could_have_been_in_training(train_data, train_split, split, doubtful):
    card, evaluations, _ = read_card(CARDS / 'nofrost_resnet20_cifar.nofrost_linf8_cifar10')
    name, report = evaluations[0]
    report = dataclasses.replace(report, data=dataclasses.replace(report.data, split=split))
    text = card_text(dataclasses.replace(card, train_data=train_data, train_split=train_split), [(name, report)])
    assert ('**MAYBE TRAINED ON**' in text) == doubtful
    assert f'CIFAR-10, split {split}: ' in text


def test_another_models_repository_is_left_alone(hub, folder, measured, tmp_path, monkeypatch, capsys):
    assert publish(folder, monkeypatch=monkeypatch) == 0
    other = tmp_path / 'nofrost_resnet11_mnist.another'
    assert card(measured, tmp_path, name=other.name) == 0
    before = len(hub.repos[REPO].commits)
    capsys.readouterr()
    assert publish(other, monkeypatch=monkeypatch) == 2
    one_line(capsys, f'--repo-id {REPO}: holds {NAME}, not nofrost_resnet11_mnist.another')
    assert publish(other, '--revision', 'fresh', monkeypatch=monkeypatch) == 2
    one_line(capsys, f'holds {NAME}, not')
    repo = hub.repos[REPO]
    assert list(repo.branches) == ['main']
    repo.commits[repo.branches['main']] = {'README.md': b'my own project'}
    assert publish(folder, monkeypatch=monkeypatch) == 2
    one_line(capsys, 'holds no model of this package')
    assert len(repo.commits) == before


EMPTY = 'nothing was committed, but the empty repository was created'
UNKNOWN = 'it is not known whether the commit arrived'
FAULTS = [
    (('POST', 'preupload', 403), 'the token may not write there', EMPTY),
    (('POST', 'objects/batch', 500), 'the Hub answered 500', EMPTY),
    (('PUT', 'storage', 'cut'), 'repeat the command', EMPTY),
    (('POST', '/commit/', 500), 'the Hub answered 500', UNKNOWN),
    (('POST', '/commit/', 429), 'too many requests', EMPTY),
    (('POST', '/commit/', 'cut'), 'the Hub did not answer', UNKNOWN),
    (('POST', 'repos/create', 401), 'the token is missing or not valid', 'nothing on the Hub was changed'),
    (('POST', 'repos/create', 'cut'), 'the Hub did not answer', 'it is not known whether the repository was created'),
    (('GET', 'api/models', 'cut'), 'the Hub did not answer', 'nothing on the Hub was changed'),
]


@pytest.mark.parametrize(
    'fault, message, state', FAULTS, ids=lambda v: '-'.join(map(str, v)) if isinstance(v, tuple) else '')
def test_an_upload_that_fails_says_what_is_known(hub, folder, monkeypatch, capsys, fault, message, state):
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)  # between its retries
    hub.faults += [fault] * 50
    assert publish(folder, monkeypatch=monkeypatch) == 2
    one_line(capsys, f'--repo-id {REPO}: ', message, state)
    assert names(hub) == set() if 'empty' in state else REPO not in hub.repos or not names(hub)
    hub.faults.clear()
    assert publish(folder, monkeypatch=monkeypatch) == 0
    assert names(hub) == set(files(folder))


def test_tokens_that_do_not_do(hub, folder, monkeypatch, capsys):
    for token, message in ((READER, 'may not write'), ('hf_wrong', 'not valid')):
        assert publish(folder, token=token, monkeypatch=monkeypatch) == 2
        one_line(capsys, message)
    assert not hub.repos


def linked(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def edit(folder, name, pattern, new):
    text = (folder / name).read_text()
    changed = re.sub(pattern, lambda match: new, text, count=1)
    assert changed != text
    (folder / name).write_text(changed)


def other_weights(folder):
    """Weights and config of another network, right by themselves."""
    weights = {k: v + 1 for k, v in load_file(folder / 'model.safetensors').items()}
    save_file(weights, folder / 'model.safetensors')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'weights_sha256': weights_sha256(weights)}))


@pytest.mark.parametrize('spoil, message', [
    (lambda f: (f / 'results.json').unlink(), 'has no results.json'),
    (lambda f: (f / 'README.md').unlink(), 'has no README.md'),
    (lambda f: (f / 'images.png').unlink(), 'has no images.png'),
    (lambda f: (f / 'model.safetensors').write_bytes(b'x'), 'header'),
    (lambda f: save_file({'a': torch.zeros(1)}, f / 'model.safetensors'), 'Missing key'),
    (lambda f: save_file({k: v + 1 for k, v in load_file(f / 'model.safetensors').items()}, f / 'model.safetensors'),
     'its weights do not match its config'),
    (lambda f: other_weights(f), 'results and weights belong to different networks'),
    (lambda f: edit(f, 'results.json', r'"weights_sha256": "\w+"', '"weights_sha256": "0"'),
     'results and weights belong to different networks'),
    (lambda f: linked(f / 'images.png', '/etc/passwd'), 'images.png is a link or not a file'),
    (lambda f: linked(f / 'README.md', f / 'config.json'), 'README.md is a link or not a file'),
    (lambda f: (f / 'images.png').write_text('root:x:0:0'), 'images.png is not a PNG image'),
    (lambda f: edit(f, 'results.json', r'"correct": \[', '"correct": [null, '), 'results.json'),
    (lambda f: edit(f, 'results.json', r'"accuracy": [\d.]+', '"accuracy": 99.9'), 'says 99.9 % but its outcomes'),
    (lambda f: edit(f, 'results.json', r'"accuracy": [\d.]+', '"accuracy": NaN'), 'says nan % but its outcomes'),
    (lambda f: edit(f, 'results.json', r'"eps": [\d.]+', '"eps": 0.0627'), 'does not match its hash'),
    (lambda f: edit(f, 'results.json', r'"labels": \[\s*\d', '"labels": [9'), 'does not match its hash'),
    (lambda f: edit(f, 'results.json', '"card": {', '"cards": {'), 'results.json holds no card'),
    (lambda f: edit(f, 'results.json', '"objective": "nofrost"', '"objective": "trades"'),
     'README.md does not match results.json'),
    (lambda f: edit(f, 'results.json', '"images.png"', '"../secret.png"'), 'is not a figure of an evaluation'),
    (lambda f: edit(f, 'README.md', r'\| [\d.]+ to [\d.]+ \|\n', '| 99.0 to 99.9 |\n'),
     'README.md does not match results.json'),
    (lambda f: edit(f, 'README.md', r'value: [\d.]+', 'value: 99.9'), 'README.md does not match results.json'),
    (lambda f: edit(f, 'README.md', r'> \*\*NOT CHECKED.*\n', ''), 'README.md does not match results.json'),
    (lambda f: edit(f, 'config.json', 'bicubic', 'nearest'), 'does not have the preprocessing of its evaluation'),
    (lambda f: (f / 'README.md').write_bytes(b'\xff'), 'README.md is not text'),
    (lambda f: (f / 'config.json').write_text('null'), 'must hold a JSON mapping'),
])
def test_a_folder_that_is_not_whole_or_was_changed(hub, folder, tmp_path, monkeypatch, capsys, spoil, message):
    own = shutil.copytree(folder, tmp_path / NAME)
    spoil(own)
    (own / 'notes.pkl').write_bytes(b'never sent')
    assert publish(own, monkeypatch=monkeypatch) == 2
    one_line(capsys, message)
    assert not hub.repos


def test_what_else_lies_in_a_folder_is_not_sent(hub, folder, tmp_path, monkeypatch):
    own = shutil.copytree(folder, tmp_path / NAME)
    linked(own / 'link_images.png', '/etc/passwd')
    for name in ('notes.pkl', 'my_images.png', '2_images.png'):
        (own / name).write_bytes(b'\x89PNG\r\n\x1a\n')
    assert publish(own, monkeypatch=monkeypatch) == 0
    assert names(hub) == set(files(folder))


def evaluate(measured, model, output):
    return main(['eval', '--model', model, '--attacks', 'clean', '--data-dir', str(measured / 'data'), '--split',
                 'test', '-j', '0', '--allow-chance', '--device', 'cpu', '--save-images', '0', '--output', str(output)])


LOADING = [
    (lambda hub: hub.faults.extend([('GET', 'cdn', 'cut')] * 50), ('cannot be fetched',)),
    (lambda hub: hub.faults.extend([('GET', 'cdn', 'half')] * 50), ('cannot be fetched',)),
    (lambda hub: setattr(hub.repos[REPO], 'gated', True), ()),
    (lambda hub: hub.repos.clear(), ()),
    (lambda hub: hub.faults.extend([('HEAD', 'config.json', 500)] * 50), ()),
    (lambda hub: tamper(hub), ('weights do not match its config',)),
]


def tamper(hub):
    """Another file in the place of the weights, right in form."""
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches['main']]
    from safetensors.torch import load, save
    data = save({k: v + .1 for k, v in load(hub.lfs[files['model.safetensors']]).items()})
    import hashlib
    files['model.safetensors'] = hashlib.sha256(data).hexdigest()
    hub.lfs[files['model.safetensors']] = data


@pytest.mark.parametrize('spoil, words', LOADING, ids=['cut', 'half', 'gated', 'missing', 'error', 'tampered'])
def test_loading_that_fails_says_so_in_a_line_and_works_after(
        hub, folder, measured, tmp_path, monkeypatch, capsys, spoil, words):
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)
    assert publish(folder, monkeypatch=monkeypatch) == 0
    monkeypatch.setenv('HF_TOKEN', READER)
    held = dict(hub.repos)
    weights = dict(hub.repos[REPO].commits[hub.repos[REPO].branches['main']])
    spoil(hub)
    capsys.readouterr()
    assert evaluate(measured, f'hf-hub:{REPO}', tmp_path / 'first') == 2
    error, = capsys.readouterr().err.strip().splitlines()
    assert error.startswith('timm-robust eval: error: ') and all(w in error for w in (REPO, *words))
    assert not (tmp_path / 'first' / 'results.json').exists()
    hub.faults.clear()
    hub.repos.update(held)
    hub.repos[REPO].gated = False
    hub.repos[REPO].commits[hub.repos[REPO].branches['main']].update(weights)
    assert evaluate(measured, f'hf-hub:{REPO}', tmp_path / 'second') == 0
    report = EvaluationReport.load(tmp_path / 'second')
    assert report.model.weights_sha256 == json.loads((folder / 'config.json').read_text())['weights_sha256']
    blobs = Path(os.environ['HF_HOME']) / 'hub'
    assert not list(blobs.rglob('*.incomplete')) or all(p.is_file() for p in blobs.rglob('*.incomplete'))


def test_models_are_listed_with_what_they_withstand(folder, monkeypatch, capsys):
    assert main(['models', '--cards', str(folder.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    line, = (line for line in lines if line.startswith('nofrost_resnet50.nofrost_linf8_in1k '))
    assert 'hf-hub, once published' in line
    named = folder.parent / 'nofrost_resnet50.nofrost_linf8_in1k'
    shutil.copytree(folder, named)
    content = json.loads((named / 'results.json').read_text())
    report = EvaluationReport.from_dict(content['evaluations'][0])
    of_pgd = report.attacks[-1]
    broken = dataclasses.replace(
        of_pgd, name='autoattack', attack={'attack': 'autoattack'}, correct=[False] * len(of_pgd.correct))
    content['evaluations'][0] = dataclasses.replace(report, attacks=[*report.attacks, broken]).to_dict()
    (named / 'results.json').write_text(json.dumps(content))
    assert main(['models', 'nofrost_resnet50.nofrost_linf8*', '--cards', str(folder.parent)]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[-2:] == [f"{report.accuracy('clean'):.2f}", '0.00']
    assert row[row.index('Squares') + 1] == str(report.data.num_examples)


def test_weights_in_the_package_are_listed_without_cards(tmp_path, capsys):
    from timm_robust.models._build import WEIGHTS_DIR
    names = [p.stem for p in WEIGHTS_DIR.glob('*.safetensors')]
    assert names and main(['models', '--cards', str(tmp_path)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in names:
        last = rows[name].split()[-1]
        assert 'in the package' in rows[name]
        if '"autoattack"' in (WEIGHTS_DIR / f'{name}.json').read_text():
            assert float(last) >= 0
        else:
            assert last == '-'


def test_what_an_attack_was_is_told_apart(measured, tmp_path):
    """Attacks crafted on another network are no accuracy of this one, and unusual settings are named."""
    first = EvaluationReport.load(measured / 'first')
    clean, pgd = first['clean'], first['pgd2']
    right, some = list(clean.correct), list(clean.correct)
    some[right.index(True)] = False
    small = dataclasses.replace(pgd, attack={**pgd.attack, 'step_size': .0001}, correct=right)
    others = {
        'small': dataclasses.replace(first, attacks=[small]),
        'crafted': dataclasses.replace(
            first, attacks=[clean, dataclasses.replace(pgd, correct=some)],
            settings=dataclasses.replace(first.settings, surrogate='resnet18', surrogate_sha256='f'))}
    for name, report in others.items():
        report.save(tmp_path / name)
    results = [str(measured / 'first'), str(tmp_path / 'small'), str(tmp_path / 'crafted')]
    assert main([
        'card', NAME, '--checkpoint', str(measured / 'weights.safetensors'), '--num-classes', '4', '--in-chans', '3',
        '--results', *results, '--data-name', *['Squares'] * 3, '--origin', 'here', '--repo-id', REPO, '--output',
        str(tmp_path / 'cards')]) == 0
    made = tmp_path / 'cards' / NAME
    card, evaluations, _ = read_card(made)
    assert {row[3]: row[6] for row in result_rows(evaluations) if 'pgd2' in row[3]} == {
        'pgd2': f"{first.accuracy('pgd2'):.2f}", 'pgd2 (step_size 0.0001)': f'{first.clean_accuracy:.2f}',
        'pgd2 crafted on resnet18': f'{first.clean_accuracy - 100 / 16:.2f}'}
    entries = parse_eval_result_entries(yaml.safe_load((made / '.eval_results' / 'squares.yaml').read_text()))
    assert sorted(e.value for e in entries if 'pgd2' in e.task_id) == sorted(
        [round(first.accuracy('pgd2'), 2), first.clean_accuracy])
    named = [r.metric_name for r in ModelCard(card_text(card, evaluations)).data.eval_results]
    assert [name for name in named if 'pgd2' in name] == [
        'Robust accuracy (pgd2, Linf 8/255)', 'Robust accuracy (pgd2 (step_size 0.0001), Linf 8/255)']
    assert first.accuracy('pgd2') < first.clean_accuracy - 100 / 16
    protocol = json.loads((tmp_path / 'cards' / 'benchmark' / 'protocol.json').read_text())
    assert sum('pgd2' in task for task in protocol['tasks']) == 2


@pytest.mark.parametrize('change, message', [
    ({'bn_mode': 'batch'}, 'with bn_mode batch, but the published network has population'),
    ({'model_kwargs': {'act_layer': 'silu'}}, "with model_kwargs {'act_layer': 'silu'}, but the published"),
    ({'logits': (1.,) * 8}, 'on a network with other logits, although its weights are the same')])
def test_a_card_is_of_the_network_as_it_is_published(measured, tmp_path, capsys, change, message):
    report = EvaluationReport.load(measured / 'first')
    dataclasses.replace(report, model=dataclasses.replace(report.model, **change)).save(tmp_path / 'other')
    assert card(measured, tmp_path, '--results', str(tmp_path / 'other'), '--data-name', 'Squares') == 2
    one_line(capsys, message)


@pytest.mark.parametrize('more', [['--gp', 'max'], ['--model-kwargs', 'act_layer=gelu']])
def test_arguments_that_leave_the_weights_as_they_are(measured, tmp_path, capsys, more):
    report = EvaluationReport.load(measured / 'first')
    assert len(report.model.logits) == 2 * 4 and card(measured, tmp_path) == 0
    assert card(measured, tmp_path / 'other', *more) == 2
    one_line(capsys, 'first', 'on a network with other logits')


@pytest.mark.parametrize('train_data, name, split, doubtful', [
    ('cifar10', 'CIFAR-10', 'test', False), ('cifar10', 'CIFAR-10', 'train', True),
    ('cifar10', 'CIFAR-10 training images', 'train', True), ('cifar10', 'CIFAR-10, first 60', 'test', True),
    ('torch/cifar10', 'CIFAR-100', 'test', False), ('imagenet', 'ImageNet-1k', 'validation', False),
    ('imagenet', 'ImageNet-1k', 'train', True), ('hfds/ILSVRC/imagenet-1k', 'ImageNet', 'validation', False),
    ('imagenet', 'Imagenette', 'validation', True), ('imagenette2', 'Imagenette', 'val', False),
    ('mine', 'Mine', 'test', False), ('mine', 'Yours', 'test', True), ('', 'CIFAR-10', 'test', True)])
def test_what_names_tell_about_common_images(measured, train_data, name, split, doubtful):
    report = EvaluationReport.load(measured / 'first')
    report = dataclasses.replace(report, data=dataclasses.replace(report.data, split=split))
    (found, text), = overlap(train_data, 'train', '', [(name, report)])
    assert found == doubtful, text
    assert ('a different data set' in text) == (name == 'CIFAR-100')


def test_checks_are_named_for_each_threat_model(measured):
    report = EvaluationReport.load(measured / 'first')
    diagnosed = dataclasses.replace(report, findings=(Finding('zero_gradients', 'ok', 'fine', {}),))

    def under(threat, attack, base):
        return dataclasses.replace(base, threat=threat, attacks=tuple(
            a if a.is_clean else dataclasses.replace(a, threat=threat, attack={'attack': attack})
            for a in base.attacks))

    linf, l2 = threat_facts(Linf('8/255')), threat_facts(L2(.5))
    complete = under(linf, 'autoattack', diagnosed)
    assert doubts([], [('Squares', complete)]) == []
    assert doubts([], [('Squares', complete), ('Squares', under(l2, 'pgd', report))]) == [
        ('not checked', 'timm-robust diagnose was not run for Squares, L2 0.5.'),
        ('no AutoAttack', 'Accuracies of Squares, L2 0.5 are upper bounds; expect lower ones under AutoAttack.')]
    assert doubts([], [('Squares', complete), ('Circles', under(linf, 'pgd', report))]) == [
        ('not checked', 'timm-robust diagnose was not run for Circles, Linf 8/255.'),
        ('no AutoAttack', 'Accuracies of Circles, Linf 8/255 are upper bounds; expect lower ones under AutoAttack.')]
    weaker = under(threat_facts(Linf('4/255')), 'autoattack', report)
    assert doubts([], [('Squares', complete), ('Squares', weaker)]) == [
        ('not checked', 'timm-robust diagnose was not run for Squares, Linf 4/255.')]
    assert doubts(['text'], [('Squares', under(linf, 'pgd', report)), ('Squares', under(l2, 'pgd', report))]) == [
        ('maybe trained on', 'text'),
        ('not checked', 'timm-robust diagnose was not run on these weights: gradients may be masked.'),
        ('no AutoAttack', 'These accuracies are upper bounds; expect lower ones under AutoAttack.')]


def test_metadata_of_attacks_in_sequence(measured):
    report = EvaluationReport.load(measured / 'first')
    first, last = report.real_attacks[0], report.real_attacks[-1]
    cut = dataclasses.replace(last, correct=(None, *last.correct[1:]))
    report = dataclasses.replace(report, attacks=tuple(cut if a is last else a for a in report.attacks))
    assert first is not last
    found = _eval_results([('Squares', report)])
    after, = (r for r in found if ' after ' in r.metric_name)
    assert after.metric_name.startswith(f'Robust accuracy ({last.label} after {first.label}')
    assert after.metric_args['attack'] == report.described(cut) and after.metric_args['effort'] == last.effort
    assert after.metric_args['interval'] == [round(v, 2) for v in report.interval(cut.name)]
