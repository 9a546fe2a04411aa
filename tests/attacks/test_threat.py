import math

import pytest
import torch
from scipy.optimize import minimize

from timm_robust.attacks import (
    L1,
    L2,
    NORMS,
    Ball,
    InputSpace,
    Linf,
    ThreatModel,
    madry_step_size,
    make_threat,
    nofrost_step_size,
    parse_eps,
    parse_threat,
    register_norm,
)
from timm_robust.attacks.threat import project_onto_l1, sparse_signs
from timm_robust.errors import InputError
from timm_robust.evaluation import ThreatConfig
from timm_robust.tasks import TrainingAttack

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def test_parse_eps():
    assert parse_eps('8/255') == 8 / 255
    assert parse_eps('0.031') == 0.031
    assert parse_eps(0.5) == 0.5
    for bad in ('eight', '8/0', None, '8//255', True):
        with pytest.raises(InputError, match='8/255'):
            parse_eps(bad)


def test_threat_model_refuses_255_units():
    with pytest.raises(InputError, match='write 8/255'):
        Linf(8)
    assert L2(3).eps == 3
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match='eps'):
            Linf(bad)
    with pytest.raises(InputError, match="norm='l3': unknown; choose one of Linf, L2"):
        make_threat('l3', 0.1)
    with pytest.raises(TypeError):
        ThreatModel(0.1)
    with pytest.raises(InputError, match='std'):
        InputSpace((0.,), (0.,))


def test_threat_model_in_words():
    assert str(Linf('8/255')) == 'Linf 8/255'
    assert str(Linf(0.2)) == 'Linf 0.2'
    assert str(Linf(0.031)) == 'Linf 0.031'
    assert str(L2(1)) == 'L2 1' and str(L2(.5)) == 'L2 0.5' and str(L1(12)) == 'L1 12'
    assert repr(Linf('8/255')) == f'Linf(eps={8 / 255})'


@pytest.mark.parametrize('text,threat', [
    ('Linf 8/255', Linf(8 / 255)), ('linf eps 8/255', Linf(8 / 255)), ('LINF 0.1', Linf(.1)), ('l2 .5', L2(.5)),
    (' Linf  8 / 255 ', Linf(8 / 255)), (L2(2), L2(2)), ('l1 12', L1(12))])
def test_threats_are_read_as_they_are_printed(text, threat):
    assert parse_threat(text) == threat and hash(parse_threat(text)) == hash(threat)


@pytest.mark.parametrize('norm', NORMS)
def test_what_is_printed_is_read_back(norm):
    for eps in (0, 1 / 255, 8 / 255, .031, .1, 1 / 3, 0.123456789, 3 * (1 / 255), 1e-9, 1.):
        threat = make_threat(norm, eps)
        assert math.isclose(parse_threat(str(threat)).eps, eps, rel_tol=1e-15), str(threat)
    assert parse_threat(str(make_threat(norm, .5)).lower()) == make_threat(norm.upper(), '1/2')
    assert Linf(.1) != L2(.1)


@pytest.mark.parametrize('text', ['Linf', '8/255', 'L7 8/255', 'Linf eps', 'Linf eight', 8 / 255, None, 'Linf 8'])
def test_what_is_no_threat_model(text):
    with pytest.raises(InputError, match='^threat='):
        parse_threat(text)


def test_only_linf_has_a_default_eps():
    assert make_threat('linf') == Linf('8/255') and make_threat('L2', .5) == L2(.5)
    for norm in ('L2', 'l1'):
        with pytest.raises(InputError, match=f'eps: has no default for {norm.upper()}'):
            make_threat(norm)
        for settings in (ThreatConfig, TrainingAttack):
            assert settings(norm='Linf').threat == Linf('8/255') and settings(norm=norm, eps=2).threat.eps == 2
            with pytest.raises(InputError, match='eps: has no default'):
                settings(norm=norm)


def test_a_norm_has_one_name():
    with pytest.raises(InputError, match="norm='Linf': is taken by timm_robust.attacks.threat.Linf"):
        register_norm(type('Other', (L2,), {'norm': 'Linf'}))
    with pytest.raises(InputError, match="norm='': is not a valid norm name"):
        register_norm(type('Nameless', (L2,), {'norm': ''}))


