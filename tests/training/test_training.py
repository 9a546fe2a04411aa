"""Whole runs of `timm-robust train` on a small image folder."""
import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import CountingBackend, TinyNet, make_image_folder, run_cli, run_distributed
from timm.task import ClassificationTask

from timm_robust.attacks import InputSpace, Linf
from timm_robust.cli.main import main
from timm_robust.cli.train import read_config
from timm_robust.errors import InputError
from timm_robust.inputs import Process
from timm_robust.training import TrainConfig
from timm_robust.training.build import mixed_precision, resolve_lr
from timm_robust.training.checkpoint import AtomicCheckpointSaver
from timm_robust.training.data import open_training_data
from timm_robust.training.loop import validate_robust

TINY = ['--model', 'nofrost_resnet11_mnist', '--in-chans', '3', '--img-size', '32', '--num-classes', '2', '-b', '8',
        '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0', '-j', '0', '--attack-steps', '2', '--device', 'cpu']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), per_class=16)


def train(folder, output, *extra):
    return main(['train', *TINY, '--data-dir', str(folder), '--output', str(output), '--experiment', 'run', *extra])


def checkpoint(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def test_a_run_leaves_everything_behind(folder, tmp_path):
    assert train(
        folder, tmp_path, '--objective', 'nofrost', '--epochs', '3', '--robust-eval-steps', '3',
        '--robust-eval-samples', '20', '--eval-metric', 'robust_top1', '--model-ema', '--model-ema-warmup',
        '--mixup', '0.2', '--clip-grad', '1', '--grad-accum-steps', '3', '--reprob', '0.3', '--channels-last',
        '--attack-eps-warmup-epochs', '1') == 0
    run = tmp_path / 'run'
    rows = list(csv.DictReader(open(run / 'summary.csv')))
    assert [r['epoch'] for r in rows] == ['0', '1', '2']
    assert {'train_loss', 'train_clean_loss', 'train_adv_loss', 'train_clean_top1', 'train_adv_top1', 'eval_top1',
            'eval_robust_top1', 'lr'} <= set(rows[0])
    args = yaml.safe_load(open(run / 'args.yaml'))
    assert args['objective'] == 'nofrost' and args['mixup'] == 0.2
    assert (run / 'curves.png').stat().st_size > 5000
    best = checkpoint(run / 'model_best.pth.tar')
    assert best['metric'] == max(float(r['eval_robust_top1']) for r in rows)
    model = timm.create_model(f'local-dir:{run / "export"}', pretrained=True)
    assert equal(dict(model.state_dict()), dict(best['state_dict_ema'])) and model.in_chans == 3


def test_args_yaml_repeats_the_run(folder, tmp_path):
    assert train(folder, tmp_path, '--objective', 'sat', '--epochs', '1') == 0
    first = checkpoint(tmp_path / 'run' / 'last.pth.tar')
    again = tmp_path / 'again'
    assert main(['train', '-c', str(tmp_path / 'run' / 'args.yaml'), '--output', str(again)]) == 0
    assert equal(first['state_dict'], checkpoint(again / 'run' / 'last.pth.tar')['state_dict'])


@pytest.mark.parametrize('more,lr', [
    (dict(), .2 * 3), (dict(opt='adamw'), .2 * 3 ** .5), (dict(opt='adamw', lr_base_scale='linear'), .2 * 3),
    (dict(lr_base_scale='sqrt'), .2 * 3 ** .5), (dict(lr=.7), .7)])
def test_learning_rate_follows_the_global_batch(more, lr):
    config = TrainConfig(batch_size=16, grad_accum_steps=3, lr_base=.2, lr_base_size=32, **more)
    assert resolve_lr(config, world_size=2, batch_size=16) == pytest.approx(lr)


def test_args_yaml_gives_way_to_flags(folder, tmp_path):
    config = read_config([*TINY, str(folder), '--momentum', '.7'])
    (tmp_path / 'args.yaml').write_text(config.to_yaml())
    again = read_config(['-c', str(tmp_path / 'args.yaml'), '--epochs', '9'])
    assert (again.epochs, again.momentum, again.model) == (9, .7, config.model)


def test_a_run_cut_before_its_export_is_finished(folder, tmp_path, capsys):
    flags = ['--objective', 'sat', '--epochs', '1']
    assert train(folder, tmp_path, *flags) == 0
    run, log = tmp_path / 'run', capsys.readouterr().err
    assert '(epoch 0), trained in 0:00:' in log
    data = checkpoint(run / 'last.pth.tar')['args']['training_data']
    assert f' images (fingerprint {data[:12]}), epochs 0 to 0' in log
    files = {name: (run / 'export' / name).read_bytes() for name in ('config.json', 'model.safetensors')}
    resumed = [*flags, '--resume', str(run / 'last.pth.tar')]
    assert train(folder, tmp_path, *resumed) == 2 and 'has already trained 1; choose more' in capsys.readouterr().err
    (run / 'export' / 'config.json').unlink()
    assert train(folder, tmp_path, *resumed) == 0 and '(epoch 0); weights' in capsys.readouterr().err
    assert {name: (run / 'export' / name).read_bytes() for name in files} == files


def test_another_run_is_not_gone_on_over(folder, tmp_path, capsys):
    for name in ('a', 'b'):
        assert train(folder, tmp_path / name, '--epochs', '1') == 0
    first, second = (tmp_path / name / 'run' / 'last.pth.tar' for name in ('a', 'b'))
    files = {p: p.read_bytes() for p in second.parent.iterdir() if p.is_file()}
    flags = ['--epochs', '2', '--resume', str(first)]
    assert train(folder, tmp_path / 'b', *flags) == 2 and 'already holds a run' in capsys.readouterr().err
    assert {p: p.read_bytes() for p in second.parent.iterdir() if p.is_file()} == files
    assert train(folder, tmp_path / 'c', *flags) == 0


def test_rows_of_other_metrics_are_put_aside_on_resume(folder, tmp_path):
    assert train(folder, tmp_path, '--epochs', '1', '--objective', 'sat') == 0
    run = tmp_path / 'run'
    sat = (run / 'summary.csv').read_text()
    assert train(folder, tmp_path, '--epochs', '2', '--resume', str(run / 'last.pth.tar')) == 0
    assert (run / 'summary-before-1.csv').read_text() == sat
    row, = csv.DictReader(open(run / 'summary.csv'))
    assert row['epoch'] == '1' and 'train_adv_loss' not in row and 0 <= float(row['eval_top1']) <= 100


def test_what_was_validated_is_exported(folder, tmp_path):
    assert train(
        folder, tmp_path, '--epochs', '1', '--model-ema', '--model-ema-force-cpu', '--crop-mode', 'squash') == 0
    best = checkpoint(tmp_path / 'run' / 'model_best.pth.tar')
    assert not equal(best['state_dict'], best['state_dict_ema'])
    model = timm.create_model(f'local-dir:{tmp_path / "run" / "export"}', pretrained=True)
    assert equal(dict(model.state_dict()), dict(best['state_dict']))
    assert model.pretrained_cfg['crop_mode'] == 'squash'


@pytest.mark.parametrize('classes', [('a', 'b'), ('b', 'c')])
def test_a_classifier_of_other_classes_is_reinitialized(folder, tmp_path, caplog, classes):
    """timm would keep it, since it has the right number of outputs."""
    assert train(folder, tmp_path, '--objective', 'standard', '--epochs', '1') == 0
    export = tmp_path / 'run' / 'export'
    data, other = make_image_folder(tmp_path / 'data', classes=classes), tmp_path / 'other'
    assert train(
        data, other, '--model', f'local-dir:{export}', '--pretrained', '--objective', 'standard', '--epochs', '1',
        '--lr', '1e-9') == 0
    first, second = (timm.create_model(f'local-dir:{path}', pretrained=True)
                     for path in (export, other / 'run' / 'export'))
    pairs = zip(first.named_parameters(), second.parameters())
    changed = {name for (name, a), b in pairs if not torch.allclose(a, b, atol=1e-6)}
    assert changed == ({'head.fc.weight', 'head.fc.bias'} if classes != ('a', 'b') else set())
    assert ('is reinitialized' in caplog.text) == bool(changed)
    assert list(second.pretrained_cfg['label_names']) == list(classes)


def test_every_process_needs_a_batch(folder):
    config = read_config([*TINY, str(folder), '-b', '32'])
    cpu = torch.device('cpu')
    assert len(open_training_data(config, 3, 2, Process(cpu)).train) == 32
    with pytest.raises(InputError, match='batch_size=32: .* 32 images for 2 process.*; choose at most 16'):
        open_training_data(config, 3, 2, Process(cpu, world_size=2))


def test_standard_objective_learns(folder, tmp_path):
    assert train(folder, tmp_path, '--epochs', '8', '--lr', '5e-3', '--no-aug') == 0
    rows = list(csv.DictReader(open(tmp_path / 'run' / 'summary.csv')))
    assert max(float(r['eval_top1']) for r in rows) == 100.


@pytest.mark.parametrize('model', ['robustnorm_resnet20_cifar', 'test_vit'])
def test_other_models_with_amp(folder, tmp_path, model):
    assert main([
        'train', '--model', model, '--num-classes', '2', '-b', '8', '--epochs', '1', '-j', '0', '--warmup-epochs', '0',
        '--objective', 'sat', '--attack-steps', '1', '--amp', '--amp-dtype', 'bfloat16', '--data-dir', str(folder),
        '--output', str(tmp_path), '--experiment', 'run', '--drop', '0.1', '--device', 'cpu']) == 0


def test_killed_run_resumes_to_the_same_weights(folder, tmp_path):
    flags = ['--objective', 'nofrost', '--epochs', '6', '--model-ema', '--model-ema-warmup', '--reprob', '0.2',
             '--drop-path', '0.1', '--sched-on-updates', '-j', '1']
    assert run_cli('train', *TINY, '--data-dir', folder, '--output', tmp_path / 'whole', '--experiment', 'run',
                   *flags).returncode == 0
    command = [sys.executable, '-m', 'timm_robust', 'train', *TINY, '--data-dir', str(folder), '--output',
               str(tmp_path / 'cut'), '--experiment', 'run', *flags, '--log-interval', '1']
    log = open(tmp_path / 'log', 'w')
    process = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    deadline = time.time() + 240
    while 'Train: 2 [2/4]' not in (tmp_path / 'log').read_text():
        assert process.poll() is None and time.time() < deadline, (tmp_path / 'log').read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = tmp_path / 'cut' / 'run' / 'last.pth.tar'
    assert checkpoint(last)['epoch'] < 5
    resumed = run_cli('train', *TINY, '--data-dir', folder, '--output', tmp_path / 'cut', '--experiment', 'run', *flags,
                      '--resume', last)
    assert resumed.returncode == 0, resumed.stderr
    whole, cut = checkpoint(tmp_path / 'whole' / 'run' / 'last.pth.tar'), checkpoint(last)
    for key in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'task_state', 'metric'):
        assert equal(whole[key], cut[key]), key
    rows = list(csv.DictReader(open(tmp_path / 'cut' / 'run' / 'summary.csv')))
    assert [r['epoch'] for r in rows] == list('012345')


