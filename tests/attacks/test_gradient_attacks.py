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
    BIM,
    FGSM,
    FGSMRS,
    L1,
    L2,
    MIM,
    NFGSM,
    PGD,
    CWLinf,
    GradientAttack,
    InputSpace,
    Linf,
    PGDTargeted,
    cross_entropy,
    cw_loss,
)
from timm_robust.errors import InputError
from timm_robust.models import NormalizedModel

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
LINF = Linf(8 / 255)
EUCLID = L2(0.5)


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


def test_a_step_is_smaller_than_the_range_of_pixels(problem):
    model, x, y = problem
    with pytest.raises(InputError, match='step_size=2.0: is larger than any change of a pixel'):
        PGD(steps=1, step_size=2)(model, x, y, LINF)
    PGD(steps=1, step_size=2)(model, x, y, L2(3))


def test_fgsm_equation(problem):
    model, x, y = problem
    adv = FGSM().craft(model, x, y, LINF)
    torch.testing.assert_close(adv, (x + LINF.eps * gradient(model, x, y).sign()).clamp(0, 1), rtol=0, atol=1e-12)
    adv = FGSM().craft(model, x, y, EUCLID)
    g = gradient(model, x, y)
    unit = g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(adv, (x + EUCLID.eps * unit).clamp(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_pgd_equation(problem, norm):
    model, x, y = problem
    threat = Linf(0.05) if norm == 'Linf' else L2(0.5)
    step = 0.02 if norm == 'Linf' else 0.2
    expected = x
    for _ in range(5):
        g = gradient(model, expected, y)
        if norm == 'Linf':
            expected = clip(expected + step * g.sign(), x, threat.eps)
        else:
            moved = expected + step * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = moved - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            expected = (x + delta * (threat.eps / length).clamp(max=1)).clamp(0, 1)
    adv = PGD(steps=5, step_size=step, random_start=False).craft(model, x, y, threat)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_bim_and_mim_equations(problem):
    model, x, y = problem
    expected = x
    for _ in range(4):
        expected = clip(expected + LINF.eps / 4 * gradient(model, expected, y).sign(), x, LINF.eps)
    torch.testing.assert_close(BIM(steps=4).craft(model, x, y, LINF), expected, rtol=0, atol=1e-12)
    expected, velocity = x, 0
    for _ in range(4):
        g = gradient(model, expected, y)
        velocity = 0.9 * velocity + g / g.abs().sum((1, 2, 3), keepdim=True)
        expected = clip(expected + LINF.eps / 4 * velocity.sign(), x, LINF.eps)
    adv = MIM(steps=4, decay=0.9).craft(model, x, y, LINF)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_cw_linf_equation(problem):
    model, x, y = problem

    def loss(logits, labels):
        values = []
        for z, label in zip(logits, labels):
            others = torch.cat([z[:label], z[label + 1:]])
            values.append(-torch.clamp(z[label] - others.max() + 50., min=0))
        return torch.stack(values)

    torch.testing.assert_close(cw_loss(model(x), y), loss(model(x), y))
    expected = x
    for _ in range(3):
        expected = clip(expected + 0.01 * gradient(model, expected, y, loss).sign(), x, LINF.eps)
    adv = CWLinf(steps=3, step_size=0.01, random_start=False).craft(model, x, y, LINF)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)


def test_targeted_descends(problem):
    model, x, y = problem
    targets = (y + 1) % 4
    expected = clip(x - 0.01 * gradient(model, x, targets).sign(), x, LINF.eps)
    attack = PGD(steps=1, step_size=0.01, random_start=False)
    torch.testing.assert_close(attack.craft(model, x, y, LINF, targets=targets), expected, rtol=0, atol=1e-12)


def test_fgsm_rs_starts_at_random_and_steps_by_one_and_a_quarter(problem):
    model, x, y = problem
    x = x * 0.5 + 0.25  # away from the ends, where clamping would hide the step
    start = clip(PGD(steps=1, step_size=1e-30).craft(model, x, y, LINF, seed=7), x, LINF.eps)
    expected = clip(start + 1.25 * LINF.eps * gradient(model, start, y).sign(), x, LINF.eps)
    torch.testing.assert_close(FGSMRS().craft(model, x, y, LINF, seed=7), expected, rtol=0, atol=1e-12)


def test_n_fgsm_steps_from_strong_noise_and_does_not_come_back(problem):
    """de Jorge et al. 2022: noise of 2 eps, one step of eps, no projection."""
    model, x, y = problem
    x = x * 0.1 + 0.45
    seen = []
    adv = NFGSM().craft(lambda z: seen.append(z.detach()) or model(z), x, y, LINF, seed=7)
    noise = (seen[0] - x) / LINF.eps
    assert 1.9 < noise.abs().max() <= 2 and abs(noise.mean()) < .1
    torch.testing.assert_close(adv, seen[0] + LINF.eps * gradient(model, seen[0], y).sign(), rtol=0, atol=1e-12)
    assert (adv - x).abs().max() > 2.5 * LINF.eps
    with pytest.raises(InputError, match='whole batches'):
        NFGSM()(model, x, y, LINF)


GRADIENT = [cls() for cls in ATTACKS.values() if issubclass(cls, GradientAttack) and cls.transfers]
THREATS = {'Linf': LINF, 'L2': EUCLID, 'L1': L1(.2)}


@pytest.mark.parametrize('attack', GRADIENT, ids=str)
@pytest.mark.parametrize('threat', THREATS.values(), ids=str)
def test_eps_is_in_pixels_whatever_the_space(attack, threat):
    """Fails if eps is applied in normalized units: there the same attack would move pixels by eps * std."""
    model = TinyNet().double().eval()
    pixels = torch.rand(6, 3, 8, 8, dtype=torch.float64) * 0.5 + 0.25
    y = torch.randint(0, 4, (6,))

    def pixel_model(p):
        return model(SPACE.normalize(p))

    in_pixels = attack(pixel_model, pixels, y, threat, seed=5)
    normalized = attack(model, SPACE.normalize(pixels), y, threat, space=SPACE, seed=5)
    torch.testing.assert_close(SPACE.to_pixels(normalized), in_pixels, rtol=0, atol=1e-9)
    last = attack.craft(model, SPACE.normalize(pixels), y, threat, space=SPACE, seed=5)
    size = threat.size(SPACE.to_pixels(last) - pixels)
    assert size.max() <= threat.eps * (1 + 1e-9)
    assert size.min() > 0.9 * threat.eps


def test_normalized_images_without_a_space_are_refused(problem):
    model, x, y = problem
    with pytest.raises(InputError, match=r'space=InputSpace\(mean, std\)'):
        PGD()(model, SPACE.normalize(x), y, LINF)


def test_world_is_restored_after_an_exception():
    model = TinyNet(norm=True).train()

    def explode(logits, y):
        raise RuntimeError('boom')

    with pytest.raises(RuntimeError, match='boom'):
        PGD().craft(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), LINF, loss_fn=explode, bn_mode='train')
    assert model.training and model.norm.training and all(p.requires_grad for p in model.parameters())