@pytest.mark.parametrize('threat', [make_threat(norm, .3) for norm in NORMS], ids=str)
def test_geometry_of_every_norm(threat):
    x = torch.randn(50, 3, 4, 4, dtype=torch.float64)
    size, steepest = threat.size(x), threat.steepest(x)
    assert size.shape == (50,) and (size > 0).all()
    torch.testing.assert_close(threat.size(2 * x), 2 * size)
    torch.testing.assert_close(threat.size(steepest), torch.ones_like(size))
    rise = (x * steepest).flatten(1).sum(1)
    torch.testing.assert_close(threat.dual_size(x), rise)
    others = torch.randn(50, 200, 48, dtype=torch.float64)
    for i in range(50):
        directions = others[i] / threat.size(others[i])[:, None]
        assert (directions @ x[i].flatten() <= rise[i] * (1 + 1e-12)).all(), 'another direction of size 1 rises more'
    projected = threat.project(x)
    assert threat.size(projected).max() <= threat.eps * (1 + 1e-12)
    inside = .9 * threat.eps * x / size.view(-1, 1, 1, 1)
    torch.testing.assert_close(threat.project(inside), inside)
    drawn = threat.random(torch.arange(50), 48)
    assert drawn.shape == (50, 48) and threat.size(drawn).max() <= threat.eps * (1 + 1e-6)
    assert torch.equal(drawn[7:9], threat.random(torch.arange(7, 9), 48))
    torch.testing.assert_close(threat.size(threat.direction(torch.arange(50), 0, 48)), torch.ones(50))
    corner = torch.ones(1, 3, 4, 4, dtype=torch.float64)
    assert threat.unbounded((3, 4, 4)).eps == threat.size(corner).item()
    assert threat.scaled(.5) == make_threat(threat.norm, .15) and threat.scaled(1e9).eps <= threat.largest


def by_bisection(delta, lowest, highest, eps):
    """The projection onto the L1 ball and a box of one perturbation: the shift by halving an interval."""
    def shifted(s):
        return (delta.sign() * (delta.abs() - s).clamp_min(0)).clamp(lowest, highest)

    low, high = 0., delta.abs().max().item()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if shifted(middle).abs().sum() > eps else (low, middle)
    return delta.clamp(lowest, highest) if shifted(0.).abs().sum() <= eps else shifted(high)


def test_projection_onto_the_l1_ball_within_the_box_is_the_nearest_point():
    """Against bisection, and for few pixels against a solver that knows nothing of shifts; each row has its eps."""
    torch.manual_seed(0)
    cut = 0
    for pixels, spread in ((5, .5), (5, 3.), (300, .1), (300, 4.)):
        x = torch.rand(40, pixels, dtype=torch.float64).round(decimals=1)  # some pixels are black or white
        delta = torch.randn_like(x) * spread
        delta[:, 1] = delta[:, 0]  # ties
        eps = torch.linspace(.01, .4 * pixels, 40, dtype=torch.float64)
        found = project_onto_l1(delta, -x, 1 - x, eps)
        assert (found.abs().sum(1) <= eps * (1 + 1e-12)).all() and (x + found).min() >= 0 and (x + found).max() <= 1
        for i in range(40):
            torch.testing.assert_close(
                found[i], by_bisection(delta[i], -x[i], 1 - x[i], eps[i]), rtol=0, atol=1e-12, msg=f'{pixels} {i}')
            cut += bool((found[i].abs().sum() - eps[i]).abs() < 1e-9)
        if pixels == 5:
            for i in range(0, 40, 8):
                # d = up - down, up and down of at least 0
                up, down = ((1 - x[i]).numpy(), x[i].numpy())
                goal, limit = delta[i].numpy(), eps[i].item()
                best = minimize(
                    lambda v, goal=goal: ((v[:5] - v[5:] - goal) ** 2).sum(), [0.] * 10, method='SLSQP',
                    bounds=[(0, u) for u in (*up, *down)], options={'ftol': 1e-15, 'maxiter': 1000},
                    constraints={'type': 'ineq', 'fun': lambda v, limit=limit: limit - v.sum()}).x
                assert abs(found[i].numpy() - (best[:5] - best[5:])).max() < 1e-5
    assert cut > 60, 'hardly any perturbation was too long'
    # `x` and `delta` of 300 pixels, as images in another space
    images, moved = x.view(40, 3, 10, 10), (x + delta).view(40, 3, 10, 10)
    adv = SPACE.to_pixels(Ball(SPACE.normalize(images), L1(9), SPACE).project(SPACE.normalize(moved)))
    expected = torch.stack([by_bisection(d, -p, 1 - p, 9.) for d, p in zip(delta, x)]).view_as(images)
    torch.testing.assert_close(adv - images, expected, rtol=0, atol=1e-9)
    x, delta = torch.rand(50, 3072), torch.randn(50, 3072)
    assert project_onto_l1(delta, -x, 1 - x, 12.).abs().sum(1).max() <= 12 * (1 + 1e-6), 'float32'
    assert not project_onto_l1(delta, -x, 1 - x, 0.).any()
    x[:] = 1 + 1e-6  # images may be off by rounding
    assert not project_onto_l1(delta.abs(), -x, 1 - x, 12.).any()


