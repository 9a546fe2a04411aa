"""An attack, an objective and a norm of one's own, one file each outside the package, on the command line."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import documented_attack, make_image_folder

OBJECTIVE = '''
"""A power of the loss on adversarial images."""
from dataclasses import dataclass
from typing import ClassVar

from timm_robust import Objective, register_objective
from timm_robust.settings import setting
from timm_robust.tasks import RobustTask


class SquaredTask(RobustTask):
    def __init__(self, *args, power=2., **kwargs):
        super().__init__(*args, **kwargs)
        self.power = power

    def loss(self, x, adv, target):
        output = self.trainable_module(adv)
        return {'loss': self.criterion(output, target) ** self.power, 'output': output}


@register_objective
@dataclass(frozen=True, kw_only=True)
class Squared(Objective):
    """L(x*) to a power."""
    name: ClassVar[str] = 'squared'
    power: float = setting(2., 'power of the loss', metavar='P')

    def task_class(self):
        return SquaredTask
'''

NORM = '''
"""The L4 norm."""
from timm_robust import ThreatModel, register_norm


@register_norm
class L4(ThreatModel):
    """The fourth root of the sum of fourth powers."""
    norm = 'L4'

    def size(self, delta):
        return delta.flatten(1).norm(4, dim=1)

    def steepest(self, gradient):
        direction = gradient.sign() * gradient.abs() ** (1 / 3)
        return direction / self.size(direction).clamp_min(1e-12).view(-1, 1, 1, 1)
'''

PLUGINS = ('--plugin', 'my_attack', '--plugin', 'my_objective', '--device-modules', 'my_norm')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with the three files and some data, and what runs a command in it."""
    folder = tmp_path_factory.mktemp('plugins')
    for name, text in (('my_attack', documented_attack()), ('my_objective', OBJECTIVE), ('my_norm', NORM)):
        (folder / f'{name}.py').write_text(text)
    make_image_folder(folder / 'data', classes=('a', 'b', 'c'), per_class=8, size=28)

    def commands(*argvs):
        script = f'from timm_robust.cli.main import main\nfor argv in {argvs}:\n    try:\n        print(main(argv))\n'
        done = subprocess.run(
            [sys.executable, '-c', script + '    except SystemExit:\n        pass'], cwd=folder, capture_output=True,
            text=True, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return folder, commands


@pytest.fixture(scope='module')
def export(world):
    folder, commands = world
    assert commands([
        'train', 'data', '--model', 'nofrost_resnet11_mnist', '--num-classes', '3', *PLUGINS, '--objective', 'squared',
        '--squared-power', '1.5', '--attack-norm', 'l4', '--attack-eps', '0.5', '--attack-steps', '2', '--epochs', '2',
        '-b', '4', '-j', '0', '--device', 'cpu', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3', '--output',
        'runs', '--experiment', 'one', '--robust-eval-steps', '2']).stdout.endswith('0\n')
    return folder / 'runs' / 'one'


def test_training(export):
    args = (export / 'args.yaml').read_text()
    assert 'objective: squared' in args and 'squared_power: 1.5' in args and 'attack_norm: L4' in args
    rows = (export / 'summary.csv').read_text().splitlines()
    assert len(rows) == 3 and 'robust_top1' in rows[0]


def test_evaluation(world, export):
    folder, commands = world
    shown = commands([
        'eval', '--model', str(export / 'export'), '--data-dir', 'data', *PLUGINS, '--attacks', 'clean,noise,pgd2',
        '--tries', '3', '--norm', 'L4', '--eps', '0.5', '-b', '8', '-j', '0', '--device', 'cpu', '--allow-chance',
        '--output', 'out']).stdout
    assert 'noise3' in shown and 'L4 0.5' in shown
    found = json.loads((folder / 'out' / 'results.json').read_text())
    assert [a['attack'] for a in found['attacks'][1:]] == [
        {'attack': 'noise', 'tries': 3},
        {**found['attacks'][2]['attack'], 'attack': 'pgd', 'steps': 2}]
    assert found['threat'] == {'norm': 'L4', 'eps': .5, 'text': 'L4 0.5'}


def test_settings_are_flags_with_help(world):
    shown = ' '.join(world[1](['eval', *PLUGINS, '--help-all'], ['train', '--help-all']).stdout.split())
    assert '--tries TRIES random images to try (noise)' in shown
    assert 'Linf, L2, L1, L4' in shown and ', noise, ' in shown
    assert '--squared-power P power of the loss (default: 2.0)' in shown


def test_unknown_without_the_module(world):
    found = world[1](
        ['models', '--plugin', 'no_such'], ['train', '--objective', 'squared'],
        ['eval', '--attacks', 'noise3', '--data-dir', 'data'])
    assert found.stdout.split() == ['2'] * 3
    plugin, objective, attack = found.stderr.strip().splitlines()
    assert '--plugin no_such: cannot be imported' in plugin
    assert '--objective squared: unknown' in objective and '--attacks noise3: unknown attack' in attack
