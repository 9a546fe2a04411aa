"""What `train` logs to wandb, trackio and TensorBoard: stand-ins here, the real packages where they are installed."""
import csv
import logging
import re
import sys
import types

import pytest
import torch
from helpers import make_image_folder

from timm_robust import TrainConfig, train
from timm_robust.attacks import InputSpace
from timm_robust.cli.main import main
from timm_robust.errors import InputError
from timm_robust.tasks import SAT, TrainingAttack
from timm_robust.training.trackers import Trackers, picture_of

SETTINGS = dict(
    model='nofrost_resnet11_mnist', in_chans=3, img_size=32, num_classes=2, batch_size=8, warmup_epochs=0, workers=0,
    experiment='run', device='cpu', epochs=2, robust_eval_steps=1, robust_eval_samples=4, objective=SAT(),
    attack=TrainingAttack(attack='fgsm'))


class _Module(types.ModuleType):
    """A stand-in for wandb and trackio, which takes notes and fails where it is told to."""

    def __init__(self, fails=''):
        super().__init__('stand_in')
        self.calls, self.fails = [], fails

    def _note(self, name, value):
        self.calls.append((name, value))
        if name == self.fails:
            raise RuntimeError('the server is away')
        return self

    def init(self, **kwargs):
        return self._note('init', kwargs)

    def log(self, row):
        self._note('log', dict(row))
        row.clear()  # whatever it does to its row

    def Image(self, pixels, caption):
        return pixels, caption

    def finish(self):
        self._note('finish', None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), per_class=8)


@pytest.fixture(scope='module')
def without(folder, tmp_path_factory):
    """A run without trackers."""
    return _train(folder, tmp_path_factory.mktemp('without'))


def _train(folder, output, **more):
    return train(TrainConfig(data_dir=str(folder), output=str(output), **{**SETTINGS, **more})).output_dir


def _rows(run):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(run / 'summary.csv'))]


def _weights(run):
    return torch.load(run / 'last.pth.tar', weights_only=True)['state_dict']


@pytest.mark.parametrize('name,more', [
    ('wandb', dict(project='digits', tags=['a', 'b'], resume=None, id=None)),
    ('trackio', dict(project='digits', resume='never', embed=False))])
def test_a_tracker_gets_settings_and_rows(folder, without, tmp_path, monkeypatch, name, more):
    module = _Module()
    monkeypatch.setitem(sys.modules, name, module)
    run = _train(folder, tmp_path, **{f'log_{name}': True}, wandb_project='digits', wandb_tags=('a', 'b'))
    first, *rows, last = module.calls
    config = first[1].pop('config')
    assert first == ('init', {'name': 'run', **more}) and config['objective'] == 'sat' and config['attack'] == 'fgsm'
    pictures = [row.pop('eval_robust_images') for _, row in rows]
    assert [row for _, row in rows] == _rows(run) == _rows(without) and last == ('finish', None)
    for pixels, caption in pictures:
        assert pixels.shape == (2 * 34 + 2, 4 * 34 + 2, 3) and caption.count(' for ') == 4
        assert {*re.findall('for (.)', caption)} == {'a', 'b'}
    assert {'train_loss', 'eval_top1', 'eval_robust_top1'} <= set(rows[0][1])
    assert all(torch.equal(a, b) for a, b in zip(_weights(run).values(), _weights(without).values()))


def test_the_picture_shows_images_above_attacked_ones_and_the_answers():
    space = InputSpace((.5, .25, 0.), (.5, .5, 2.))
    clean = torch.tensor([0., .2, 1.]).view(3, 1, 1, 1).expand(3, 3, 4, 5)
    attacked = clean + torch.tensor([.12, .2, -.2]).view(3, 1, 1, 1)
    picture = picture_of(
        space.normalize(clean), space.normalize(attacked), torch.tensor([0, 1, 1]), torch.eye(2)[[1, 1, 0]], space,
        ['cat'])
    assert picture.pixels.dtype == 'uint8' and picture.pixels.shape == (2 * 6 + 2, 3 * 7 + 2, 3)
    middle = picture.pixels[[[4], [10]], [[4, 11, 18]]]  # of each image
    assert middle.tolist() == [[[v] * 3 for v in row] for row in ([0, 51, 255], [31, 102, 204])]
    assert picture.caption == 'attacked (below): 1 for cat, 1 for 1, cat for 1'


