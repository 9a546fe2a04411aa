import math

import pytest
import torch

from timm_robust.attacks import InputSpace, ThreatModel, madry_step_size, nofrost_step_size, parse_eps
from timm_robust.attacks.threat import Ball
from timm_robust.errors import InputError

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def test_parse_eps():
    assert parse_eps('8/255') == 8 / 255
    assert parse_eps('0.031') == 0.031
    assert parse_eps(0.5) == 0.5
    for bad in ('eight', '8/0', None, '8//255'):
        with pytest.raises(InputError, match='8/255'):
            parse_eps(bad)


def test_threat_model_refuses_255_units():
    with pytest.raises(InputError, match='write 8/255'):
        ThreatModel('linf', 8)
    assert ThreatModel('l2', 3).eps == 3
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match='eps'):
            ThreatModel('linf', bad)
    with pytest.raises(InputError, match="norm='l3'"):
        ThreatModel('l3', 0.1)
    with pytest.raises(InputError, match='std'):
        InputSpace((0.,), (0.,))


def test_threat_model_in_words():
    assert str(ThreatModel('linf', '8/255')) == 'Linf eps 8/255'
    assert str(ThreatModel('linf', 0.2)) == 'Linf eps 0.2'
    assert str(ThreatModel('linf', 0.031)) == 'Linf eps 0.031'
    assert str(ThreatModel('l2', 1)) == 'L2 eps 1'


def test_step_sizes():
    assert math.isclose(nofrost_step_size(ThreatModel('linf', '8/255'), 10), 1 / 255)
    assert math.isclose(nofrost_step_size(ThreatModel('linf', '32/255'), 10), 3.6 / 255)
    assert math.isclose(madry_step_size(ThreatModel('linf', '8/255'), 20), 1 / 255)


def test_spaces_are_inverse():
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(SPACE.to_pixels(SPACE.normalize(pixels)), pixels, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize('norm,eps', [('linf', 0.1), ('l2', 0.7)])
def test_projection_is_within_eps_in_pixels(norm, eps):
    pixels = torch.rand(5, 3, 6, 6, dtype=torch.float64)
    ball = Ball(SPACE.normalize(pixels), ThreatModel(norm, eps), SPACE)
    adv = SPACE.to_pixels(ball.project(ball.x + 3 * torch.randn_like(ball.x)))
    delta = (adv - pixels).flatten(1)
    size = delta.abs().amax(1) if norm == 'linf' else delta.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-12) and size.min() > 0.5 * eps
    assert adv.min() >= -1e-15 and adv.max() <= 1 + 1e-15
    inside = ball.x + 0.01 * eps * torch.randn_like(ball.x).clamp(-1, 1)
    inside = SPACE.normalize(SPACE.to_pixels(inside).clamp(0, 1))
    torch.testing.assert_close(ball.project(inside), inside, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_pixels_outside_the_range_are_not_forced_back(norm):
    # what random erasing leaves behind
    x = torch.full((1, 3, 2, 2), 4., dtype=torch.float64)
    x[0, 0] = -4.
    ball = Ball(x, ThreatModel(norm, 0.05), SPACE)
    assert torch.equal(ball.project(x), x)
    moved = SPACE.to_pixels(ball.project(x + 100)) - SPACE.to_pixels(x)
    assert moved.abs().max() <= 0.05 + 1e-12
    assert (SPACE.to_pixels(ball.project(x + 100)) <= SPACE.to_pixels(x).clamp_min(1) + 1e-12).all()


@pytest.mark.parametrize('norm,eps', [('linf', 0.1), ('l2', 0.7)])
def test_random_start(norm, eps):
    x = torch.full((64, 3, 8, 8), 0.5, dtype=torch.float64)
    ball = Ball(x, ThreatModel(norm, eps), InputSpace())
    delta = (ball.random(seed=3) - x).flatten(1)
    if norm == 'linf':
        # uniform on [-eps, eps]
        assert delta.abs().max() <= eps
        assert abs(delta.mean()) < 0.01 * eps and abs(delta.std() / (eps / 3 ** .5) - 1) < 0.02
    else:
        # the radius of a uniform point of a d-ball is U^(1/d), with mean d / (d + 1)
        radius = delta.norm(dim=1) / eps
        assert radius.max() <= 1 + 1e-9 and abs(radius.mean() - 192 / 193) < 0.01
    assert torch.equal(ball.random(seed=3), ball.random(seed=3))
    assert not torch.equal(ball.random(seed=3), ball.random(seed=4))


def test_one_seed_per_image_makes_noise_independent_of_the_batch():
    x = torch.rand(4, 3, 5, 5)
    for norm in ('linf', 'l2'):
        threat = ThreatModel(norm, 0.1)
        together = Ball(x, threat, InputSpace()).random(seed=[10, 11, 12, 13])
        apart = Ball(x[2:], threat, InputSpace()).random(seed=[12, 13])
        assert torch.equal(together[2:], apart)


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    Ball(torch.rand(2, 3, 4, 4), ThreatModel('linf', 0.1), InputSpace()).random(seed=0)
    assert not torch.equal(state, torch.get_rng_state())  # torch.rand above
    state = torch.get_rng_state()
    Ball(torch.zeros(2, 3, 4, 4), ThreatModel('linf', 0.1), InputSpace()).random(seed=0)
    assert torch.equal(state, torch.get_rng_state())
