"""`train` beside a training run that is written out by hand.

The reference knows torch, timm's model constructor and timm's loaders, and nothing of `timm_robust.training`: what
another test compares with a second run of the package, this one compares with the definition.
"""
import copy
import csv
import dataclasses
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from helpers import run_distributed
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.utils import CheckpointSaver

from timm_robust import TrainConfig, train
from timm_robust.attacks import Linf
from timm_robust.attacks.ball import Ball, InputSpace
from timm_robust.data import balanced_indices
from timm_robust.tasks import AWP, MBNAT, SAT, TrainingAttack

MEAN, STD = (.55, .45, .3), (.2, .35, .25)
SIZE = 10
TRAIN_IMAGES, VALIDATION_IMAGES = (3, 4, 6, 5, 2, 7), (4, 6, 5, 7, 3, 5)  # of each class

SETTINGS = dict(
    seed=3, epochs=3, batch_size=5, validation_batch_size=8, grad_accum_steps=1, clip_grad=None, lr=.8, min_lr=.02,
    momentum=.8, weight_decay=.01, warmup_epochs=1, warmup_lr=.1, sched_on_updates=False, smoothing=.2, drop=.3,
    model_ema=False, model_ema_decay=.6, eval_metric='top1', robust_eval_steps=3, robust_eval_samples=17, hflip=.3,
    vflip=.2, scale=(.6, 1.), ratio=(.8, 1.1), no_prefetcher=False, dist_bn='reduce', weight=.3, eps=6 / 255,
    eps_warmup_epochs=1., attack_steps=2, step_size=5 / 255, random_start=False, val_split='validation')


