"""Flags of timm's train.py that change the course of a run: scheduled resolutions, first epoch, recovery."""
import csv

import pytest
import torch
from helpers import make_image_folder

import timm_robust.training.run as run_module
from timm_robust import TrainConfig, train
from timm_robust.cli.main import main
from timm_robust.errors import InputError
from timm_robust.tasks import SAT, NoFrostStar, TrainingAttack

SETTINGS = dict(
    model='nofrost_resnet11_mnist', in_chans=3, img_size=32, num_classes=2, batch_size=8, warmup_epochs=0, workers=0,
    experiment='run', device='cpu', objective=SAT(), attack=TrainingAttack(attack='fgsm', eps_warmup_epochs=1))
BATCHES = 4  # of an epoch


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), per_class=16)


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """A run of three epochs."""
    return _train(folder, tmp_path_factory.mktemp('whole'), epochs=3)


def _train(folder, output, **more):
    return train(TrainConfig(data_dir=str(folder), output=str(output), **{**SETTINGS, **more})).output_dir


def _rows(run):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(run / 'summary.csv'))]


def _last(run):
    return torch.load(run / 'last.pth.tar', weights_only=True)


@pytest.fixture
def batches(monkeypatch):
    """Shape of each training batch, by epoch, and the task that got it; a hook may stop the run."""
    seen, real = {'hook': lambda task: None}, run_module.train_one_epoch

    def watched(task, loader, optimizer, epoch, **kwargs):
        def look(task, inputs):
            seen.setdefault(epoch, []).append(tuple(inputs[0].shape))
            seen['hook'](task)

        handle = task.register_forward_pre_hook(look)
        try:
            return real(task, loader, optimizer, epoch, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(run_module, 'train_one_epoch', watched)
    return seen


@pytest.mark.parametrize('no_prefetcher', [False, True])
def test_resolution_rises_with_the_epochs(folder, tmp_path, batches, no_prefetcher):
    run = _train(
        folder, tmp_path, epochs=2, train_img_sizes=(16, 24), train_batch_sizes=(8, 4), sched='none',
        train_size_schedule='progressive', train_size_schedule_spread=0., train_size_random_mix=0.,
        no_prefetcher=no_prefetcher)
    # as many batches in each epoch as of the average size fit into 32 images
    assert batches[0] == [(8, 3, 16, 16)] * 5 and batches[1] == [(4, 3, 24, 24)] * 5
    assert [row['lr'] for row in _rows(run)] == pytest.approx([.1 * 6 / 256] * 2, rel=1e-9)


def test_sizes_come_by_their_weights(folder, tmp_path, batches):
    _train(folder, tmp_path, epochs=1, train_img_sizes=(16, 24, 32), train_size_probs=(0., 1., 0.))
    assert batches[0] == [(8, 3, 24, 24)] * BATCHES


@pytest.mark.parametrize('more,text', [
    (dict(train_img_sizes=(0,)), 'train_img_sizes=0'),
    (dict(train_batch_sizes=(8,)), 'train_batch_sizes=.*needs a value for each of `train_img_sizes`'),
    (dict(train_img_sizes=(16, 24), train_size_probs=(1.,)), 'train_size_probs=.*needs a value'),
    (dict(train_img_sizes=(16, 24), train_size_probs=(1., -1.)), 'train_size_probs=.*at least 0'),
    (dict(train_img_sizes=(16,), train_size_schedule='progressive'), 'train_size_schedule=.*two sizes'),
    (dict(train_img_sizes=(16, 24), train_batch_sizes=(8, 3), mixup=.1), 'train_batch_sizes=.*even'),
    (dict(train_img_sizes=(16, 24), crop_padding=4), 'train_img_sizes=.*remove one'),
    (dict(train_img_sizes=(16, 24), objective=NoFrostStar(noise2net=True)), 'train_img_sizes=.*its views to one size'),
    (dict(train_size_schedule='cosine'), 'train_size_schedule=.*unknown'),
    (dict(start_epoch=-1), 'start_epoch=-1'), (dict(recovery_interval=-1), 'recovery_interval=-1')])
def test_settings_that_contradict_are_refused(more, text):
    with pytest.raises(InputError, match=text):
        TrainConfig(**{**SETTINGS, **more})


def test_sizes_that_network_or_data_do_not_take_are_named(folder, tmp_path, capsys):
    command = ['train', str(folder), '--output', str(tmp_path), '--device', 'cpu', '-j', '0', '--warmup-epochs', '0',
               '--epochs', '1']
    assert main([*command, '--model', 'vit_tiny_patch16_224', '-b', '8', '--train-img-sizes', '224', '96']) == 2
    assert '--train-img-sizes 96: vit_tiny_patch16_224 does not accept it' in capsys.readouterr().err
    assert main([*command, '--model', 'nofrost_resnet26', '--train-img-sizes', '96', '--train-batch-sizes', '64']) == 2
    assert '--train-batch-sizes 64: the training data has 32 images' in capsys.readouterr().err


@pytest.mark.parametrize('resumes', [False, True])
def test_the_first_epoch_can_be_given(folder, whole, tmp_path, resumes):
    resume = dict(resume=str(whole / 'last.pth.tar')) if resumes else {}
    run = _train(folder, tmp_path, epochs=3, start_epoch=1, **resume)
    assert [(row['epoch'], row['lr']) for row in _rows(run)] == [(row['epoch'], row['lr']) for row in _rows(whole)[1:]]
    assert _last(run)['task_state']['step'] == _last(whole)['task_state']['step'] == 3 * BATCHES
    with pytest.raises(InputError, match='epochs=3: training would start at epoch 4'):
        _train(folder, tmp_path / 'late', epochs=3, start_epoch=4)


def test_an_epoch_is_trained_again_from_its_recovery_checkpoint(folder, tmp_path, batches):
    def stop(task):
        if task.step == 2 * BATCHES - 1:
            raise KeyboardInterrupt

    batches['hook'] = stop
    with pytest.raises(KeyboardInterrupt):
        _train(folder, tmp_path, epochs=3, recovery_interval=2)
    run = tmp_path / 'run'
    recovery = run / 'recovery-1-1.pth.tar'
    saved = torch.load(recovery, weights_only=True)
    assert saved['task_state']['step'] == BATCHES + 2 and _last(run)['epoch'] == 0
    first = []
    batches['hook'] = lambda task: first.append({k: v.clone() for k, v in task.trainable_module.state_dict().items()})
    _train(folder, tmp_path, epochs=3, resume=str(recovery))
    assert all(torch.equal(value, saved['state_dict'][name]) for name, value in first[0].items())
    assert [row['epoch'] for row in _rows(run)] == [0, 1, 2] and _last(run)['task_state']['step'] == 3 * BATCHES
