"""Whatever happens to a run on its way, what it comes to in the end is what an undisturbed one comes to."""
import csv
import multiprocessing
import random
import shutil
import time

import disruption
import pytest
import torch
from helpers import make_image_folder
from safetensors.torch import load_file

CONTEXT = multiprocessing.get_context('forkserver')  # imports once; its children begin at once


@pytest.fixture(scope='module', autouse=True)
def _imports_once():
    CONTEXT.set_forkserver_preload(['disruption'])


def started(target, *args):
    process = CONTEXT.Process(target=target, args=tuple(map(str, args[:-1])) + args[-1:])
    process.start()
    return process


def ended(target, *args):
    """Exit code and seconds of a run."""
    process, start = started(target, *args), time.monotonic()
    process.join(120)
    return process.exitcode, time.monotonic() - start


class Evaluations:
    """Evaluations in folders; each says whether it is complete."""

    def __init__(self, root):
        self.root = root
        self.measure()
        assert 0 < sum(self.expected['attacks'][1]['correct']) < 48, 'the comparison says nothing'

    def arguments(self, name, room=None):
        return disruption.evaluation, self.root / name, self.root / 'log', room

    def measure(self):
        self.whole('first')  # whose time has the imports in it
        self.seconds, self.expected = self.whole('undisturbed'), self.outcome('undisturbed')
        assert self.outcome('first') == self.expected, 'runs do not repeat'

    def whole(self, name):
        code, seconds = ended(*self.arguments(name))
        assert code == 0, (self.root / 'log').read_text()
        return seconds

    def complete(self, name):
        return (self.root / name / 'results.json').exists() and not list((self.root / name).glob('progress-*'))

    def outcome(self, name):
        return disruption.without_times(self.root / name / 'results.json')


class Trainings(Evaluations):
    """Trainings; one that was cut off before its first checkpoint begins anew."""

    def __init__(self, root):
        self.root, self.data = root, make_image_folder(root / 'images', per_class=8)
        self.measure()

    def arguments(self, name, room=None):
        if (self.root / name).exists() and not (self.root / name / 'run' / 'last.pth.tar').exists():
            shutil.rmtree(self.root / name)
        return disruption.training, self.root / name, self.root / 'log', self.data, room

    def complete(self, name):
        return (self.root / name / 'run' / 'export' / 'model.safetensors').exists()

    def outcome(self, name):
        run = self.root / name / 'run'
        last = torch.load(run / 'last.pth.tar', weights_only=True)
        with open(run / 'summary.csv') as file:
            rows = [{k: v for k, v in row.items() if 'time' not in k} for row in csv.DictReader(file)]
        weights = load_file(run / 'export' / 'model.safetensors')
        return {**flat({k: last[k] for k in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'task_state')}),
                'export': flat(weights), 'rows': rows}


def flat(content):
    """Tensors as lists of their values, so that == compares every one of them."""
    if isinstance(content, torch.Tensor):
        return content.tolist()
    if isinstance(content, dict):
        return {key: flat(value) for key, value in content.items()}
    return [flat(value) for value in content] if isinstance(content, (list, tuple)) else content


@pytest.fixture(scope='module', params=[Evaluations, Trainings], ids=['evaluation', 'training'])
def runs(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp('runs'))


pytestmark = pytest.mark.slow
seeds = pytest.mark.parametrize('seed', range(3))


@seeds
def test_killed_at_random_moments(runs, seed):
    moments, kills = random.Random(seed), 0
    name = f'killed{seed}'
    while kills < 3:
        process = started(*runs.arguments(name))
        time.sleep(moments.uniform(0, runs.seconds))
        kills += process.is_alive()
        process.kill()
        process.join()
        if runs.complete(name):  # before its moment came
            shutil.rmtree(runs.root / name)
    if not runs.complete(name):
        runs.whole(name)
    assert runs.outcome(name) == runs.expected


@seeds
def test_a_full_disk(runs, seed):
    name, rooms = f'full{seed}', random.Random(seed)
    largest = max(path.stat().st_size for path in (runs.root / 'undisturbed').rglob('*') if path.is_file())
    failed = 0
    for _ in range(3):
        code, _ = ended(*runs.arguments(name, rooms.randrange(largest)))
        failed += code != 0
        if code == 0:
            break
    if not runs.complete(name):
        runs.whole(name)
    assert failed and runs.outcome(name) == runs.expected


def test_two_in_one_folder(runs):
    both = [started(*runs.arguments('both')) for _ in range(2)]
    for process in both:
        process.join(120)
    assert 0 in [p.exitcode for p in both], (runs.root / 'log').read_text()
    assert runs.outcome('both') == runs.expected
