import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import TinyNet, state_equal
from timm.loss import LabelSmoothingCrossEntropy

from timm_robust.attacks import PGD, InputSpace, Linf
from timm_robust.errors import InputError
from timm_robust.tasks import FAT, TRADES, FatTask, TradesFAT, TradesFatTask, TradesTask, TrainingAttack, create_task
from timm_robust.tasks.trades import kl_divergence

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
THREAT = Linf(8 / 255)


def batch(n=8, dtype=torch.float64):
    return SPACE.normalize(torch.rand(n, 3, 8, 8, dtype=dtype) * .9 + .05), torch.arange(n) % 4


def make_task(model, steps=3, cls=TradesTask, criterion=None, **kwargs):
    attack = TrainingAttack(steps=steps, step_size=2 / 255)
    return cls(model, criterion or nn.CrossEntropyLoss(), attack=attack, space=SPACE, verbose=False, **kwargs)


def divergence(clean, adv):
    """From probabilities, as the paper writes it."""
    p, q = clean.softmax(1), adv.softmax(1)
    return (p * (p / q).log()).sum(1)


@pytest.mark.parametrize('norm', [False, True], ids=['no_norm', 'batch_norm'])
@pytest.mark.parametrize('beta', [0., 6.])
def test_loss_and_gradients_follow_the_equation(norm, beta):
    model = TinyNet(norm=norm).double().train()
    twin = copy.deepcopy(model)
    x, y = batch()
    criterion = LabelSmoothingCrossEntropy(.1)
    task = make_task(model, beta=beta, criterion=criterion)
    adv = task.craft(x, y)
    result = task(x, y)
    result['loss'].backward()
    clean_logits, adv_logits = twin(x), twin(adv)
    loss = criterion(clean_logits, y) + beta * divergence(clean_logits, adv_logits).mean()
    loss.backward()
    torch.testing.assert_close(result['loss'].detach(), loss.detach(), rtol=1e-10, atol=1e-12)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    for a, b in zip(model.buffers(), twin.buffers()):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(result['output'], clean_logits)
    assert not any(v.requires_grad for k, v in result.items() if k not in ('loss', 'output'))