def test_sparse_steps_move_the_largest_gradients_alone():
    gradient = torch.tensor([[5., -4, 3, 0], [0, 0, 0, 0], [0, -2, 0, 0]]).view(3, 1, 2, 2)
    expected = torch.tensor([[.5, -.5, 0, 0], [0, 0, 0, 0], [0, -1, 0, 0]]).view(3, 1, 2, 2)
    assert torch.equal(sparse_signs(gradient, 2), expected)
    assert torch.equal(sparse_signs(gradient, torch.tensor([2, 1, 4])), expected)
    assert torch.equal(sparse_signs(gradient, torch.tensor([3, 1, 1]))[0].flatten() * 3, torch.tensor([1., -1, 1, 0]))
    stride = L1(12).stride(torch.randn(2, 3, 20, 20))
    assert (stride != 0).flatten(1).sum(1).tolist() == [12, 12], '1 % of the pixels'
    assert torch.allclose(stride[stride != 0].abs(), torch.tensor(1 / 12))


def test_step_sizes():
    assert math.isclose(nofrost_step_size(Linf('8/255'), 10), 1 / 255)
    assert math.isclose(nofrost_step_size(Linf('32/255'), 10), 3.6 / 255)
    assert math.isclose(madry_step_size(Linf('8/255'), 20), 1 / 255)


@pytest.mark.parametrize('mean, std, words', [
    ((.5,), (math.inf,), 'std=.*must be finite and positive'), ((math.nan,), (1,), 'mean=.*must be finite'),
    (.5, (1,), 'mean=0.5: must hold a number for each'), ((.5,), ('x',), 'std=.*must hold a number')])
def test_spaces_that_are_none(mean, std, words):
    with pytest.raises(InputError, match=words):
        InputSpace(mean, std)


def test_the_box_is_eps_wide_on_both_sides_in_pixels():
    x = SPACE.normalize(torch.full((2, 3, 4, 4), .5, dtype=torch.float64))
    ball = Ball(x, Linf('8/255'), SPACE)
    for edge, sign in ((ball.upper, 1), (ball.lower, -1)):
        torch.testing.assert_close(
            SPACE.to_pixels(edge), torch.full_like(x, .5 + sign * 8 / 255), rtol=0, atol=1e-15)


def test_spaces_are_inverse():
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(SPACE.to_pixels(SPACE.normalize(pixels)), pixels, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize('norm,eps', [('Linf', 0.1), ('L2', 0.7), ('L1', 5.)])
def test_projection_is_within_eps_in_pixels(norm, eps):
    pixels = torch.rand(5, 3, 6, 6, dtype=torch.float64)
    ball = Ball(SPACE.normalize(pixels), make_threat(norm, eps), SPACE)
    adv = SPACE.to_pixels(ball.project(ball.x + 3 * torch.randn_like(ball.x)))
    delta = (adv - pixels).flatten(1)
    size = {'Linf': delta.abs().amax(1), 'L2': delta.norm(dim=1), 'L1': delta.abs().sum(1)}[norm]
    assert size.max() <= eps * (1 + 1e-12) and size.min() > 0.5 * eps
    assert adv.min() >= -1e-15 and adv.max() <= 1 + 1e-15
    inside = ball.x + 0.01 * eps * torch.randn_like(ball.x).clamp(-1, 1)
    inside = SPACE.normalize(SPACE.to_pixels(inside).clamp(0, 1))
    torch.testing.assert_close(ball.project(inside), inside, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
def test_pixels_outside_the_range_are_not_forced_back(norm):
    # what random erasing leaves behind
    x = torch.full((1, 3, 2, 2), 4., dtype=torch.float64)
    x[0, 0] = -4.
    ball = Ball(x, make_threat(norm, 0.05), SPACE)
    assert torch.equal(ball.project(x), x)
    moved = SPACE.to_pixels(ball.project(x + 100)) - SPACE.to_pixels(x)
    assert moved.abs().max() <= 0.05 + 1e-12
    assert (SPACE.to_pixels(ball.project(x + 100)) <= SPACE.to_pixels(x).clamp_min(1) + 1e-12).all()


@pytest.mark.parametrize('norm,eps', [('Linf', 0.1), ('L2', 0.7)])
def test_random_start(norm, eps):
    x = torch.full((64, 3, 8, 8), 0.5, dtype=torch.float64)
    ball = Ball(x, make_threat(norm, eps), InputSpace())
    delta = (ball.random(seed=3) - x).flatten(1)
    if norm == 'Linf':
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
    for norm in NORMS:
        threat = make_threat(norm, 0.1)
        together = Ball(x, threat, InputSpace()).random(seed=[10, 11, 12, 13])
        apart = Ball(x[2:], threat, InputSpace()).random(seed=[12, 13])
        assert torch.equal(together[2:], apart)


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    Ball(torch.rand(2, 3, 4, 4), Linf(0.1), InputSpace()).random(seed=0)
    assert not torch.equal(state, torch.get_rng_state())  # torch.rand above
    state = torch.get_rng_state()
    Ball(torch.zeros(2, 3, 4, 4), Linf(0.1), InputSpace()).random(seed=0)
    assert torch.equal(state, torch.get_rng_state())
