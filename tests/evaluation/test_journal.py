"""Resuming: what fits is used, what does not is not, and a folder is one run's."""
import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from helpers import TinyNet
from torch.utils.data import TensorDataset

from timm_robust.attacks import Linf
from timm_robust.errors import InputError
from timm_robust.evaluation import EvaluationReport, Journal, Runner, evaluate
from timm_robust.evaluation.journal import FolderLock, batch_hashes, image_hashes
from timm_robust.evaluation.subject import network_sha256
from timm_robust.layers import set_bn_mode

NEAR = Linf(.005)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x, model = torch.rand(40, 3, 8, 8), TinyNet().eval()
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
        return model, x, model(x).argmax(1)


def measured(model, x, y, output, **kwargs):
    return evaluate(model, x, y, **{
        'attacks': 'clean,pgd2', 'threat': NEAR, 'batch_size': 2, 'progress': False, 'save_images': 0,
        'output': output, **kwargs})


@pytest.fixture
def cut_off(problem, tmp_path, monkeypatch):
    """A folder of an evaluation that was stopped half-way, and what was attacked since."""
    attacked = []
    craft = Runner.craft

    def spy(self, attack, x, labels, indices, *threat):
        if len(attacked) >= 2 and not resumed:
            raise KeyboardInterrupt
        attacked.append((str(attack), list(indices)))
        return craft(self, attack, x, labels, indices, *threat)

    resumed = []
    monkeypatch.setattr(Runner, 'craft', spy)
    with pytest.raises(KeyboardInterrupt):
        measured(*problem, tmp_path / 'out')
    resumed.append(True)
    done = {i for _, indices in attacked for i in indices}
    assert len(done) == 32 and not (tmp_path / 'out' / 'results.json').exists()
    attacked.clear()
    return tmp_path / 'out', attacked


def outcomes(report):
    return [a.correct for a in report.attacks]


@pytest.mark.parametrize('batch_size', [2, 7])
def test_what_is_done_is_not_done_again_whatever_the_batches(problem, cut_off, tmp_path, batch_size):
    folder, attacked = cut_off
    with pytest.raises(InputError, match='output=.*holds an unfinished evaluation; pass `resume=True`'):
        measured(*problem, folder)
    assert not attacked
    report = measured(*problem, folder, batch_size=batch_size, resume=True)
    assert sorted(i for _, indices in attacked for i in indices) == list(range(32, 40))
    whole = measured(*problem, tmp_path / 'whole', batch_size=batch_size)
    assert outcomes(report) == outcomes(whole) and report.data == whole.data
    assert 0 < sum(report['pgd2'].correct) < 40, 'the comparison says nothing'
    assert not list(folder.glob('progress*')) and not (folder / '.lock').exists()


CHANGES = {
    'weights': (lambda m, x, y: (_moved(m), x, y), {}, 'network='),
    'eps': (lambda m, x, y: (m, x, y), {'threat': Linf(.006)}, 'threat="Linf 0.005", now "Linf 0.006"'),
    'steps': (lambda m, x, y: (m, x, y), {'attacks': 'clean,pgd3'}, None),
    'step size': (lambda m, x, y: (m, x, y), {'attack_settings': {'step_size': .001}}, 'attack='),
    'seed': (lambda m, x, y: (m, x, y), {'seed': 1}, 'seed=0, now 1'),
    'exact': (lambda m, x, y: (m, x, y), {'exact': True}, 'exact=false, now true'),
    'an image': (lambda m, x, y: (m, x.index_fill(0, torch.tensor(3), .5), y), {}, '1 outcomes of pgd2'),
    'a label': (lambda m, x, y: (m, x, y.index_fill(0, torch.tensor(3), int(y[3] + 1) % 4)), {}, 'images have changed'),
}


def _moved(model):
    with torch.no_grad():
        model.fc.bias[0] += .01
    return model


@pytest.mark.parametrize('change', CHANGES)
def test_what_does_not_fit_is_not_used_and_said(problem, cut_off, tmp_path, caplog, change):
    alter, settings, said = CHANGES[change]
    folder, _ = cut_off
    changed = alter(*problem)
    report = measured(*changed, folder, resume=True, **settings)
    assert outcomes(report) == outcomes(measured(*changed, tmp_path / 'whole', **settings))
    if said:
        assert said in caplog.text and 'not used' in caplog.text
    assert '\n' not in ''.join(record.getMessage() for record in caplog.records)