def test_images_of_other_channels_are_not_sent(tmp_path, monkeypatch):
    module = _Module()
    monkeypatch.setitem(sys.modules, 'wandb', module)
    trackers = Trackers(TrainConfig(log_wandb=True), tmp_path, 0, InputSpace(), None)
    for channels in (3, 4, 1):
        trackers.show(*torch.rand(2, 2, channels, 4, 4), torch.tensor([0, 1]), torch.eye(2))
        trackers.log({'epoch': 0})
    trackers.log({'epoch': 1})
    assert ['eval_robust_images' in row for name, row in module.calls if name == 'log'] == [True, False, True, False]


@pytest.mark.parametrize('fails,calls', [
    ('init', ['init']), ('log', ['init', 'log']), ('finish', ['init', 'log', 'log', 'finish'])])
def test_a_tracker_that_fails_is_switched_off_and_costs_nothing(
        folder, without, tmp_path, monkeypatch, caplog, fails, calls):
    broken, works = _Module(fails), _Module()
    monkeypatch.setitem(sys.modules, 'wandb', broken)
    monkeypatch.setitem(sys.modules, 'trackio', works)
    with caplog.at_level(logging.WARNING):
        run = _train(folder, tmp_path, log_wandb=True, log_trackio=True)
    assert [name for name, _ in broken.calls] == calls
    assert [name for name, _ in works.calls] == ['init', 'log', 'log', 'finish']
    warnings = [r.getMessage() for r in caplog.records if 'switched off' in r.getMessage()]
    assert warnings == ['wandb is switched off: RuntimeError: the server is away']
    assert _rows(run) == _rows(without) and (run / 'export' / 'config.json').is_file()


def test_a_tracker_is_closed_when_training_stops(folder, tmp_path, monkeypatch):
    module = _Module()
    monkeypatch.setitem(sys.modules, 'trackio', module)
    monkeypatch.setattr('timm_robust.training.run.validate', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _train(folder, tmp_path, log_trackio=True)
    assert [name for name, _ in module.calls] == ['init', 'finish']


@pytest.mark.parametrize('name', ['wandb', 'trackio', 'tensorboard'])
def test_a_missing_package_is_named_with_its_extra_before_training(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(['train', str(folder), '--output', str(tmp_path / 'out'), f'--log-{name}']) == 2
    line, = capsys.readouterr().err.splitlines()
    assert f'--log-{name}: {name} cannot be imported' in line and f"pip install 'timm-robust[{name}]'" in line
    assert not (tmp_path / 'out').exists()


def test_a_resumed_run_continues_its_log(folder, without, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="wandb_resume_id='abc': .*`resume`"):
        TrainConfig(wandb_resume_id='abc')
    modules = {name: _Module() for name in ('wandb', 'trackio')}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    _train(folder, tmp_path, epochs=3, resume=str(without / 'last.pth.tar'), log_wandb=True, log_trackio=True,
           wandb_resume_id='abc')
    opened = {name: module.calls[0][1] for name, module in modules.items()}
    assert (opened['wandb']['id'], opened['wandb']['resume'], opened['trackio']['resume']) == ('abc', 'must', 'allow')
    assert [row['epoch'] for name, row in modules['wandb'].calls if name == 'log'] == [2]


def test_tensorboard_reads_the_rows(folder, tmp_path):
    events = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator', reason='tensorboard is not installed')
    run = _train(folder, tmp_path, log_tensorboard=True)
    (run / 'export' / 'config.json').unlink()
    _train(folder, tmp_path, log_tensorboard=True, epochs=3, resume=str(run / 'last.pth.tar'))
    found = events.EventAccumulator(str(run))
    found.Reload()
    rows = _rows(run)
    assert len(rows) == 3
    for tag, name in (('train/loss', 'train_loss'), ('eval/robust_top1', 'eval_robust_top1'), ('lr', 'lr')):
        assert [e.step for e in found.Scalars(tag)] == [0, 1, 2]
        assert [e.value for e in found.Scalars(tag)] == pytest.approx([row[name] for row in rows], rel=1e-6)


def test_trackio_keeps_the_rows(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    storage = pytest.importorskip('trackio.sqlite_storage', reason='trackio is not installed').SQLiteStorage
    run = _train(folder, tmp_path, log_trackio=True)
    kept = storage.get_logs('timm-robust', 'run')
    assert [row['eval_robust_top1'] for row in kept] == [row['eval_robust_top1'] for row in _rows(run)]