def test_train_mode_crafts_with_batch_statistics_and_restores_them():
    model = TinyNet(norm=True).eval()
    before = copy.deepcopy(model)
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    seen = []
    model.norm.register_forward_hook(lambda m, i, o: seen.append((m.training, o.mean().abs().item())))
    PGD(steps=2).craft(model, x, y, LINF, bn_mode='train')
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
    attacks = [PGD(steps=1, step_size=1e-6, restarts=r) for r in (1, 2, 16)]
    fooled = [(Lottery()(attack(Lottery(), x, y, Linf(0.1))).argmax(1) != y).sum().item() for attack in attacks]
    assert fooled == sorted(fooled) and fooled[0] < 10 and fooled[2] == 10


def test_best_is_never_weaker_than_last():
    torch.manual_seed(2)
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=4).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x, y = torch.rand(16, 3, 32, 32), torch.randint(0, 4, (16,))
    y = model(x).argmax(1)
    attack, how = PGD(steps=4), dict(space=InputSpace())
    best = model(attack(model, x, y, Linf(4 / 255), **how)).argmax(1) != y
    last = model(attack.craft(model, x, y, Linf(4 / 255), **how)).argmax(1) != y
    assert (best >= last).all() and best.any()


def test_multi_targeted_counts_targets():
    model = TinyNet().eval()
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    with pytest.raises(InputError, match='num_targets=9: must be between 1 and 3'):
        PGDTargeted(num_targets=9)(model, x, y, LINF)
    wide = Linf(1.)
    single = model(PGDTargeted(num_targets=1)(model, x, y, wide)).argmax(1) != y
    every = model(PGDTargeted(num_targets=3)(model, x, y, wide)).argmax(1) != y
    assert (every >= single).all()


