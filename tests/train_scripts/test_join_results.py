"""Joining evaluations of parts of a data set, against the evaluation of all of it."""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import make_image_folder
from timm.models import save_for_hf

import timm_robust  # noqa: F401
from timm_robust.cli.main import main
from timm_robust.data import balanced_indices
from timm_robust.evaluation import EvaluationReport

FOLDER = Path(__file__).parents[2] / 'train_scripts' / 'reproduce'


@pytest.fixture
def join(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import join_results

    def run(*argv):
        monkeypatch.setattr(sys, 'argv', ['join_results.py', *map(str, argv)])
        join_results.main()

    return run


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(8)
    model = timm.create_model('nofrost_resnet11_mnist', num_classes=3, in_chans=3)
    save_for_hf(model, str(tmp_path / 'net'), safe_serialization=True, model_args={'num_classes': 3, 'in_chans': 3})
    return f'local-dir:{tmp_path / "net"}'


def test_parts_are_what_one_evaluation_finds(join, network, tmp_path):
    data = make_image_folder(tmp_path / 'data', splits=('test',), classes=tuple('abc'), per_class=4, size=28)
    indices = balanced_indices(np.arange(12) // 4, 12, 11, 0)

    def evaluated(name, *flags):
        assert main(['eval', '--model', network, '--data-dir', str(data), '--split', 'test', '-j', '0', '-b', '2',
                     '--attacks', 'clean,pgd2,square5', '--eps', '0.003', '--worst-case', '--allow-chance', '--device',
                     'cpu', '--save-images', '0', *flags, '--output', str(tmp_path / name)]) == 0
        return EvaluationReport.load(tmp_path / name)

    whole = evaluated('whole', '--num-examples', '11')
    assert list(whole.data.indices) == indices and 0 < whole.worst_case_accuracy < whole.clean_accuracy
    for name, chosen in (('first', indices[:4]), ('second', indices[4:])):
        (tmp_path / f'{name}.txt').write_text(''.join(f'{"abc"[i // 4]}/{i % 4}.png\n' for i in chosen))
        evaluated(name, '--subset', str(tmp_path / f'{name}.txt'))
    files = [tmp_path / name / 'results.json' for name in ('first', 'second')]
    given = ('--model', network, '--data-dir', data, '--output', tmp_path / 'joined')
    join(*files, *given)
    joined = EvaluationReport.load(tmp_path / 'joined')

    def plain(report):  # without times, and words of the command that have other places
        return replace(
            report, attacks=[replace(a, seconds=0.) for a in report.attacks],
            settings=replace(report.settings, date='', command=' '.join(sorted(report.settings.command.split()))))

    command = whole.settings.command.replace(f' --output {tmp_path / "whole"}', '')
    assert plain(joined) == plain(replace(whole, settings=replace(whole.settings, command=command)))
    with pytest.raises(SystemExit, match='not in its order'):
        join(*files[::-1], *given)
    other = timm.create_model('nofrost_resnet11_mnist', num_classes=3, in_chans=3)
    save_for_hf(other, str(tmp_path / 'other'), safe_serialization=True, model_args={'num_classes': 3, 'in_chans': 3})
    with pytest.raises(SystemExit, match='its weights are not those'):
        join(*files, '--model', f'local-dir:{tmp_path / "other"}', *given[2:])
    report = EvaluationReport.load(files[0])
    clean, *attacks = report.attacks
    wrong = clean.correct.index(False)
    clean = replace(clean, correct=(*clean.correct[:wrong], True, *clean.correct[wrong + 1:]))
    replace(report, attacks=(clean, *attacks)).save(tmp_path / 'changed')
    with pytest.raises(SystemExit, match='clean images have other predictions'):
        join(tmp_path / 'changed', files[1], *given)