def test_images_ascend_the_divergence_from_a_little_noise():
    model = TinyNet(norm=True, drop=.5).double().train()
    x, y = batch()
    before = copy.deepcopy(model)
    start, adv = (make_task(model, steps=k).craft(x, y) for k in (1, 3))
    assert state_equal(model, before) and model.training
    # by hand: the same noise, steps along the sign of the divergence's gradient, clipping in pixels
    frozen = copy.deepcopy(model).eval()
    pixels = SPACE.to_pixels(x)
    seen = []
    PGD(steps=1, step_size=1e-30).craft(
        lambda z: seen.append(z.detach()) or frozen(z), x, y, THREAT, space=SPACE, start_std=1e-3, seed=0)
    noise = SPACE.to_pixels(seen[0]) - pixels
    assert noise.std().item() == pytest.approx(1e-3, rel=.05) and noise.mean().abs() < 1e-4
    point = SPACE.to_pixels(seen[0])
    for expected in (start, None, adv):
        leaf = point.clone().requires_grad_()
        value = divergence(frozen(x), frozen(SPACE.normalize(leaf))).sum()
        point = point + 2 / 255 * torch.autograd.grad(value, leaf)[0].sign()
        point = torch.min(torch.max(point, pixels - THREAT.eps), pixels + THREAT.eps).clamp(0, 1)
        if expected is not None:
            torch.testing.assert_close(SPACE.to_pixels(expected), point, rtol=0, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_saturated_logits_give_finite_values(dtype):
    clean = torch.tensor([[1e4, -1e4, 0.], [1e4, 0., -1e4]], dtype=dtype, requires_grad=True)
    adv = torch.tensor([[-1e4, 1e4, 0.], [1e4, 0., -1e4]], dtype=dtype, requires_grad=True)
    value = kl_divergence(clean, adv)
    value.backward()
    assert value.item() == pytest.approx(1e4, rel=.01)
    assert torch.isfinite(clean.grad).all() and torch.isfinite(adv.grad).all()


def test_soft_targets_act_on_the_clean_term_alone():
    model = TinyNet().double().train()
    x, y = batch()
    soft = .7 * F.one_hot(y, 4).double() + .3 * F.one_hot(y.roll(1), 4).double()
    hard, mixed = make_task(model)(x, y), make_task(model)(x, soft)
    assert torch.equal(hard['adv_loss'], mixed['adv_loss']) and hard['clean_loss'] != mixed['clean_loss']


def steps_until_fooled(model, x, y, tau, steps):
    """Algorithm 1 of FAT for one image at a time: the image, and the number of gradients it took."""
    pixels = SPACE.to_pixels(x)
    point, left = pixels.clone(), tau
    for k in range(steps):
        leaf = point.clone().requires_grad_()
        logits = model(SPACE.normalize(leaf))
        if logits.argmax(1) != y:
            if left == 0:
                return point, k
            left -= 1
        gradient = torch.autograd.grad(F.cross_entropy(logits, y), leaf)[0]
        point = point + 2 / 255 * gradient.sign()
        point = torch.min(torch.max(point, pixels - THREAT.eps), pixels + THREAT.eps).clamp(0, 1)
    return point, steps


@pytest.fixture
def undecided():
    """A network whose predictions change under attack, each image after another number of steps."""
    torch.manual_seed(0)
    model = TinyNet().double().eval()
    x, _ = batch(24)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
        return model, x, model(x).argmax(1)


@pytest.mark.parametrize('tau', [0, 1, 3])
def test_friendly_images_stop_after_they_fool(undecided, tau):
    model, x, y = undecided
    sizes = []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    attack = PGD(steps=6, step_size=2 / 255, random_start=False)
    adv = attack.craft(model, x, y, THREAT, tau=tau, space=SPACE)
    shown = list(sizes)
    counts = []
    for i in range(len(x)):
        expected, count = steps_until_fooled(model, x[i:i + 1], y[i:i + 1], tau, 6)
        torch.testing.assert_close(SPACE.to_pixels(adv[i:i + 1]), expected, rtol=0, atol=1e-9)
        counts.append(count)
    assert len(set(counts)) > 2, 'the comparison says nothing'
    assert shown == [sum(c >= k for c in counts) for k in range(6)], 'fooled images leave the batch'


def test_tau_rises_with_the_steps_and_survives_a_resume():
    task = make_task(TinyNet(), cls=FatTask, tau_epochs=[1, 2], steps_per_epoch=2)
    x, y = batch(dtype=torch.float32)
    seen = []
    for _ in range(5):
        seen.append(task.tau)
        task(x, y)
    assert seen == [0, 0, 1, 1, 2] and task.weight == 1
    other = make_task(TinyNet(), cls=FatTask)
    other.load_task_state(task.get_task_state())
    assert other.step == 5 and other.tau == 2 and task.get_task_state(ema=True) == {}


def test_friendly_trades_ascends_the_divergence_and_stops_by_the_labels(undecided):
    model, x, y = undecided
    task = make_task(model, cls=TradesFatTask, steps=6)
    plain = make_task(model, steps=6)
    adv, full = task.craft(x, y), plain.craft(x, y)
    stopped = (adv - full).flatten(1).abs().amax(1) > 1e-9
    fooled = model(adv).argmax(1) != y
    assert 0 < stopped.sum() < len(x) and fooled[stopped].all()
    torch.testing.assert_close(adv[~stopped], full[~stopped], rtol=0, atol=1e-9)


@pytest.mark.parametrize('objective,kind', [
    (TRADES(beta=3.), TradesTask), (FAT(tau_epochs=[1, 2.5]), FatTask),
    (TradesFAT(beta=3., tau_epochs=[1, 2.5]), TradesFatTask)])
def test_settings_build_the_tasks(objective, kind):
    model = TinyNet(norm=True)
    task = create_task(
        objective, model, attack=TrainingAttack(steps=2), space=SPACE, steps_per_epoch=10, verbose=False)
    assert type(task) is kind and getattr(task, 'beta', 3.) == 3.
    assert getattr(task, 'tau_steps', [10, 25]) == [10, 25]
    x, y = batch(dtype=torch.float32)
    task(x, y)['loss'].backward()
    moved = (SPACE.to_pixels(task.craft(x, y)) - SPACE.to_pixels(x)).abs().max()
    assert 0 < moved <= THREAT.eps * (1 + 1e-4)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_papers_trades_is_the_default():
    task = TradesTask(timm.create_model('nofrost_resnet20_cifar'), verbose=False)
    cfg = task.trainable_module.pretrained_cfg
    assert task.beta == 6 and task.attack.threat == THREAT and task.attack.steps == 10
    assert task.space == InputSpace(cfg['mean'], cfg['std']) and TradesTask(TinyNet()).space == InputSpace()
    x = task.space.normalize(torch.full((64, 3, 32, 32), .5))
    start, _ = spy_on_start(task, x)
    moved = task.space.to_pixels(start) - .5
    assert moved.std().item() == pytest.approx(1e-3, rel=.01)


def spy_on_start(task, x):
    """The first two batches that the network sees gradients at."""
    seen = []
    task.trainable_module.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach()) if torch.is_grad_enabled() else None)
    task.craft(x, torch.zeros(len(x), dtype=torch.long))
    return seen[0], seen[1]


