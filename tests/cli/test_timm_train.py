"""`timm-robust timm-train` with a stand-in for train.py and, where TIMM_TRAIN_SCRIPT names one, the real file."""
import csv
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import yaml
from helpers import make_image_folder, run_cli
from timm.task import ClassificationTask

from timm_robust.attacks import InputSpace
from timm_robust.cli.main import main
from timm_robust.cli.timm_train import _add_flags
from timm_robust.tasks import OBJECTIVES, Teacher
from timm_robust.training import timm_script
from timm_robust.training.timm_script import TimmScript, load_script

STAND_IN = Path(__file__).parent / 'stand_in_train.py'
REAL = os.environ.get('TIMM_TRAIN_SCRIPT', '')


@pytest.fixture(params=['stand_in', 'real'])
def script(request):
    if request.param == 'stand_in':
        return STAND_IN
    if not REAL:
        pytest.skip('set TIMM_TRAIN_SCRIPT to the train.py of a checkout of timm')
    return Path(REAL)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('data'), per_class=12)


def flags(folder, output, *more):
    return ['--data-dir', str(folder), '--model', 'nofrost_resnet20_cifar', '--num-classes', '2', '--epochs', '1',
            '--batch-size', '8', '--lr', '.01', '--workers', '0', '--device', 'cpu', '--output', str(output),
            '--experiment', 'run', '--no-prefetcher', *more]


def summary(output):
    with open(output / 'run' / 'summary.csv') as file:
        return list(csv.DictReader(file))


def train(script, *argv):
    done = run_cli('timm-train', script, *argv, OMP_NUM_THREADS='1')
    assert done.returncode == 0, done.stderr
    return done


