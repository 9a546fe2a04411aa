"""Each attack against its equations, written out in float64, and under the rules every attack must keep."""
import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import TinyNet, state_equal

from timm_robust.attacks import (
    ATTACKS,
    InputSpace,
    ThreatModel,
    bim,
    cross_entropy,
    cw_linf,
    fgsm,
    fgsm_rs,
    margin,
    mim,
    pgd,
    pgd_targeted,
)
from timm_robust.errors import InputError
from timm_robust.models import NormalizedModel

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
LINF = ThreatModel('linf', 8 / 255)
L2 = ThreatModel('l2', 0.5)


@pytest.fixture
def problem():
    model = TinyNet().double().eval()
    return model, torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (6,))


def gradient(model, x, y, loss=None):
    x = x.clone().requires_grad_()
    value = F.cross_entropy(model(x), y, reduction='sum') if loss is None else loss(model(x), y).sum()
    return torch.autograd.grad(value, x)[0]


def clip(adv, x, eps):
    return torch.min(torch.max(adv, x - eps), x + eps).clamp(0, 1)


def test_fgsm_equation(problem):
    model, x, y = problem
    adv = fgsm(model, x, y, LINF, keep='last')
    torch.testing.assert_close(adv, (x + LINF.eps * gradient(model, x, y).sign()).clamp(0, 1), rtol=0, atol=1e-12)
    adv = fgsm(model, x, y, L2, keep='last')
    g = gradient(model, x, y)
    unit = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(adv, (x + L2.eps * unit).clamp(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_pgd_equation(problem, norm):
    model, x, y = problem
    threat = ThreatModel(norm, 0.05 if norm == 'linf' else 0.5)
    step = 0.02 if norm == 'linf' else 0.2
    expected = x
    for _ in range(5):
        g = gradient(model, expected, y)
        if norm == 'linf':
            expected = clip(expected + step * g.sign(), x, threat.eps)
        else:
            moved = expected + step * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = moved - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            expected = (x + delta * (threat.eps / length).clamp(max=1)).clamp(0, 1)
    adv = pgd(model, x, y, threat, steps=5, step_size=step, random_start=False, keep='last')
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_bim_and_mim_equations(problem):
    model, x, y = problem
    expected = x
    for _ in range(4):
        expected = clip(expected + LINF.eps / 4 * gradient(model, expected, y).sign(), x, LINF.eps)
    torch.testing.assert_close(bim(model, x, y, LINF, steps=4, keep='last'), expected, rtol=0, atol=1e-12)
    expected, velocity = x, 0
    for _ in range(4):
        g = gradient(model, expected, y)
        velocity = 0.9 * velocity + g / g.abs().sum((1, 2, 3), keepdim=True)
        expected = clip(expected + LINF.eps / 4 * velocity.sign(), x, LINF.eps)
    adv = mim(model, x, y, LINF, steps=4, decay=0.9, keep='last')
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_cw_linf_equation(problem):
    model, x, y = problem

    def loss(logits, labels):
        values = []
        for z, label in zip(logits, labels):
            others = torch.cat([z[:label], z[label + 1:]])
            values.append(-torch.clamp(z[label] - others.max() + 50., min=0))
        return torch.stack(values)

    torch.testing.assert_close(margin(model(x), y), loss(model(x), y))
    expected = x
    for _ in range(3):
        expected = clip(expected + 0.01 * gradient(model, expected, y, loss).sign(), x, LINF.eps)
    adv = cw_linf(model, x, y, LINF, steps=3, step_size=0.01, random_start=False, keep='last')
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_targeted_descends(problem):
    model, x, y = problem
    targets = (y + 1) % 4
    expected = clip(x - 0.01 * gradient(model, x, targets).sign(), x, LINF.eps)
    adv = pgd(model, x, y, LINF, steps=1, step_size=0.01, random_start=False, targets=targets, keep='last')
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_fgsm_rs_starts_at_random_and_steps_by_one_and_a_quarter(problem):
    model, x, y = problem
    x = x * 0.5 + 0.25  # away from the ends, where clamping would hide the step
    start = clip(pgd(model, x, y, LINF, steps=1, step_size=1e-30, seed=7, keep='last'), x, LINF.eps)
    expected = clip(start + 1.25 * LINF.eps * gradient(model, start, y).sign(), x, LINF.eps)
    torch.testing.assert_close(fgsm_rs(model, x, y, LINF, seed=7, keep='last'), expected, rtol=0, atol=1e-12)


PGD_FAMILY = ('fgsm', 'fgsm_rs', 'bim', 'pgd', 'mim', 'cw_linf')
ONE_NORM = {'rays': LINF, 'cw_l2': L2}
SHORT = {'apgd_ce': {'steps': 20}, 'apgd_dlr': {'steps': 20}, 'apgd_t': {'steps': 20}, 'fab': {'steps': 10},
         'fab_t': {'steps': 10}, 'square': {'query_limit': 50}, 'rays': {'query_limit': 200},
         'cw_l2': {'steps': 20, 'binary_search_steps': 3, 'initial_const': 10.}}


def skip_unless_defined(name, threat):
    if ONE_NORM.get(name, threat) is not threat:
        pytest.skip(f'{name} is for one norm')


@pytest.mark.parametrize('name', PGD_FAMILY)
@pytest.mark.parametrize('threat', [LINF, L2], ids=['linf', 'l2'])
def test_eps_is_in_pixels_whatever_the_space(name, threat):
    """Fails if eps is applied in normalized units: there the same attack would move pixels by eps * std."""
    model = TinyNet().double().eval()
    pixels = torch.rand(6, 3, 8, 8, dtype=torch.float64) * 0.5 + 0.25
    y = torch.randint(0, 4, (6,))

    def pixel_model(p):
        return model(SPACE.normalize(p))

    settings = {} if name.startswith('fgsm') else {'steps': 6}
    if name not in ('fgsm', 'bim', 'mim'):
        settings['seed'] = 5
    in_pixels = ATTACKS[name](pixel_model, pixels, y, threat, **settings)
    normalized = ATTACKS[name](model, SPACE.normalize(pixels), y, threat, space=SPACE, **settings)
    torch.testing.assert_close(SPACE.to_pixels(normalized), in_pixels, rtol=0, atol=1e-9)
    last = ATTACKS[name](model, SPACE.normalize(pixels), y, threat, space=SPACE, keep='last', **settings)
    delta = (SPACE.to_pixels(last) - pixels).flatten(1)
    size = delta.abs().amax(1) if threat is LINF else delta.norm(dim=1)
    assert size.max() <= threat.eps * (1 + 1e-9)
    assert size.min() > 0.9 * threat.eps


def test_normalized_images_without_a_space_are_refused(problem):
    model, x, y = problem
    with pytest.raises(InputError, match=r'space=InputSpace\(mean, std\)'):
        pgd(model, SPACE.normalize(x), y, LINF)


@pytest.mark.parametrize('name', list(ATTACKS))
@pytest.mark.parametrize('threat', [LINF, L2], ids=['linf', 'l2'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_rules_every_attack_keeps(name, threat, dtype):
    skip_unless_defined(name, threat)
    torch.manual_seed(1)
    model = TinyNet(norm=True, drop=0.5).to(dtype).train()
    model.conv.weight.requires_grad_(False)
    model.norm.eval()
    before, flags = copy.deepcopy(model), [m.training for m in model.modules()]
    x = torch.rand(8, 3, 8, 8, dtype=dtype)
    x[0], x[1] = 0., 1.
    y = torch.randint(0, 4, (8,))
    clean, state = x.clone(), torch.get_rng_state()
    adv = ATTACKS[name](model, x, y, threat, seed=0, **SHORT.get(name, {}))
    assert torch.equal(x, clean), 'the clean images were written to'
    assert torch.equal(state, torch.get_rng_state()), 'the global generator moved'
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert state_equal(model, before), 'weights or running statistics moved'
    assert not adv.requires_grad and adv.dtype == dtype and adv.shape == x.shape
    assert adv.min() >= 0 and adv.max() <= 1
    delta = (adv.double() - x.double()).flatten(1)
    size = delta.abs().amax(1) if threat is LINF else delta.norm(dim=1)
    assert size.max() <= threat.eps * (1 + 3e-6 if dtype == torch.float32 else 1 + 1e-12)
    again = ATTACKS[name](model, x, y, threat, seed=0, **SHORT.get(name, {}))
    assert torch.equal(adv, again), 'the same seed gave another image'


def test_world_is_restored_after_an_exception():
    model = TinyNet(norm=True).train()

    def explode(logits, y):
        raise RuntimeError('boom')

    with pytest.raises(RuntimeError, match='boom'):
        pgd(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), LINF, loss_fn=explode, norm_mode='train', keep='last')
    assert model.training and model.norm.training and all(p.requires_grad for p in model.parameters())


def test_train_mode_crafts_with_batch_statistics_and_restores_them():
    model = TinyNet(norm=True).eval()
    before = copy.deepcopy(model)
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    seen = []
    model.norm.register_forward_hook(lambda m, i, o: seen.append((m.training, o.mean().abs().item())))
    pgd(model, x, y, LINF, steps=2, norm_mode='train', keep='last')
    assert all(training and mean < 1e-5 for training, mean in seen), 'the norm did not use the batch'
    assert state_equal(model, before) and not model.norm.training


def test_restarts_are_kept_per_image():
    """A run that fools half of the images and one that fools the other half fool all of them together."""
    class Lottery(nn.Module):
        """Fooled only by perturbations that start on one side, which side differs between images."""

        def forward(self, x):
            side = x.flatten(1)[:, 0] - 0.5
            want = torch.where(x.flatten(1)[:, 1] > 0.5, 1., -1.)
            fooled = (side * want > 0).to(x.dtype)
            return torch.stack([1 - 2 * fooled, 2 * fooled - 1], 1) + 0 * x.sum()

    x = torch.full((10, 1, 2, 2), 0.5)
    x[:5, :, 0, 1], x[5:, :, 0, 1] = 0.9, 0.1
    y = torch.zeros(10, dtype=torch.long)
    attack = partial(pgd, Lottery(), x, y, ThreatModel('linf', 0.1), steps=1, step_size=1e-6, seed=0)
    fooled = [(Lottery()(attack(restarts=r)).argmax(1) != y).sum().item() for r in (1, 2, 16)]
    assert fooled == sorted(fooled) and fooled[0] < 10 and fooled[2] == 10


def test_best_is_never_weaker_than_last():
    torch.manual_seed(2)
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=4).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x, y = torch.rand(16, 3, 32, 32), torch.randint(0, 4, (16,))
    y = model(x).argmax(1)
    best = model(pgd(model, x, y, ThreatModel('linf', 4 / 255), steps=4, keep='best')).argmax(1) != y
    last = model(pgd(model, x, y, ThreatModel('linf', 4 / 255), steps=4, keep='last')).argmax(1) != y
    assert (best >= last).all() and best.any()


def test_multi_targeted_counts_targets():
    model = TinyNet().eval()
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    with pytest.raises(InputError, match='num_targets=9 must be between 1 and 3'):
        pgd_targeted(model, x, y, LINF, num_targets=9)
    wide = ThreatModel('linf', 1.)
    single = model(pgd_targeted(model, x, y, wide, num_targets=1)).argmax(1) != y
    every = model(pgd_targeted(model, x, y, wide, num_targets=3)).argmax(1) != y
    assert (every >= single).all()


@pytest.mark.parametrize('name', ['pgd', 'apgd_ce', 'fab_t', 'cw_l2'])
def test_half_precision_logits_change_nothing(name):
    """The loss is scaled on its way back and the gradient scaled down again."""
    torch.manual_seed(3)
    model, x = TinyNet().eval(), torch.rand(40, 3, 8, 8)
    with torch.no_grad():
        model.fc.weight *= 20
        model.fc.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    threat = {'cw_l2': ThreatModel('l2', .15)}.get(name, ThreatModel('linf', .02))
    full, half = (ATTACKS[name](m, x, y, threat, **SHORT.get(name, {})) for m in (model, lambda x: model(x).half()))
    full, half = (model(adv).argmax(1) != y for adv in (full, half))
    assert 5 < full.sum() < 35 and (full != half).sum() <= 1


@pytest.mark.parametrize('threat', [LINF, L2], ids=['linf', 'l2'])
def test_a_gradient_that_is_no_number_moves_nothing(threat):
    def model(x):
        size = x.flatten(1).square().sum(1).sqrt()  # has no gradient at a black image
        return torch.stack([size, 1 - size, -size, -size], 1)

    x, y = torch.rand(3, 3, 4, 4) * .2, torch.tensor([0, 1, 0])
    x[1] = 0.
    for name in ('fgsm', 'bim', 'mim'):
        adv = ATTACKS[name](model, x, y, threat)
        assert torch.isfinite(adv).all() and torch.equal(adv[1], x[1]) and not torch.equal(adv[0], x[0])


def test_images_to_evaluate_are_valid_pixels_in_their_space(problem):
    model, x, y = problem
    erased = SPACE.normalize(x.clone())
    erased[0, 0, 0, 0] = 9.
    with pytest.raises(InputError, match='without random erasing'):
        pgd(model, erased, y, LINF, space=SPACE)
    with pytest.raises(InputError, match='1 channels and InputSpace.* 3'):
        pgd(model, x[:, :1], y, LINF, space=SPACE)
    with pytest.raises(InputError, match='x has 1 channels and mean 3'):
        NormalizedModel(model, [0., 0., 0.], [1., 1., 1.])(x[:, :1])


def test_soft_targets_attack_the_likeliest_class(problem):
    model, x, y = problem
    soft = F.one_hot(y, 4).double() * 0.9 + 0.025
    adv = pgd(model, x, soft, LINF, steps=3, random_start=False, keep='last', step_size=0.01)
    expected = x
    for _ in range(3):
        g = gradient(model, expected, soft, lambda z, t: -(t * z.log_softmax(1)).sum(1))
        expected = clip(expected + 0.01 * g.sign(), x, LINF.eps)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        cross_entropy(model(x), soft), -(soft * model(x).log_softmax(1)).sum(1), rtol=1e-12, atol=1e-12)


def test_small_gradients_survive_float16():
    class Faint(nn.Module):
        def forward(self, x):
            return (x.half() * 2e-7).flatten(1).sum(1, keepdim=True) * torch.tensor([[1., -1.]]).half()

    x, y = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 0])
    adv = fgsm(Faint(), x, y, ThreatModel('linf', 0.1), keep='last')
    torch.testing.assert_close(adv, torch.full_like(x, 0.4))


@pytest.mark.parametrize('kwargs,message', [
    (dict(steps=0), 'steps=0'),
    (dict(steps=-3), 'steps=-3'),
    (dict(step_size=-0.1), 'step_size=-0.1'),
    (dict(restarts=0), 'restarts=0'),
    (dict(restarts=0, keep='last'), 'restarts=0'),
    (dict(restarts=2, keep='last'), "needs keep='best'"),
    (dict(keep='first'), "keep='first'"),
    (dict(norm_mode='test'), "norm_mode='test'"),
])
def test_bad_arguments(problem, kwargs, message):
    model, x, y = problem
    with pytest.raises(InputError, match=message):
        pgd(model, x, y, LINF, **kwargs)
    with pytest.raises(InputError, match='3 labels for 6 images'):
        pgd(model, x, y[:3], LINF)
    with pytest.raises(InputError, match='shape'):
        pgd(model, x[0], y, LINF)


def test_eps_zero_changes_nothing(problem):
    model, x, y = problem
    for name, attack in ATTACKS.items():
        threat = ThreatModel('l2' if name == 'cw_l2' else 'linf', 0.)
        assert torch.equal(attack(model, x, y, threat, **SHORT.get(name, {})), x), name