def test_other_versions_do_not_fit(problem, cut_off, monkeypatch, caplog):
    from timm_robust.evaluation import stages
    folder, attacked = cut_off
    monkeypatch.setattr(stages, 'versions', lambda: {'timm_robust': '9', 'torch': '8', 'timm': '7', 'python': '6'})
    measured(*problem, folder, resume=True)
    assert 'versions=' in caplog.text and len({i for _, indices in attacked for i in indices}) == 40


def test_a_journal_of_other_things_is_survived(problem, cut_off, tmp_path, caplog):
    folder, attacked = cut_off
    path = folder / 'progress-0.jsonl'
    lines = path.read_bytes().splitlines()
    outcome = next(k for k, line in enumerate(lines) if b'"attack": "pgd2", "indices"' in line)
    entry = json.loads(lines[outcome])
    entry['correct'][0] ^= 1  # a bit that flipped
    lines[outcome] = json.dumps(entry).encode()
    lines += [b'{"context": "a", "attack": "pgd2", "indices": [33', b'\xff\xfe\x00', b'[]', b'3', b'null', b'{}',
              b'{"check": 1}', b'[' * 100_000]
    path.write_bytes(b'\n'.join(lines))
    (folder / 'progress-7.jsonl').write_bytes(b'')
    report = measured(*problem, folder, resume=True)
    assert '9 damaged lines of the journal' in caplog.text
    assert outcomes(report) == outcomes(measured(*problem, tmp_path / 'whole'))
    assert set(range(16)) <= {i for _, indices in attacked for i in indices}, 'the broken outcomes are made anew'


def test_lines_without_settings_are_used_if_they_fit(problem, cut_off):
    """A disk that was full when the settings were to be written."""
    folder, attacked = cut_off
    path = folder / 'progress-0.jsonl'
    path.write_bytes(b'\n'.join(line for line in path.read_bytes().splitlines() if b'"settings"' not in line))
    measured(*problem, folder, resume=True)
    assert sorted(i for _, indices in attacked for i in indices) == list(range(32, 40))


