"""NoFrost* against its equation, its views, and its way through the train loops."""
import csv
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyNet, make_image_folder
from PIL import Image
from timm.data import create_dataset, create_loader

from timm_robust.attacks import InputSpace
from timm_robust.cli.main import main
from timm_robust.data import augment
from timm_robust.data.augment import ViewsDataset, noise2net, texture_debiased
from timm_robust.errors import InputError
from timm_robust.tasks import NoFrostStar, NoFrostStarTask, create_task
from timm_robust.training import TrainConfig

SPACE = InputSpace((.5, .4, .3), (.2, .25, .5))


def push(x, y):
    return x + .05 * torch.sin(37 * x)


def make_task(model, **kwargs):
    task = NoFrostStarTask(model, torch.nn.CrossEntropyLoss(), space=SPACE, verbose=False, **kwargs)
    task.run_attack = push
    return task


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('views,terms,deep', [(2, 3, False), (3, 4, False), (2, 4, True)])
def test_the_mean_of_all_losses(norm, views, terms, deep):
    model = TinyNet(norm=norm).double().train()
    task = make_task(model, terms=terms, noise2net=deep)
    assert task.views == views
    x = SPACE.normalize(torch.rand(views * 4, 3, 8, 8, dtype=torch.float64))
    y = torch.tensor([0, 1, 2, 3])
    result = task(x, y.repeat(views))
    parts = list(x.chunk(views))
    if deep:
        parts.append(SPACE.normalize(noise2net(SPACE.to_pixels(parts[0]), 0)))
    parts.append(push(parts[0], y))
    losses = [F.cross_entropy(model(part), y) for part in parts]
    assert len(losses) == terms
    torch.testing.assert_close(result['loss'], sum(losses) / terms)
    torch.testing.assert_close(result['augmented_loss'], sum(losses[1:-1]).detach() / (terms - 2))
    torch.testing.assert_close(result['output'], model(parts[0]))
    assert task.step == 1
    result['loss'].backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (sum(losses) / terms).backward()
    for own, p in zip(found, model.parameters()):
        torch.testing.assert_close(own, p.grad)


def test_three_terms_with_noise2net_draw_for_each_image():
    task = make_task(TinyNet(), terms=3, noise2net=True)
    clean, other = (SPACE.normalize(torch.rand(64, 3, 8, 8)) for _ in range(2))
    found, = task._augmented(clean, [other])
    deep = SPACE.normalize(noise2net(SPACE.to_pixels(clean).clamp(0, 1), task.step_seed()))
    kinds = [(int(torch.equal(f, d)), int(torch.equal(f, o))) for f, d, o in zip(found, deep, other)]
    assert set(kinds) == {(1, 0), (0, 1)} and 16 < sum(k[0] for k in kinds) < 48


def test_texture_debiasing_is_that_of_the_authors():
    crop, flip, colours, _ = texture_debiased(24, hflip=.25).transforms
    assert (crop.scale, crop.size, flip.p, colours.p) == ((.64, 1.), (24, 24), .25, .5)
    jitter, grey = colours.transforms
    assert (jitter.p, grey.p) == (.8, .2)
    strength = jitter.transforms[0]
    assert [strength.brightness, strength.contrast, strength.saturation] == [(pytest.approx(.2), 1.8)] * 3
    assert strength.hue == (-.2, .2)


def test_noise2net_mixes_a_network_of_wide_kernels_with_the_image(monkeypatch):
    x = .3 + .4 * torch.rand(1, 3, 33, 33)
    near = x.clone()
    near[0, :, 16, 16] += .3
    change = (noise2net(near, 0) - noise2net(x, 0)).abs().amax((0, 1))
    ring = change[10:23, 10:23].clone()
    ring[5:8, 5:8] = 0
    assert ring.amax() > 5 * change[:8].amax()  # kernels of 3, 5 and 7 in a row reach 6 pixels; beyond, moments alone
    assert augment._SHARE == (3 / 8, 3 / 4)
    monkeypatch.setattr(augment, '_SHARE', (0., 0.))
    torch.testing.assert_close(noise2net(x, 0), x)