class _Brightness(torch.nn.Module):
    """Its boundary lies elsewhere without gradients, as if other kernels ran in low precision."""

    def forward(self, x):
        over = x.mean((1, 2, 3)) - (0.45 if torch.is_grad_enabled() else 0.42)
        return torch.stack([over, -over], 1)


def test_robust_validation_does_not_stop_at_the_boundary():
    task = ClassificationTask(_Brightness(), torch.nn.CrossEntropyLoss(), verbose=False)
    loader = [(torch.full((4, 3, 16, 16), 0.5), torch.zeros(4, dtype=torch.int64))]
    for eps, accuracy in ((0.07, 100.), (0.1, 0.)):
        space = InputSpace((0.,) * 3, (1.,) * 3)
        found = validate_robust(task, loader, Linf(eps), space, 10, device=torch.device('cpu'))
        assert found == {'robust_top1': accuracy}


def test_robust_validation_is_compiled():
    backend, task = CountingBackend(), ClassificationTask(TinyNet(norm=True), verbose=False)
    task.compile(backend=backend)
    loader = [(torch.rand(4, 3, 8, 8), torch.arange(4))] * 2
    validate_robust(task, loader, Linf(.1), InputSpace((0.,) * 3, (1.,) * 3), 3, device=torch.device('cpu'))
    assert (backend.graphs, backend.runs) == (2, 2 * (3 + 1))


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def save(*args):
        raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 405312 vs 405200')

    monkeypatch.setattr('torch.save', save)
    model = torch.nn.Linear(2, 2)
    saver = AtomicCheckpointSaver(
        ClassificationTask(model, verbose=False), {'model': 'linear'}, checkpoint_dir=str(tmp_path),
        optimizer=torch.optim.SGD(model.parameters(), 0.1), recovery_dir=str(tmp_path))
    with pytest.raises(OSError, match='cannot write .*; is the disk full'):
        saver.save_checkpoint(0, metric=1.)


