"""A first run: classes are those of the data, and each command ends with the next one, which works as printed."""
import shlex

import pytest
import torch
from helpers import make_image_folder

from timm_robust import EvaluationReport
from timm_robust.cli.main import main

TINY = ['--model', 'nofrost_resnet11_mnist', '--in-chans', '3', '--img-size', '32', '-b', '16', '-j', '0',
        '--warmup-epochs', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    return home, make_image_folder(home / 'my data', classes=('a', 'b', 'c', 'd', 'e', 'f'), per_class=6)


def printed(capsys):
    text = capsys.readouterr().out
    assert text.count('\nNext:\n') == 1
    words = shlex.split(text.split('\nNext:\n')[1])
    assert words[0] == 'timm-robust'
    return words[1:]


def test_train_eval_card_as_printed(world, capsys, monkeypatch):
    home, folder = world
    monkeypatch.chdir(home)
    assert main(['train', str(folder), *TINY, '--objective', 'madry', '--attack-norm', 'L2', '--attack-eps', '0.25',
                 '--attack-steps', '1', '--epochs', '1', '--val-split', 'val', '--experiment', 'mine']) == 0
    command = printed(capsys)
    assert command == [
        'eval', str(folder), '--norm', 'L2', '--eps', '0.25', '--attacks', 'clean,pgd20,autoattack', '--split', 'val',
        '--model', 'output/train/mine/export']
    assert main([*command, '--attacks', 'clean,fgsm', '--allow-chance', '-j', '0', '--output', 'out']) == 0
    report = EvaluationReport.load('out')
    assert report.model.num_classes == 6 and str(report.threat) == 'L2 0.25'
    card = printed(capsys)
    assert main(card) == 0
    page = (home / 'hub_cards/nofrost_resnet11_mnist.mine/README.md').read_text()
    assert 'L2 0.25' in page and 'my data' in page and '--objective madry' in page
    assert main(['convert', 'output/train/mine/last.pth.tar', '--model', 'nofrost_resnet11_mnist',
                 '-o', 'weights.safetensors']) == 0
    after = printed(capsys)
    assert after[:1] == ['eval'] and after[after.index('--data-dir') + 1] == 'DIR'
    after[after.index('DIR')] = str(folder)
    assert main([*after, '--num-classes', '6', '--in-chans', '3', '--split', 'val', '--attacks', 'clean',
                 '--allow-chance', '-j', '0']) == 0


def test_the_next_command_never_evaluates_training_images(world, capsys, monkeypatch):
    home, folder = world
    monkeypatch.chdir(home)
    assert main(['train', str(folder), *TINY, '--objective', 'standard', '--epochs', '1', '--val-split', 'train',
                 '--val-fraction', '0.4', '--experiment', 'held_out']) == 0
    command = printed(capsys)
    assert command == ['eval', str(folder), '--attacks', 'clean,pgd20,autoattack', '--model',
                       'output/train/held_out/export']
    assert main([*command, '--attacks', 'clean', '--allow-chance', '-j', '0', '--output', 'held_out']) == 0
    assert EvaluationReport.load('held_out').data.split == 'validation'


def test_a_number_that_is_given_wins_over_the_data(world, capsys, monkeypatch):
    home, folder = world
    monkeypatch.chdir(home)
    assert main(['train', str(folder), *TINY, '--num-classes', '5', '--epochs', '1']) == 2
    assert '--num-classes 5: the training data has 6 classes' in capsys.readouterr().err


def test_the_network_is_that_of_the_number_given(world, monkeypatch):
    home, folder = world
    monkeypatch.chdir(home)
    states = []
    for name, flags in (('found', []), ('given', ['--num-classes', '6'])):
        assert main(['train', str(folder), *TINY, *flags, '--val-split', 'val', '--epochs', '1', '--experiment', name]
                    ) == 0
        states.append(torch.load(f'output/train/{name}/last.pth.tar', weights_only=True)['state_dict'])
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_top5_of_six_classes_and_not_of_five(world, capsys, monkeypatch, tmp_path):
    home, folder = world
    monkeypatch.chdir(tmp_path)
    five = make_image_folder(tmp_path / 'five', classes=('a', 'b', 'c', 'd', 'e'), per_class=6)
    for data, shown in ((folder, True), (five, False)):
        assert main(['train', str(data), *TINY, '--val-split', 'val', '--epochs', '1', '--experiment', 'x']) == 0
        head = (tmp_path / 'output/train/x/summary.csv').read_text().split('\n')[0]
        assert 'eval_top1' in head and ('eval_top5' in head) == shown
        (tmp_path / 'output').rename(tmp_path / f'output{shown}')
    assert main(['train', str(five), *TINY, '--val-split', 'val', '--epochs', '1', '--eval-metric', 'top5']) == 2
    assert "--eval-metric top5: is always 100 % with 5 classes; choose 'top1'" in capsys.readouterr().err