def test_without_an_objective_it_is_the_plain_script(script, folder, tmp_path):
    plain = subprocess.run(
        [sys.executable, script, *flags(folder, tmp_path / 'plain', '--model', 'resnet10t')], capture_output=True,
        text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert plain.returncode == 0, plain.stderr
    train(script, *flags(folder, tmp_path / 'ours', '--model', 'resnet10t'))
    assert summary(tmp_path / 'plain') == summary(tmp_path / 'ours')


def test_objective_and_robust_validation(script, folder, tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text(yaml.safe_dump({'objective': 'nofrost', 'adv_weight': .7, 'attack_steps': 2}))
    argv = flags(folder, tmp_path, '-c', str(config), '--robust-eval-steps', '3', '--robust-eval-samples', '10',
                 '--eval-metric', 'robust_top1', '--attack-eps', '64/255', '--model-ema')
    train(script, *argv)
    row, = summary(tmp_path)
    assert 0 <= float(row['eval_robust_top1']) <= 100
    args = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert (args['objective'], args['adv_weight'], args['attack_eps']) == ('nofrost', .7, '64/255')


class Dot(nn.Module):
    """The class is whether the first pixel is bright: eps fools just where it lies within eps of one half."""

    def __init__(self, space):
        super().__init__()
        self.space = space
        self.threshold = nn.Parameter(torch.tensor(.5))

    def forward(self, x):
        lead = self.space.to_pixels(x)[:, :, 0, 0].mean(1) - self.threshold
        return torch.stack([-lead, lead], 1)


def driven(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', [str(STAND_IN), *argv])
    driver = TimmScript(load_script(str(STAND_IN)), _add_flags)
    driver.script.main()
    cfg = timm.get_pretrained_cfg('nofrost_resnet20_cifar')
    assert driver.space == InputSpace(cfg.mean, cfg.std)
    return driver


def test_the_task_is_that_of_the_flags(folder, tmp_path, monkeypatch):
    task = driven(monkeypatch, *flags(
        folder, tmp_path, '--objective', 'sat', '--seed', '5', '--attack-eps-warmup-epochs', '1', '--awp-gamma', '.01',
        '--attack-steps', '2')).task
    assert (task.seed, task.steps_per_epoch, task.eps_warmup_steps, task.awp.gamma) == (5, 3, 3, .01)
    assert task.space == InputSpace.of(task.bare_model) and task.step == 3


def test_schedules_of_the_task_follow_the_first_epoch(folder, tmp_path, monkeypatch):
    task = driven(monkeypatch, *flags(
        folder, tmp_path, '--objective', 'sat', '--attack-steps', '2', '--epochs', '4', '--start-epoch', '2')).task
    assert task.step == 4 * 3


def test_the_teacher_reaches_the_task(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(timm_script, 'build_teacher', lambda config, dataset, size, device, **kwargs: asked.append(
        (config.model, len(dataset), tuple(size))) or Teacher(Dot(InputSpace()), config.weight))
    task = driven(monkeypatch, *flags(
        folder, tmp_path, '--objective', 'sat', '--adv-weight', '0', '--robust-teacher', 'x', '--robust-teacher-weight',
        '.25')).task
    assert task.teacher.weight == .25 and asked == [('x', 24, (3, 32, 32))]


def test_robust_validation_measures_what_it_says(folder, tmp_path, monkeypatch):
    driver = driven(monkeypatch, *flags(
        folder, tmp_path, '--robust-eval-steps', '3', '--robust-eval-samples', '16', '--attack-eps', '64/255'))
    driver.task = ClassificationTask(Dot(driver.space), verbose=False)
    driver.task.setup_ema(decay=.5)
    driver.task.trainable_module.threshold.data.fill_(9.)  # the averaged network alone tells the classes apart

    def validated(ema):
        return driver.validate(
            driver.task.get_eval_model(ema=ema), driver.evaluation, nn.CrossEntropyLoss(), driver.args,
            device=torch.device('cpu'), amp_autocast=nullcontext)

    metrics = validated(ema=True)
    x, y = (torch.cat(parts) for parts in zip(*driver.evaluation))
    lead = driver.space.to_pixels(x)[:, :, 0, 0].mean(1) - .5
    right = (lead > 0) == y.bool()
    assert len(y) == 16 and sorted(y.tolist()) == [0] * 8 + [1] * 8
    held = right & (lead.abs() > 64 / 255)
    assert 0 < held.sum() < right.sum(), 'the comparison says nothing'
    assert metrics['robust_top1'] == pytest.approx(100 * held.float().mean().item())
    assert validated(ema=False)['robust_top1'] == 50


def test_every_objective_reaches_the_loop(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    losses = set()
    for objective in OBJECTIVES:
        argv = flags(folder, tmp_path / objective, '--objective', objective, '--attack-steps', '2')
        argv += ['--adv-weight', '.4'] if objective == 'nofrost' else []
        argv += ['--adv-weight', '.9'] if objective == 'fat' else []
        argv += ['--model', 'test_efficientnet'] if objective in ('mbnat', 'apart') else []
        if objective == 'nofrost_star':
            argv.remove('--no-prefetcher')
        assert main(['timm-train', str(STAND_IN), *argv]) == 0
        losses.add(summary(tmp_path / objective)[0]['train_loss'])
    assert len(losses) == len(OBJECTIVES)


@pytest.mark.parametrize('more,message', [
    (['--objective', 'trade'], '--objective trade: unknown'),
    (['--eval-metric', 'robust_top1'], '--eval-metric robust_top1: needs robust validation; pass --robust-eval-steps'),
    (['--objective', 'fat', '--mixup', '.2'], 'leave out --mixup'),
    (['--objective', 'sat', '--jsd-loss'], '--jsd-loss: is incompatible with --objective sat'),
    (['--objective', 'sat', '--kd-model-name', 'resnet18'], '--kd-model-name resnet18: is incompatible with'),
    (['--objective', 'apart', '--opt', 'adahessian'], '--opt adahessian: needs second derivatives'),
    (['--objective', 'sat', '--torchscript'], '--torchscript: is incompatible with --objective sat'),
    (['--kd-model-name', 'resnet18', '--robust-eval-steps', '2'],
     '--kd-model-name resnet18: is incompatible with --robust-eval-steps 2'),
])
def test_bad_input_is_one_line(more, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    assert main(['timm-train', str(STAND_IN), *flags(folder, tmp_path, *more)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and '\n' not in error
    assert not (tmp_path / 'run').exists()


def test_a_script_finds_what_lies_beside_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))
    (tmp_path / 'beside_it.py').write_text('')
    (tmp_path / 'train.py').write_text(f'import beside_it\n{STAND_IN.read_text()}')
    assert load_script(str(tmp_path / 'train.py')).parser
    (tmp_path / 'train.py').write_text('from timm.models import of_a_later_timm\n')
    assert main(['timm-train', str(tmp_path / 'train.py')]) == 2
    error = capsys.readouterr().err.strip()
    assert 'cannot be imported' in error and 'install the version of timm it belongs to' in error and '\n' not in error


def test_scripts_it_cannot_drive(tmp_path, capsys):
    old = tmp_path / 'train.py'
    old.write_text('parser = main = validate = _parse_args = create_model = create_loader = train_one_epoch = None\n')
    assert main(['timm-train', str(old)]) == 2
    assert "it has no ClassificationTask; timm's train.py has used tasks since 1.0.23" in capsys.readouterr().err
    assert main(['timm-train', str(tmp_path / 'nowhere.py')]) == 2
    assert 'no such file' in capsys.readouterr().err
    assert main(['timm-train']) == 2