def test_sweeps_resume_too(problem, tmp_path, monkeypatch):
    craft, calls = Runner.craft, []

    def spy(self, attack, x, labels, indices, *threat):
        calls.append(self.plan.threat.eps)
        if calls.count(.02) == 2 and len(calls) < 20:
            raise KeyboardInterrupt
        return craft(self, attack, x, labels, indices, *threat)

    monkeypatch.setattr(Runner, 'craft', spy)
    settings = dict(eps_sweep=[.01, .02], batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        measured(*problem, tmp_path / 'out', **settings)
    assert EvaluationReport.load(tmp_path / 'out').attacks, 'the accuracies were written before the sweep'
    before = len(calls)
    report = measured(*problem, tmp_path / 'out', resume=True, **settings)
    assert len(calls) - before == 2, 'the second and third pool of the last eps'
    whole = measured(*problem, tmp_path / 'whole', **settings)
    assert report.eps_sweep == whole.eps_sweep and outcomes(report) == outcomes(whole)


def test_outcomes_of_a_batch_hang_on_all_of_it(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = set_bn_mode(TinyNet(norm=True).eval(), 'batch')
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    hashes = image_hashes(x, y)
    other = image_hashes(x.index_fill(0, torch.tensor(1), .5), y)
    assert [a == b for a, b in zip(hashes, other)] == [True, False] + [True] * 6
    assert not any(a == b for a, b in zip(batch_hashes(hashes), batch_hashes(other)))
    assert batch_hashes(hashes[:2])[::-1] != batch_hashes(hashes[1::-1])
    calls, craft = [], Runner.craft

    def spy(self, attack, x, labels, indices, *threat):
        calls.append(list(indices))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return craft(self, attack, x, labels, indices, *threat)

    monkeypatch.setattr(Runner, 'craft', spy)
    with pytest.raises(KeyboardInterrupt):
        measured(model, x, y, tmp_path / 'out', batch_size=4)
    measured(model, x, y, tmp_path / 'out', batch_size=4, resume=True)
    assert calls[2:] == [[4, 5, 6, 7]]


def test_one_folder_is_one_runs(problem, tmp_path):
    with FolderLock(tmp_path / 'out'):
        with pytest.raises(InputError, match='output=.*another run is writing to this folder'):
            measured(*problem, tmp_path / 'out')
    measured(*problem, tmp_path / 'out')
    child = subprocess.Popen(
        [sys.executable, '-c', 'import sys, time\nfrom pathlib import Path\n'
         'from timm_robust.evaluation.journal import FolderLock\nlock = FolderLock(Path(sys.argv[1]))\n'
         'print("held", flush=True)\ntime.sleep(60)', str(tmp_path / 'other')], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'held\n'
    with pytest.raises(InputError, match='another run'):
        measured(*problem, tmp_path / 'other')
    child.send_signal(signal.SIGKILL)
    child.wait()
    measured(*problem, tmp_path / 'other')  # the lock of a process that was killed is free


def test_a_full_disk_is_an_oserror_and_what_was_written_is_used(problem, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, 'No space left on device')
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        measured(*problem, tmp_path / 'out')
    report = measured(*problem, tmp_path / 'out', resume=True)
    assert outcomes(report) == outcomes(measured(*problem, tmp_path / 'whole'))


def test_memory_alone():
    journal = Journal()
    with journal:
        journal.record('a', [3, 4], ['', ''], [True, False], 1.5)
    assert journal.correct['a'] == {3: True, 4: False} and journal.seconds['a'] == 1.5
    other = Journal()
    other.labels, other.hashes = {3: 7}, {3: 'x'}
    other.record('a', [5], [''], [True], 4.)
    journal.merge([other.state()])
    assert journal.correct['a'] == {3: True, 4: False, 5: True} and journal.seconds['a'] == 4.
    assert journal.labels == {3: 7} and journal.hashes == {3: 'x'}


def test_a_data_set_in_another_order_is_noticed(problem, cut_off, caplog, tmp_path):
    """Index and content go together: the same images at other places are other images."""
    folder, _ = cut_off
    model, x, y = problem
    order = torch.arange(39, -1, -1)
    caplog.set_level(logging.WARNING)
    report = evaluate(
        model, TensorDataset(x[order], y[order]), attacks='clean,pgd2', threat=NEAR, batch_size=2, progress=False,
        save_images=0, output=folder, resume=True, workers=0)
    assert 'the images have changed since' in caplog.text
    assert outcomes(report) == outcomes(measured(model, x[order], y[order], tmp_path / 'whole'))
    assert isinstance(model, nn.Module)


class Scaled(nn.Module):
    """A network whose constant is neither a parameter, printed nor public."""

    def __init__(self, model, factor):
        super().__init__()
        self.model, self._factor = model, factor

    def forward(self, x):
        return self.model(self._factor * x)


def test_outcomes_of_another_network_with_the_same_weights_are_refused(problem, tmp_path, monkeypatch):
    model, x, y = problem
    crafted, craft = [], Runner.craft

    def interrupted(*args):
        crafted.append(args)
        return craft(*args) if len(crafted) < 2 else pytest.fail('cut off')

    with monkeypatch.context() as patched, pytest.raises(pytest.fail.Exception):
        patched.setattr(Runner, 'craft', interrupted)
        measured(Scaled(model, .8), x, y, tmp_path / 'out', allow_chance=True)
    with pytest.raises(InputError, match='model: classifies images differently from the evaluation that is resumed'):
        measured(Scaled(model, 1.), x, y, tmp_path / 'out', resume=True)
    measured(Scaled(model, .8), x, y, tmp_path / 'out', resume=True)


def test_numbers_and_strings_of_a_network_are_part_of_its_hash(problem):
    def made(**more):
        network = Scaled(problem[0], 1.)
        for name, value in more.items():
            setattr(network, name, value)
        return network_sha256(network)

    assert made() == made() == made(_private=1)
    assert len({made(), made(scale=1.), made(scale=2.), made(other=2.), made(mode='a'), made(mode='b')}) == 6