class ReferenceNet(nn.Module):
    """BatchNorm and dropout, in which training and eval mode differ; float64 inside, whatever images it is given."""

    def __init__(self, num_classes=6, in_chans=3, drop_rate=0.):
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, 8
        self.conv = nn.Conv2d(in_chans, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(8, num_classes)
        self.double()

    def forward(self, x):
        x = self.norm(self.conv(x.double())).relu().mean((2, 3))
        return self.fc(self.drop(x))


default_cfgs = generate_default_cfgs({'reference_net.untrained': dict(
    num_classes=6, input_size=(3, SIZE, SIZE), mean=MEAN, std=STD, interpolation='bilinear', crop_pct=1.,
    classifier='fc', first_conv='conv')})


@register_model
def reference_net(pretrained=False, **kwargs):
    return build_model_with_cfg(ReferenceNet, 'reference_net', pretrained, **kwargs)


def make_images(root: Path) -> Path:
    """Noise around a colour of each class, so that some images are hard."""
    generator = np.random.default_rng(0)
    colours = generator.uniform(70, 180, (len(TRAIN_IMAGES), 3))
    for split, counts in (('train', TRAIN_IMAGES), ('validation', VALIDATION_IMAGES)):
        for label, count in enumerate(counts):
            folder = root / split / 'abcdef'[label]
            folder.mkdir(parents=True)
            for i in range(count):
                shift = generator.normal(0, 12, 3)
                pixels = colours[label] + shift + generator.normal(0, 35, (SIZE, SIZE, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return root


@dataclasses.dataclass
class Reference:
    """What a run must come to."""
    rows: List[Dict[str, float]]
    final: Dict[str, torch.Tensor]
    final_ema: Dict[str, torch.Tensor]
    best: Dict[str, torch.Tensor]
    best_epoch: int
    best_metric: float


def set_seeds(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def learning_rate(s, epoch):
    """Linear warm-up, then a cosine from where the warm-up ends; epochs may be fractions."""
    if epoch < s.warmup_epochs:
        return s.warmup_lr + (s.lr - s.warmup_lr) * epoch / s.warmup_epochs
    return s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * epoch / s.epochs)) / 2


def channels(values):
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def ascend(model, x, y, start, eps, step_size, steps):
    """PGD in pixels, on a copy in eval mode."""
    model = copy.deepcopy(model).eval()
    pixels = x.double() * channels(STD) + channels(MEAN)
    point = start.double() * channels(STD) + channels(MEAN)
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        loss = F.cross_entropy(model((leaf - channels(MEAN)) / channels(STD)), y)
        gradient, = torch.autograd.grad(loss, leaf)
        point = point + step_size * gradient.sign()
        point = torch.minimum(torch.maximum(point, pixels - eps), pixels + eps).clamp(0, 1)
    return (point - channels(MEAN)) / channels(STD)


def noise(x, eps, seed):
    """Images within eps: which seed is what matters here, how it becomes noise is for tests/attacks."""
    return Ball(x, Linf(eps), InputSpace(MEAN, STD)).random(seed)


def correct(logits, y):
    return (logits.argmax(1) == y).double()


def processes():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def averaged(tensor):
    """The mean over processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def loaders(s, root):
    common = dict(
        input_size=(3, SIZE, SIZE), mean=MEAN, std=STD, num_workers=0, device=torch.device('cpu'),
        use_prefetcher=not s.no_prefetcher, interpolation='bilinear')
    training = create_loader(
        create_dataset('', root=root, split='train', is_training=True), batch_size=s.batch_size, is_training=True,
        scale=s.scale, ratio=s.ratio, hflip=s.hflip, vflip=s.vflip, color_jitter=.4, distributed=dist.is_initialized(),
        **common)
    data = create_dataset('', root=root, split='validation')
    validation = create_loader(
        data, batch_size=s.validation_batch_size, is_training=False, crop_pct=1., **common)
    chosen = balanced_indices(
        np.repeat(range(6), VALIDATION_IMAGES), sum(VALIDATION_IMAGES), s.robust_eval_samples, seed=s.seed)
    robust = create_loader(
        torch.utils.data.Subset(data, chosen), batch_size=s.validation_batch_size, is_training=False, crop_pct=1.,
        **common)
    return training, validation, robust


def smooth_loss(s, logits, y):
    log_p = logits.log_softmax(1)
    return -((1 - s.smoothing) * log_p.gather(1, y[:, None])[:, 0] + s.smoothing * log_p.mean(1)).mean()


def training_loss(s, model, x, y, step, batches):
    """(1 - weight) L(x) + weight L(x*), and what is logged of it."""
    warmup = round(s.eps_warmup_epochs * batches)
    share = min((step + 1) / (warmup + 1), 1.)
    rank, world = processes()
    stream = (s.seed * 0x9E3779B1 + step * world + rank) % 2 ** 62
    start = noise(x, share * s.eps, stream) if s.random_start else x
    adv = ascend(model, x, y, start, share * s.eps, share * s.step_size, s.attack_steps)
    clean_logits, adv_logits = model(x), model(adv)
    clean, attacked = smooth_loss(s, clean_logits, y), smooth_loss(s, adv_logits, y)
    loss = (1 - s.weight) * clean + s.weight * attacked
    return loss, {
        'loss': loss.item(), 'clean_loss': clean.item(), 'adv_loss': attacked.item(),
        'clean_top1': 100 * correct(clean_logits, y).mean().item(),
        'adv_top1': 100 * correct(adv_logits, y).mean().item()}


@torch.no_grad()
def update_weights(s, model, velocity, lr):
    """Clipping by the norm of all gradients together, then SGD with Nesterov momentum; no decay of vectors."""
    named = dict(model.named_parameters())
    gradients = {name: averaged(p.grad.clone()) for name, p in named.items()}
    if s.clip_grad is not None:
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        gradients = {name: g * min(1., s.clip_grad / (norm.item() + 1e-6)) for name, g in gradients.items()}
    for name, p in named.items():
        g = gradients[name] + (s.weight_decay * p if p.ndim > 1 else 0.)
        velocity[name] = s.momentum * velocity[name] + g if name in velocity else g
        p -= lr * (g + s.momentum * velocity[name])


def measure(s, model, validation, robust):
    if not s.val_split:
        return {}
    model.eval()
    with torch.no_grad():
        logits, y = (torch.cat(parts) for parts in zip(*[(model(x), y) for x, y in validation]))
    found = {
        'loss': F.cross_entropy(logits, y).item(), 'top1': 100 * correct(logits, y).mean().item(),
        'top5': 100 * (logits.topk(5).indices == y[:, None]).any(1).double().mean().item()}
    if not s.robust_eval_steps:
        return found
    held = []
    for index, (x, y) in enumerate(robust):
        adv = ascend(
            model, x, y, noise(x, s.eps, s.seed + index), s.eps, 2.5 * s.eps / s.robust_eval_steps,
            s.robust_eval_steps)
        held.append(correct(model(adv), y))
    return {**found, 'robust_top1': 100 * torch.cat(held).mean().item()}


def reference_run(settings, root) -> Reference:
    s = SimpleNamespace(**settings)
    rank, world = processes()
    set_seeds(s.seed + rank)
    model = timm.create_model('reference_net', drop_rate=s.drop)
    if world > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    average, velocity = copy.deepcopy(model).eval(), {}
    training, validation, robust = loaders(s, str(root))
    batches, step, updates = len(training), 0, 0
    per_epoch = math.ceil(batches / s.grad_accum_steps)
    rows, states = [], []
    for epoch in range(s.epochs):
        # an epoch's random state follows from seed and epoch, so that a resumed run has it too
        set_seeds((s.seed + 10007 * epoch) % 2 ** 31 + rank)
        if world > 1:
            training.sampler.set_epoch(epoch)
        model.train()
        logged = []
        lr = learning_rate(s, epoch)
        for index, (x, y) in enumerate(training):
            first = index // s.grad_accum_steps * s.grad_accum_steps
            group = min(s.grad_accum_steps, batches - first)
            if index == first:
                model.zero_grad()
            loss, scalars = training_loss(s, model, x, y, step, batches)
            (loss / group).backward()
            logged.append(scalars)
            step += 1
            if index + 1 < first + group:
                continue
            update_weights(s, model, velocity, lr)
            updates += 1
            decay = 0. if updates == 1 else s.model_ema_decay  # the first update copies, as timm's does
            for mean, value in zip(average.state_dict().values(), model.state_dict().values()):
                mean.copy_(decay * mean + (1 - decay) * value if mean.is_floating_point() else value)
            if s.sched_on_updates:
                lr = learning_rate(s, updates / per_epoch)
        for network in (model, average):
            for name, buffer in network.named_buffers():
                if 'running' in name:
                    averaged(buffer)
        shown = average if s.model_ema else model
        trained = {f'train_{k}': averaged(torch.tensor(sum(b[k] for b in logged) / batches, dtype=torch.float64)).item()
                   for k in logged[0]}
        rows.append({
            'epoch': epoch, **trained, 'lr': lr,
            **{f'eval_{k}': v for k, v in measure(s, shown, validation, robust).items()}})
        states.append(copy.deepcopy(shown.state_dict()))
    metric = f'eval_{s.eval_metric}' if s.val_split else 'train_loss'
    values = [row[metric] for row in rows]
    best = values.index((min if metric.endswith('loss') else max)(values))
    return Reference(rows, model.state_dict(), average.state_dict(), states[best], best, values[best])


def config(settings, root, output, resume=''):
    own = {'objective': SAT(weight=settings['weight']), **settings}
    del own['weight']
    attack = TrainingAttack(
        eps=own.pop('eps'), eps_warmup_epochs=own.pop('eps_warmup_epochs'), steps=own.pop('attack_steps'),
        step_size=own.pop('step_size'), random_start=own.pop('random_start'))
    return TrainConfig(
        model='reference_net', data_dir=str(root), output=str(output), experiment='run', workers=0, device='cpu',
        train_interpolation='bilinear', attack=attack, resume=resume, **own)


# Attacked images differ by the rounding of float32 in the loader's space, 1e-7, from those of the reference, which
# ascends in float64 pixels; validation losses and logged accuracies are float32 too, all else is float64. At learning
# rates of 0.8 and 2, fifteen updates make at most 2e-6 of that, while mistakes in the loop show at 1e-3 and more.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def assert_weights(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f'{name}: {text}', **CLOSE)


def assert_as_written(run: Path, settings, expected: Reference):
    with open(run / 'summary.csv') as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in expected.rows]
    last = torch.load(run / 'last.pth.tar', weights_only=True)
    assert_weights(last['state_dict'], expected.final)
    assert ('state_dict_ema' in last) is settings['model_ema']
    if settings['model_ema']:
        assert_weights(last['state_dict_ema'], expected.final_ema)
    exported = timm.create_model(f'local-dir:{run / "export"}', pretrained=True)
    assert_weights(exported.state_dict(), expected.best)
    described = exported.pretrained_cfg
    assert (tuple(described['mean']), tuple(described['std'])) == (MEAN, STD)
    assert list(described['label_names']) == list('abcdef')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'))


class Killed(BaseException):
    """What no part of the package catches."""


def run_and_resume(settings, root, output, monkeypatch):
    """A run that ends where it hurts most: the second epoch is in summary.csv and not in a checkpoint."""
    save = CheckpointSaver.save_checkpoint

    def save_once(self, epoch, metric=None):
        if epoch > 0:
            raise Killed
        save(self, epoch, metric)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSaver, 'save_checkpoint', save_once)
        with pytest.raises(Killed):
            train(config(settings, root, output))
    return train(config(settings, root, output, resume=str(output / 'run' / 'last.pth.tar')))


CASES = {
    'plain': {},
    'ema_accumulation_clipping': dict(model_ema=True, grad_accum_steps=2, clip_grad=.5, eval_metric='robust_top1'),
    'updates_loss': dict(sched_on_updates=True, eval_metric='loss', no_prefetcher=True),
    'resumed': dict(resumed=True, model_ema=True, eval_metric='loss', lr=2., random_start=True),
    'resumed_updates_accumulation': dict(resumed=True, sched_on_updates=True, grad_accum_steps=3),
    'no_validation': dict(val_split='', robust_eval_steps=0, channels_last=True, lr=2.),
}


@pytest.mark.parametrize('case', CASES)
def test_a_run_is_what_is_written_here(case, root, tmp_path, monkeypatch):
    changes = dict(CASES[case])
    resumed = changes.pop('resumed', False)
    settings = {**SETTINGS, **changes}
    expected = reference_run(settings, root)
    if resumed:
        result = run_and_resume(settings, root, tmp_path, monkeypatch)
    else:
        result = train(config(settings, root, tmp_path))
    assert_as_written(tmp_path / 'run', settings, expected)
    assert (result.best_epoch, result.best_metric) == (expected.best_epoch, pytest.approx(expected.best_metric))


def weights_of(root, output, **more):
    train(config({**SETTINGS, 'batch_size': 4, 'robust_eval_steps': 0, **more}, root, output))
    return torch.load(output / 'run' / 'last.pth.tar', weights_only=True)['state_dict']


def apart(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope='module')
def plain(root, tmp_path_factory):
    return weights_of(root, tmp_path_factory.mktemp('plain'))


@pytest.mark.parametrize('more', [
    dict(awp=AWP(gamma=.05)), dict(reprob=.5), dict(mixup=.8), dict(cutmix=1.), dict(color_jitter=.1),
    dict(color_jitter_prob=.5), dict(grayscale_prob=.5), dict(aa='rand-m9'), dict(clip_grad=.01, clip_mode='value'),
    dict(bce_loss=True), dict(opt='adamw'), dict(layer_decay=.5), dict(no_aug=True),
    dict(opt_kwargs={'nesterov': False}),
    dict(crop_padding=2, scale=(.08, 1.), ratio=(3 / 4, 4 / 3))], ids=lambda more: next(iter(more)))
def test_a_setting_reaches_the_run(more, root, tmp_path, plain):
    assert apart(weights_of(root, tmp_path, **more), plain) > 1e-3


def test_mixup_ends_when_it_is_told_to(root, tmp_path, plain):
    ended = weights_of(root, tmp_path, mixup=.8, mixup_off_epoch=1)
    assert apart(ended, plain) > 1e-3
    assert apart(ended, weights_of(root, tmp_path / 'all', mixup=.8)) > 1e-3


def test_first_weights_are_those_of_a_checkpoint(root, tmp_path, plain):
    path = tmp_path / 'first.pth'
    torch.save(plain, path)
    found = weights_of(
        root, tmp_path, initial_checkpoint=str(path), epochs=1, warmup_epochs=0, lr=1e-9, eps_warmup_epochs=0.)
    assert all(torch.allclose(found[name], plain[name]) for name in plain if 'norm' not in name)


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated')
@pytest.mark.parametrize('metric', ['loss', 'top1'])
def test_plateau_lowers_the_rate_when_the_metric_gets_no_better(metric, root, tmp_path):
    train(config(
        {**SETTINGS, 'epochs': 6, 'warmup_epochs': 0, 'eval_metric': metric, 'robust_eval_steps': 0, 'lr': 1.,
         'sched': 'plateau', 'patience_epochs': 0, 'decay_rate': .5}, root, tmp_path))
    with open(tmp_path / 'run' / 'summary.csv') as file:
        rows = list(csv.DictReader(file))
    sign, best, lr, lowered = (-1 if metric == 'loss' else 1), -math.inf, 1., 0
    for row in rows:
        assert float(row['lr']) == pytest.approx(lr)
        value = sign * float(row[f'eval_{metric}'])
        lr, best, lowered = (lr, value, lowered) if value > best else (lr / 2, best, lowered + 1)
    assert 0 < lowered < len(rows) - 1, 'the comparison says nothing'


def test_mbnat_exports_both_of_its_networks(root, tmp_path):
    train(config({**SETTINGS, 'objective': MBNAT(gamma=1.)}, root, tmp_path))
    both = torch.load(tmp_path / 'run' / 'model_best.pth.tar', weights_only=True)['state_dict']
    for folder, prefix in (('export', 'norm.'), ('export_aux', 'norm.aux.')):
        exported = timm.create_model(f'local-dir:{tmp_path / "run" / folder}', pretrained=True).state_dict()
        assert len(exported) == 9
        for name, value in exported.items():
            assert torch.equal(value, both[name.replace('norm.', prefix)]), name
    assert apart({'aux': both['norm.aux.running_mean']}, {'aux': both['norm.running_mean']}) > 1e-3


SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
import torch.distributed as dist
import test_reference_run as reference
rank = int(os.environ['RANK'])
settings = {settings!r}
dist.init_process_group('gloo', init_method='file://{store}', rank=rank, world_size=2)
expected = reference.reference_run(settings, {root!r})
dist.destroy_process_group()
reference.train(reference.config(settings, {root!r}, {output!r}))
if rank == 0:
    reference.assert_as_written(reference.Path({output!r}, 'run'), settings, expected)
print('compared', rank)
"""


def test_two_processes_share_gradients_and_statistics(root, tmp_path):
    # robust validation draws its noise by process, which tests/training/test_training.py follows
    settings = {**SETTINGS, 'batch_size': 3, 'grad_accum_steps': 3, 'model_ema': True, 'robust_eval_steps': 0,
                'random_start': True}
    script = SCRIPT.format(
        here=str(Path(__file__).parent), settings=settings, store=tmp_path / 'store', root=str(root),
        output=str(tmp_path))
    assert run_distributed(script, tmp_path).count('compared') == 2