def test_saver_never_leaves_a_gap(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    task = ClassificationTask(model, verbose=False)
    saver = AtomicCheckpointSaver(task, {'model': 'linear'}, optimizer=torch.optim.SGD(model.parameters(), 0.1),
                                  checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.)
    names = ('last.pth.tar', 'model_best.pth.tar')
    real_link, real_replace = os.link, os.replace

    def watched(real):
        def call(*args, **kwargs):
            for name in names:
                assert checkpoint(tmp_path / name)['epoch'] in (0, 1), f'{name} is not whole'
            return real(*args, **kwargs)
        return call

    monkeypatch.setattr('os.link', watched(real_link))
    monkeypatch.setattr('os.replace', watched(real_replace))
    real_unlink = os.unlink

    def unlink(path, *args, **kwargs):
        assert Path(path).name not in names, f'{path} was removed'
        return real_unlink(path, *args, **kwargs)

    monkeypatch.setattr('os.unlink', unlink)
    saver.save_checkpoint(1, metric=2.)
    assert checkpoint(tmp_path / 'model_best.pth.tar')['epoch'] == 1


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(folder, tmp_path, capsys, monkeypatch):
    import timm_robust.training.run as run_module
    real, calls = run_module.train_one_epoch, []

    def poisoned(task, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                next(task.parameters()).fill_(float('nan'))
        return real(task, *args, **kwargs)

    monkeypatch.setattr(run_module, 'train_one_epoch', poisoned)
    assert train(folder, tmp_path, '--objective', 'standard', '--epochs', '3') == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    last = tmp_path / 'run' / 'last.pth.tar'
    assert 'training loss is nan in epoch 1' in error and str(last) in error and '--lr' in error
    saved = checkpoint(last)
    assert saved['epoch'] == 0 and all(torch.isfinite(v).all() for v in saved['state_dict'].values())


@pytest.mark.parametrize('where', [
    'timm_robust.training.run.train_one_epoch', 'timm_robust.training.checkpoint.resume_task_checkpoint',
    'timm_robust.inputs.weights._read'])
def test_where_memory_ends_the_batch_size_is_named_and_no_checkpoint_is_called_broken(
        folder, tmp_path, capsys, monkeypatch, where):
    assert train(folder, tmp_path, '--epochs', '1') == 0
    capsys.readouterr()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.50 GiB free.')

    monkeypatch.setattr(where, full)
    assert train(folder, tmp_path, '--epochs', '2', '--resume', str(tmp_path / 'run' / 'last.pth.tar')) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert '--batch-size 8: does not fit into memory (CUDA out of memory); choose a smaller one' in error
    assert 'broken' not in error and 'truncated' not in error and 'other settings' not in error


def test_fashion_mnist_by_timms_name(fashion_mnist_dir, tmp_path, capsys):
    assert main(['train', *TINY, '--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_mnist_dir),
                 '--val-split', 'test', '--epochs', '1']) == 2
    assert '--in-chans 3: the images of' in capsys.readouterr().err


def test_torchrun_trains_and_shards_validation(folder, tmp_path):
    command = ['train', *TINY, '--data-dir', str(folder), '--output', str(tmp_path), '--experiment', 'run']
    script = (
        'import sys\nfrom timm_robust.cli.main import main\n'
        f'sys.exit(main({command!r}'
        " + ['--model', 'robustnorm_resnet20_cifar', '--objective', 'sat', '--epochs', '2', '--robust-eval-steps', '2',"
        " '--robust-eval-samples', '9', '--sync-bn']))\n")
    run_distributed(script, tmp_path)
    rows = list(csv.DictReader(open(tmp_path / 'run' / 'summary.csv')))
    assert len(rows) == 2
    # nine images over two processes: padding must not count, so accuracy is a multiple of a ninth
    share = float(rows[-1]['eval_robust_top1']) / 100 * 9
    assert abs(share - round(share)) < 1e-6


@pytest.mark.parametrize('capability, amp, warned', [
    ('AVX2', True, True), ('AVX2', False, False), ('AVX512', True, False)])
def test_a_cpu_that_emulates_bfloat16_is_warned_about(capability, amp, warned, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    mixed_precision(TrainConfig(model='resnet18', amp=amp), torch.device('cpu'))
    assert ('bfloat16' in caplog.text) is warned


@pytest.mark.parametrize('history', [1, 3])
@pytest.mark.parametrize('metrics', [(.9, .7, .5), (.5, .7, .6), (.9, .5, .7)])
@pytest.mark.parametrize('at', ['checkpoint-2', 'model_best', 'nowhere'])
def test_a_crash_while_a_checkpoint_is_ranked(tmp_path, monkeypatch, history, metrics, at):
    model = torch.nn.Linear(2, 2)

    def saver(folder):
        folder.mkdir(exist_ok=True)
        return AtomicCheckpointSaver(
            ClassificationTask(model, verbose=False), {'model': 'linear'}, checkpoint_dir=str(folder),
            recovery_dir=str(folder), optimizer=torch.optim.SGD(model.parameters(), 0.1), decreasing=True,
            max_history=history)

    whole, cut, duplicate = saver(tmp_path / 'whole'), saver(tmp_path / 'cut'), AtomicCheckpointSaver._duplicate
    for epoch, metric in enumerate(metrics):
        whole.save_checkpoint(epoch, metric)
        if epoch == 2:
            def crash(self, src, dst):
                if Path(dst).name.startswith(at):
                    raise KeyboardInterrupt
                duplicate(self, src, dst)

            monkeypatch.setattr(AtomicCheckpointSaver, '_duplicate', crash)
        try:
            cut.save_checkpoint(epoch, metric)
        except KeyboardInterrupt:
            pass
    monkeypatch.undo()
    resumed = saver(tmp_path / 'cut')
    resumed.load_state_dict_from_checkpoint(str(tmp_path / 'cut' / 'last.pth.tar'))
    assert (resumed.best_epoch, resumed.best_metric) == (metrics.index(min(metrics)), min(metrics))
    for one in (resumed, whole):
        best = checkpoint(Path(one.checkpoint_dir) / 'model_best.pth.tar')
        assert (best['epoch'], best['metric']) == (resumed.best_epoch, resumed.best_metric)
    assert [(Path(p).name, m) for p, m in resumed.checkpoint_files] == [
        (Path(p).name, m) for p, m in whole.checkpoint_files]
    assert {p.name for p in (tmp_path / 'cut').glob('checkpoint-*')} == {
        p.name for p in (tmp_path / 'whole').glob('checkpoint-*')}


def test_a_best_checkpoint_is_not_mixed_up_with_the_last(tmp_path):
    model = torch.nn.Linear(2, 2)
    saver = AtomicCheckpointSaver(
        ClassificationTask(model, verbose=False), {'model': 'linear'}, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    for epoch, metric in enumerate((1., 3., 2.)):
        with torch.no_grad():
            model.weight.fill_(epoch)
        saver.save_checkpoint(epoch, metric)
    for path in tmp_path.glob('checkpoint-*'):  # to save space
        path.unlink()
    saver.load_state_dict_from_checkpoint(str(tmp_path / 'model_best.pth.tar'))
    for name in ('model_best', 'checkpoint-1'):
        found = checkpoint(tmp_path / f'{name}.pth.tar')
        assert (found['epoch'], found['metric'], found['state_dict']['weight'][0, 0]) == (1, 3., 1.), name
    assert saver.best_epoch == 1 and checkpoint(tmp_path / 'last.pth.tar')['epoch'] == 2


def test_a_run_without_a_name_continues_in_its_folder(folder, tmp_path, capsys):
    flags = [*TINY, '--data-dir', str(folder), '--output', str(tmp_path)]
    assert main(['train', *flags, '--epochs', '1']) == 0
    run, = tmp_path.iterdir()
    resumed = [*flags, '--epochs', '2', '--resume', str(run / 'last.pth.tar')]
    assert main(['train', *resumed]) == 0 and [*tmp_path.iterdir()] == [run]
    assert [r['epoch'] for r in csv.DictReader(open(run / 'summary.csv'))] == ['0', '1']
    assert 'in another folder' not in capsys.readouterr().err
    assert main(['train', *flags[:-1], str(tmp_path / 'b'), '--epochs', '3', *resumed[-2:]]) == 0
    assert 'epochs are neither ranked nor listed' in capsys.readouterr().err


def test_resuming_with_an_optimizer(folder, tmp_path, capsys):
    flags = ['--epochs', '1', '--opt', 'lookahead_sgd']
    assert train(folder, tmp_path, *flags) == 0
    resume = ['--resume', str(tmp_path / 'run' / 'last.pth.tar')]
    assert train(folder, tmp_path, '--epochs', '2', '--opt', 'lamb', *resume) == 2
    assert 'has the optimizer lookahead_sgd, not lamb; choose --opt' in capsys.readouterr().err
    assert train(folder, tmp_path, '--epochs', '2', '--opt', 'lookahead_sgd', *resume) == 0


def test_the_learning_rate_of_the_summary_is_the_mean_over_groups(folder, tmp_path):
    assert train(folder, tmp_path, '--epochs', '1', '--layer-decay', '.5', '--lr', '.01') == 0
    row, = csv.DictReader(open(tmp_path / 'run' / 'summary.csv'))
    groups = [g['lr'] for g in checkpoint(tmp_path / 'run' / 'last.pth.tar')['optimizer']['param_groups']]
    assert len({*groups}) > 2 and float(row['lr']) == pytest.approx(sum(groups) / len(groups))


@pytest.mark.parametrize('gamma, export, more', [
    (0, 'export', ''), (1, 'export_aux', ''), (.5, 'model_best.pth.tar', ' --gamma 0.5')])
def test_the_network_that_was_chosen_is_the_one_to_evaluate(folder, tmp_path, capsys, gamma, export, more):
    assert main([
        'train', '--model', 'resnet20_cifar', '--num-classes', '2', '-b', '8', '-j', '0', '--warmup-epochs', '0',
        '--device', 'cpu', '--epochs', '1', '--attack-steps', '1', '--objective', 'mbnat', '--mbnat-gamma', str(gamma),
        '--data-dir', str(folder), '--output', str(tmp_path), '--experiment', 'run']) == 0
    printed = capsys.readouterr().out
    command, = (line for line in printed.splitlines() if line.startswith('timm-robust eval'))
    assert f'{tmp_path / "run" / export} ' in f'{command} '
    assert (' --gamma' in command) == bool(more) and more in command
    assert main([*command.split()[1:], '--attacks', 'clean', '--num-examples', '4', '--allow-chance',
                 '--output', str(tmp_path / 'o'), '--device', 'cpu', '-j', '0']) == 0


@pytest.mark.parametrize('flags, message', [
    (['--dataset', 'cifar10'], '--dataset cifar10: has no type that timm knows'),
    (['--mixup-mode', 'foo'], '--mixup-mode foo: unknown; choose one of batch'),
    (['--remode', 'foo', '--reprob', '.3'], '--remode foo: unknown'),
    (['--train-crop-mode', 'foo'], '--train-crop-mode foo: unknown'),
    (['--train-interpolation', 'foo'], '--train-interpolation foo: unknown'),
    (['--worker-seeding', 'foo'], '--worker-seeding foo: unknown'),
    (['--input-img-mode', 'FOO'], '--input-img-mode FOO: is no mode'),
    (['--input-img-mode', 'L'], '--input-img-mode L: the network has 3 channel'),
    (['--cutmix-minmax', '.2', '5'], '--cutmix-minmax .*: must be shares'),
    (['--opt-betas', '.9'], '--opt-betas 0.9: needs at least two'),
    (['--lr-cycle-mul', '0'], '--lr-cycle-mul 0: '),
    (['--val-num-samples', '3'], '--val-num-samples 3: is only for streamed'),
    (['--val-split', 'nosuch'], '--val-split nosuch: .* has no such folder'),
    (['--train-split', 'nosuch'], '--train-split nosuch: .* has no such folder')])
def test_mistyped_flags_are_one_line(folder, tmp_path, capsys, flags, message):
    assert train(folder, tmp_path, '--epochs', '1', *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