@pytest.mark.parametrize('threat', THREATS.values(), ids=str)
def test_a_gradient_that_is_no_number_moves_nothing(threat):
    def model(x):
        size = x.flatten(1).square().sum(1).sqrt()  # has no gradient at a black image
        return torch.stack([size, 1 - size, -size, -size], 1)

    x, y = torch.rand(3, 3, 4, 4) * .2, torch.tensor([0, 1, 0])
    x[1] = 0.
    for attack in (FGSM(), BIM(), MIM()):
        adv = attack(model, x, y, threat)
        assert torch.isfinite(adv).all() and torch.equal(adv[1], x[1]) and not torch.equal(adv[0], x[0])


def test_images_to_evaluate_are_valid_pixels_in_their_space(problem):
    model, x, y = problem
    erased = SPACE.normalize(x.clone())
    erased[0, 0, 0, 0] = 9.
    with pytest.raises(InputError, match='without random erasing'):
        PGD()(model, erased, y, LINF, space=SPACE)
    with pytest.raises(InputError, match='1 channels and InputSpace.* 3'):
        PGD()(model, x[:, :1], y, LINF, space=SPACE)
    with pytest.raises(InputError, match='images: have 1 channels, mean and std have 3'):
        NormalizedModel(model, [0., 0., 0.], [1., 1., 1.])(x[:, :1])


def test_soft_targets_attack_the_likeliest_class(problem):
    model, x, y = problem
    soft = F.one_hot(y, 4).double() * 0.9 + 0.025
    adv = PGD(steps=3, random_start=False, step_size=0.01).craft(model, x, soft, LINF)
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
    adv = FGSM().craft(Faint(), x, y, Linf(0.1))
    torch.testing.assert_close(adv, torch.full_like(x, 0.4))


@pytest.mark.parametrize('settings,message', [
    (dict(steps=0), 'steps=0: must be a whole number of at least 1'),
    (dict(steps=2.5), 'steps=2.5: must be a whole number'),
    (dict(steps=True), 'steps=True'),
    (dict(step_size=-0.1), 'step_size=-0.1: must be positive'),
    (dict(step_size='0/255'), "step_size='0/255': must be positive"),
    (dict(step_size='two'), "step_size='two': is not a number"),
    (dict(restarts=0), 'restarts=0'),
])
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        PGD(**settings)


@pytest.mark.parametrize('how,message', [
    (dict(keep='first'), "keep='first': unknown"),
    (dict(bn_mode='test'), "bn_mode='test': unknown"),
    (dict(keep='most_fooled', tau=1), "keep='most_fooled'"),
    (dict(tau=-1), 'tau=-1'),
])
def test_bad_arguments_of_craft(problem, how, message):
    model, x, y = problem
    with pytest.raises(InputError, match=message):
        PGD().craft(model, x, y, LINF, **how)
    with pytest.raises(InputError, match='restarts=2: .*most_fooled'):
        PGD(restarts=2).craft(model, x, y, LINF)
    with pytest.raises(InputError, match='attacks single images only'):
        PGDTargeted().craft(model, x, y, LINF)