@pytest.mark.parametrize('kwargs', [dict(attack='mim'), dict(random_start=False), dict(bn_mode='train')])
@pytest.mark.parametrize('objective', [TRADES(), FAT(), TradesFAT()])
def test_attacks_they_cannot_use(objective, kwargs):
    attack = TrainingAttack(**kwargs)
    if isinstance(objective, FAT) and 'random_start' in kwargs:
        objective.check_attack(attack)
        return
    (name, value), = kwargs.items()
    for refuse in (lambda: objective.check_attack(attack), lambda: create_task(objective, TinyNet(), attack=attack)):
        with pytest.raises(InputError) as error:
            refuse()
        assert (error.value.argument, error.value.value) == (f'attack.{name}', value)


@pytest.mark.parametrize('make,message', [
    (lambda: TRADES(beta=-1.), 'beta=-1.0: must be a number'),
    (lambda: FAT(tau_epochs=[-1.]), r'tau_epochs=\(-1.0,\): must be numbers'),
    (lambda: TradesFAT(tau_epochs=[float('nan')]), 'must be numbers'),
    (lambda: FAT(weight=2.), 'weight=2.0: must be a number in'),
])
def test_bad_settings(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_bad_arguments():
    x, y = batch()
    with pytest.raises(InputError, match='beta=-1'):
        make_task(TinyNet(), beta=-1)
    with pytest.raises(InputError, match='tau=-1: must be a whole number of at least 0'):
        PGD().craft(TinyNet().double(), x, y, THREAT, space=SPACE, tau=-1)
    with pytest.raises(InputError, match="keep='most_fooled': `start_std` and `tau` need"):
        PGD().craft(TinyNet().double(), x, y, THREAT, space=SPACE, start_std=.1, keep='most_fooled')


def test_a_run_of_another_objective_leaves_the_schedule_of_tau_alone(caplog):
    task = create_task(FAT(tau_epochs=[2.]), TinyNet(), space=SPACE, steps_per_epoch=10, verbose=False)
    task.load_task_state({'step': 7})
    assert task.step == 7 and task.tau_steps == [20] and not caplog.text
    task.load_task_state({'step': 7, 'tau_steps': [50]})
    assert task.tau_steps == [50] and 'not at [20]' in caplog.text
