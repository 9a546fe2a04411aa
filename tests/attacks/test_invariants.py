"""What holds for every attack on any images: drawn shapes, classes, precisions, layouts and eps."""
import copy

import pytest
import torch
from helpers import EPS, TinyNet, defined_attacks, short_attack, state_equal
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from timm_robust.attacks import ATTACKS, NFGSM, Adaptive, make_threat
from timm_robust.errors import InputError

LOW = (torch.float16, torch.bfloat16)
drawn = settings(
    derandomize=True, database=None, deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw):
    """A network in some mode, images in some layout, labels of which some are not what the network says."""
    channels, classes, count = (draw(st.sampled_from(v)) for v in ((1, 3, 4), (2, 3, 10), (0, 1, 2, 5)))
    height, width = draw(st.sampled_from((1, 2, 3, 8))), draw(st.sampled_from((1, 3, 5, 8)))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, *LOW)))
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    model = TinyNet(norm=draw(st.booleans()), drop=.5, in_chans=channels, num_classes=classes)
    with torch.no_grad():
        model.fc.weight *= 20
    model.to(dtype).train(draw(st.booleans()))
    x = torch.rand(count, channels, height, width)
    if draw(st.booleans()):
        x = x.round()  # pixels at both ends of the range
    x = x.to(dtype).contiguous(memory_format=draw(st.sampled_from((torch.contiguous_format, torch.channels_last))))
    y = torch.where(torch.rand(count) < .3, torch.randint(0, classes, (count,)), predicted(model, x))
    return model, x, y


def predicted(model, x):
    if not len(x):
        return torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x.to(model.fc.weight.dtype)).argmax(1)


def rounding(threat, x):
    """How far float arithmetic on pixels may be off: half an ulp below 1 for each, and as many of eps as it has steps.

    Half precision is no more off, since images are attacked in float32."""
    unit = 2. ** (-53 if x.dtype == torch.float64 else -24)
    return unit * (threat.unbounded(x.shape[1:]).eps + 4 * threat.eps)


@pytest.mark.parametrize('cls, threat', list(defined_attacks()))
@drawn
@given(problem=problems(), eps=st.sampled_from((0., 1e-9, 1e-4, 8 / 255, .3, 1., 5.)))
def test_single_images(cls, threat, problem, eps):
    model, x, y = problem
    threat, attack, seeds = type(threat)(min(eps, threat.largest)), short_attack(cls), list(range(len(x)))
    before, clean, state, layout = copy.deepcopy(model), x.clone(), torch.get_rng_state(), x.stride()
    try:
        found = attack.run(model, x, y, threat, seed=seeds)
    except InputError as error:
        assert 'classes' in str(error) and model.num_classes < 4
        return
    adv = found.adversarial
    assert adv.shape == x.shape and adv.dtype == (torch.float32 if x.dtype in LOW else x.dtype)
    assert not adv.requires_grad
    assert torch.equal(x, clean) and x.stride() == layout and torch.equal(torch.get_rng_state(), state)
    assert state_equal(model, before) and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert torch.equal(predicted(model, adv) != y, found.fooled)
    if not len(x):
        return
    assert torch.isfinite(adv).all() and adv.min() >= 0 and adv.max() <= 1
    assert threat.size(adv.double() - x.double()).max() <= threat.eps + rounding(threat, x)
    if not threat.eps:
        assert torch.equal(adv, x.to(adv.dtype))
    if cls is not Adaptive:  # which moves the batch as one
        wrong = predicted(model, x) != y
        assert found.fooled[wrong].all() and torch.equal(adv[wrong], x[wrong].to(adv.dtype))
    if cls.image_by_image and x.dtype == torch.float64:
        for part, size in ((slice(None), 1), (slice(None), 3), (slice(-1, None), None)):
            cut = attack.run(model, x[part], y[part], threat, seed=seeds[part], batch_size=size)
            assert torch.equal(cut.fooled, found.fooled[part])
            # of several runs in one batch the one that fools first gives the image
            if not any(m.targeted for m in attack.members(10)):
                torch.testing.assert_close(cut.adversarial, adv[part], rtol=0, atol=1e-9)


def crafting():
    """Attacks that move a batch as one, N-FGSM too."""
    for cls in ATTACKS.values():
        if cls.whole_batch:
            for norm in EPS if cls.norms is None else cls.norms:
                yield pytest.param(cls, norm, id=f'{cls.name}-{norm}')


@pytest.mark.parametrize('cls, norm', list(crafting()))
@drawn
@given(problem=problems(), eps=st.sampled_from((0., 1e-9, 8 / 255, 1.)), bn_mode=st.sampled_from(('eval', 'train')))
def test_whole_batches(cls, norm, problem, eps, bn_mode):
    model, x, y = problem
    assume(bn_mode == 'eval' or x.numel() > x.shape[1])  # BatchNorm takes no single value
    attack, threat = short_attack(cls), make_threat(norm, eps)
    reach = threat.scaled(attack.noise + 1) if cls is NFGSM else threat
    before, clean, state = copy.deepcopy(model), x.clone(), torch.get_rng_state()
    adv = attack.craft(model, x, y, threat, seed=3, bn_mode=bn_mode)
    assert adv.shape == x.shape and torch.equal(x, clean) and torch.equal(torch.get_rng_state(), state)
    assert state_equal(model, before) and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    if len(x):
        assert torch.isfinite(adv).all() and adv.min() >= 0 and adv.max() <= 1
        assert threat.size(adv.double() - x.double()).max() <= reach.eps + rounding(reach, x)
    if not eps:
        assert torch.equal(adv, x.to(adv.dtype))