def test_noise2net():
    x = torch.rand(6, 3, 16, 16)
    state = torch.get_rng_state()
    out = noise2net(x, 3)
    assert torch.equal(state, torch.get_rng_state()) and out.shape == x.shape and not out.requires_grad
    assert torch.equal(out, noise2net(x, 3)) and not torch.equal(out, noise2net(x, 4))
    assert out.min() >= 0 and out.max() <= 1
    assert ((out - x).flatten(1).norm(dim=1) > .5).all()
    same = noise2net(x[:1].expand(2, -1, -1, -1), 3)
    assert not torch.allclose(same[0], same[1])  # a network for each image
    assert noise2net(x[:, :1], 0).shape == (6, 1, 16, 16)
    smooth = .5 + .2 * x  # far from 0 and 1, where clamping would move the moments
    for f in (torch.mean, torch.std):
        a, b = (f(z, dim=(2, 3)) for z in (smooth, noise2net(smooth, 0)))
        assert (a - b).abs().max() < (1e-5 if f is torch.mean else .06)


@pytest.fixture
def folders(tmp_path):
    make_image_folder(tmp_path / 'data', per_class=8)
    for name, value in (('EDSR', 10), ('CAE', 250)):
        for path in (tmp_path / 'data' / 'train').rglob('*.png'):
            target = tmp_path / name / path.parent.name / f'{path.stem}.jpg'
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (32, 32), (value, int(path.stem) * 20, 0 if path.parent.name == 'a' else 200)).save(target)
    return tmp_path


def test_views_come_together_and_are_decoded_once(folders, monkeypatch):
    dataset = create_dataset('', root=str(folders / 'data'), split='train')
    opened, real = [], type(dataset).__getitem__
    monkeypatch.setattr(type(dataset), '__getitem__', lambda self, i: (opened.append(i), real(self, i))[1])
    views = ViewsDataset(dataset, 24, [str(folders / 'EDSR'), str(folders / 'CAE')])
    loader = create_loader(
        views, (3, 24, 24), 8, is_training=True, no_aug=True, num_workers=0, device=torch.device('cpu'),
        mean=(0., 0., 0.), std=(1., 1., 1.), persistent_workers=False)
    batches = [(x, y) for x, y in loader]
    assert sorted(opened) == list(range(16)) and len(batches) == 2
    reds = set()
    for x, y in batches:
        assert x.shape == (24, 3, 24, 24)
        assert torch.equal(y[:8], y[8:16]) and torch.equal(y[:8], y[16:])
        clean, debiased, deep = x.chunk(3)
        assert not torch.equal(clean, debiased)
        assert (clean[y[:8] == 0].mean() < .5) and (clean[y[:8] == 1].mean() > .5)
        # the deep image of the same class: its blue channel says which
        assert torch.equal((deep[:, 2].mean((1, 2)) > .4).long(), y[:8])
        reds |= {round(v, 1) for v in deep[:, 0].mean((1, 2)).tolist()}
    assert reds == {0., 1.}  # both folders are drawn from


def test_the_deep_image_is_that_of_the_clean_one(folders):
    dataset = create_dataset('', root=str(folders / 'data'), split='train')
    views = ViewsDataset(dataset, 32, [str(folders / 'EDSR')])
    for i in range(len(views)):
        (_, _, deep), _ = views[i]
        assert abs(int(deep[1].float().mean()) - 20 * int(dataset.filename(i, basename=True).split('.')[0])) <= 3
    one = ViewsDataset(dataset, 32, [str(folders / 'EDSR')], one_view=True)
    random.seed(0)
    kinds = [one[i][0] for i in range(16)]
    assert all(len(v) == 2 for v in kinds)
    flat = [float(v[1][0].float().std()) < 2 for v in kinds]
    assert 2 < sum(flat) < 14
    (folders / 'EDSR' / 'a' / '3.jpg').unlink()
    with pytest.raises(InputError, match=r"EDSR': has no a/3\.\*; it needs an image of the same class and name"):
        ViewsDataset(dataset, 32, [str(folders / 'EDSR')])
    (folders / 'CAE' / 'a' / '2.jpg').write_bytes((folders / 'CAE' / 'a' / '2.jpg').read_bytes()[:300])
    with pytest.raises(InputError, match='unreadable image .*2.jpg'):
        ViewsDataset(dataset, 32, [str(folders / 'CAE')])
    with pytest.raises(InputError, match='deepaug_dirs=.*nowhere.: holds no images'):
        ViewsDataset(dataset, 32, [str(folders / 'nowhere')])