@pytest.mark.parametrize('cls,settings', [
    (FGSM, dict(steps=50)), (FGSM, dict(random_start=True)), (BIM, dict(random_start=True)), (FGSMRS, dict(steps=7)),
    (MIM, dict(restarts=2)), (PGD, dict(num_targets=3))])
def test_a_setting_that_an_attack_does_not_have_is_refused(cls, settings):
    with pytest.raises(TypeError, match=next(iter(settings))):
        cls(**settings)


def test_a_step_size_may_be_written_as_a_fraction():
    assert PGD(step_size='2/255') == PGD(step_size=2 / 255)


class Pairs(nn.Module):
    """A batch whose images are fooled together or not at all: by the first pixel of the first image."""

    def forward(self, x):
        lead = (x[:1, 0, 0, 0] - .5).sum() + 0 * x[:, 0, 0, 0]
        return torch.stack([0 * lead, lead], 1)


def test_most_fooled_is_the_best_iterate_of_the_best_restart():
    """Restarts differ, each has its own start, and the last iterate is looked at."""
    x, y = torch.full((4, 1, 2, 2), .46), torch.zeros(4, dtype=torch.int64)
    threat, counts = Linf(.1), []

    def spy(seen, z):
        seen.append(z.detach().clone())
        return Pairs()(z)

    for restarts in (1, 2, 3, 8):
        seen = []
        attack = PGD(steps=1, step_size=1e-9, restarts=restarts)
        adv = attack.craft(partial(spy, seen), x, y, threat, keep='most_fooled')
        starts = {tuple(s.flatten().tolist()) for s in seen}
        assert len(starts) == restarts and len(seen) == 2 * restarts, 'a start and a last iterate for each restart'
        most = max(int((Pairs()(s).argmax(1) != y).sum()) for s in seen)
        counts.append(int((Pairs()(adv).argmax(1) != y).sum()))
        assert counts[-1] == most
    assert counts == sorted(counts) and counts[0] < 4 and counts[-1] == 4
    # one step over the boundary: fooled by the last iterate alone
    adv = PGD(steps=1, step_size=.09, random_start=False).craft(Pairs(), x, y, threat, keep='most_fooled')
    assert int((Pairs()(adv).argmax(1) != y).sum()) == 4


class Fork(nn.Module):
    """Class 1 is in reach of bright images alone, class 2 of dark ones, which is the less likely for all."""

    def forward(self, x):
        up, bright = x[:, 0, 0, 0] - .5, x[:, 0, 1, 1] > .5
        return torch.stack([.05 + 0 * up, torch.where(bright, up, 0 * up), torch.where(bright, 0 * up, up) - .01], 1)


def test_every_target_class_is_tried_up_to_the_last():
    x = torch.full((6, 1, 2, 2), .5)
    x[:3, :, 1, 1], x[3:, :, 1, 1] = .9, .1
    y, threat = torch.zeros(6, dtype=torch.int64), Linf(.1)

    def fooled(attack, **how):
        return attack.run(Fork(), x, y, threat, **how).fooled.tolist()

    steer = PGD(steps=5, random_start=False)
    assert fooled(steer, targets=[1] * 6) == [True] * 3 + [False] * 3
    assert fooled(steer, targets=[2] * 6) == [False] * 3 + [True] * 3
    assert all(fooled(steer, targets=[[1, 2]] * 6))
    assert fooled(PGDTargeted(steps=5, random_start=False, num_targets=1)) == [True] * 3 + [False] * 3
    assert all(fooled(PGDTargeted(steps=5, random_start=False)))