@pytest.mark.parametrize('flags', [
    [], ['--noise2net'], ['--deepaug-dirs', 'EDSR', 'CAE'], ['--deepaug-dirs', 'EDSR', '--val-fraction', '.25']])
def test_training(folders, capsys, monkeypatch, flags):
    monkeypatch.chdir(folders)
    assert main([
        'train', '--model', 'nofrost_resnet20_cifar', '--num-classes', '2', '--data-dir', 'data', '--objective',
        'nofrost_star', '--attack-steps', '1', '--epochs', '1', '-b', '8', '-j', '0', '--warmup-epochs', '0',
        '--device', 'cpu', '--output', 'out', '--experiment', 'run', *flags]) == 0
    with open('out/run/summary.csv') as file:
        row, = csv.DictReader(file)
    assert {'train_clean_loss', 'train_augmented_loss', 'train_adv_loss'} <= set(row)
    weights = (3, 4)[bool(flags)]
    terms = [float(row[f'train_{k}_loss']) for k in ('clean', 'augmented', 'adv')]
    mean = (terms[0] + (weights - 2) * terms[1] + terms[2]) / weights
    assert float(row['train_loss']) == pytest.approx(mean, rel=1e-5)


def test_views_have_one_size():
    with pytest.raises(InputError, match='train_img_sizes=.*nofrost_star crops its views to one size'):
        TrainConfig.from_flat({'objective': 'nofrost_star', 'train_img_sizes': (32, 48)})
    older = SimpleNamespace(mixup=0., cutmix=0., cutmix_minmax=None, no_prefetcher=False)  # a train.py without sizes
    NoFrostStar().check_run(older)


@pytest.mark.parametrize('kwargs,message', [
    (dict(terms=4), 'terms=4: needs deeply augmented images; pass `deepaug_dirs` or `noise2net`'),
    (dict(terms=2), 'terms=2: must be 3'),
    (dict(noise2net=True, deepaug_dirs=['a']), 'noise2net=True: replaces `deepaug_dirs`'),
])
def test_bad_settings(kwargs, message):
    with pytest.raises(InputError, match=message):
        NoFrostStar(**kwargs)


def test_terms_follow_the_images_there_are():
    assert [NoFrostStar(**k).terms for k in ({}, {'noise2net': True}, {'deepaug_dirs': ['a']})] == [3, 4, 4]


@pytest.mark.parametrize('flags,text', [
    (['--mixup', '0.2'], '--mixup: nofrost_star collates its views'),
    (['--no-prefetcher'], '--no-prefetcher: nofrost_star collates its views'),
])
def test_bad_switches(folders, capsys, flags, text):
    assert main(['train', '--model', 'nofrost_resnet20_cifar', '--data-dir', str(folders / 'data'), '--objective',
                 'nofrost_star', *flags]) == 2
    error, = capsys.readouterr().err.strip().splitlines()
    assert text in error


def test_batches_must_hold_whole_views():
    task = create_task(NoFrostStar(), TinyNet(), torch.nn.CrossEntropyLoss(), space=SPACE, verbose=False)
    with pytest.raises(InputError, match='views=2 does not divide a batch of 7'):
        task(SPACE.normalize(torch.rand(7, 3, 8, 8)), torch.zeros(7, dtype=torch.long))
    with pytest.raises(InputError, match=r'terms=5: must be 3 \(the paper\) or 4'):
        make_task(TinyNet(), terms=5)
