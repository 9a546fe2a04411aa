"""The loop all attacks of an evaluation share: pooling, queries, noise, a faster network to search with."""
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn
from helpers import TinyNet, run_distributed

from timm_robust.attacks import (
    APGD,
    APGDT,
    CWL2,
    FABT,
    FGSM,
    L1,
    L2,
    PGD,
    Attack,
    AttackResult,
    AutoAttack,
    InputSpace,
    Linf,
    RayS,
    Square,
    keep_best,
    loop,
    make_fast_model,
    make_threat,
    noise,
    wrong_classes,
)
from timm_robust.attacks.checks import as_logits
from timm_robust.attacks.state import Batch
from timm_robust.errors import InputError
from timm_robust.layers import fold_for_inference, set_bn_mode

LINF = Linf(0.02)
PIXELS = InputSpace()


class Counting(nn.Module):
    """Counts how often each image of a batch, told apart by its first pixel, is shown."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.model(x)


@pytest.fixture
def problem():
    torch.manual_seed(3)
    model = TinyNet().eval()
    x = torch.rand(40, 3, 8, 8)
    with torch.no_grad():
        model.fc.weight *= 20
        model.fc.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    return model, x, y


def accuracy(model, adv, y):
    with torch.no_grad():
        return (model(adv).argmax(1) == y).float().mean().item()


def test_noise_is_uniform_and_depends_on_seed_stream_and_place_alone():
    seeds = torch.arange(50)
    u = noise.uniform(seeds, 3, 4000)
    assert 0 <= u.min() and u.max() < 1
    # five standard errors of mean, variance and correlation of 200,000 numbers
    assert abs(u.mean() - .5) < 5 * (1 / 12) ** .5 / u.numel() ** .5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180) ** .5 / u.numel() ** .5
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u, noise.uniform(seeds, 4, 4000))):
        assert abs(((a - .5) * (b - .5)).mean() * 12) < 5 / a.numel() ** .5
    assert torch.equal(u[7:9], noise.uniform(seeds[7:9], 3, 4000))
    assert torch.equal(u[:, :10], noise.uniform(seeds, torch.full((50,), 3), 10))
    n = noise.normal(seeds, 0, 4000)
    assert abs(n.mean()) < 5 / n.numel() ** .5 and abs(n.var() - 1) < 5 * (2 / n.numel()) ** .5
    assert set(noise.signs(seeds, 0, 9).unique().tolist()) == {-1., 1.}


@pytest.mark.parametrize('attack', [
    PGD(steps=5, restarts=3), APGD(steps=20, restarts=2), APGDT(steps=10), FABT(steps=10), Square(query_limit=60),
    RayS(query_limit=150)], ids=str)
def test_the_batch_an_image_is_in_changes_nothing(problem, attack):
    model, x, y = problem
    whole = attack(model, x, y, LINF, seed=list(range(40)))
    assert .02 < accuracy(model, whole, y) < .98, 'the comparison says nothing'
    pooled = attack(model, x, y, LINF, seed=list(range(40)), batch_size=7)
    part = attack(model, x[20:], y[20:], LINF, seed=list(range(20, 40)), batch_size=3)
    fooled = [model(adv).argmax(1) != y for adv in (whole, pooled)] + [model(part).argmax(1) != y[20:]]
    assert torch.equal(fooled[0], fooled[1]) and torch.equal(fooled[0][20:], fooled[2])
    torch.testing.assert_close(pooled[fooled[0]], whole[fooled[0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize('attack', [
    PGD(steps=20, step_size=.002), APGD(steps=20), FABT(steps=12, num_targets=2), Square(query_limit=30),
    CWL2(steps=20, binary_search_steps=2, initial_const=1.),
], ids=str)
def test_looking_seldom_changes_nothing(problem, attack, monkeypatch):
    """As on a GPU, where to ask which images are done makes the host wait."""
    model, x, y = problem
    threat = L2(.15) if attack.norms == ('L2',) else LINF
    prompt = attack.run(model, x, y, threat, batch_size=7)
    asked = []
    monkeypatch.setattr(loop, 'longest_gap', lambda device: asked.append(device) or 8)
    late = attack.run(model, x, y, threat, batch_size=7)
    assert asked and 0 < prompt.fooled.sum() < 40
    assert torch.equal(prompt.fooled, late.fooled)
    torch.testing.assert_close(prompt.adversarial, late.adversarial, rtol=0, atol=1e-6)
    runs = getattr(attack, 'num_targets', None) or 1
    assert late.queries.max() <= runs * attack.run_length, 'went beyond the number of steps'
    assert (late.queries >= prompt.queries).all()


def test_steps_after_an_image_is_done_are_ignored(problem):
    _, x, y = problem
    zero = torch.zeros(3, dtype=torch.int64)
    state = Batch(x[:3], y[:3], zero, zero).state()
    state['done'] = torch.tensor([True, False, False])
    better = keep_best(state, 1 - x[:3], torch.tensor([True, True, False]), torch.ones(3))
    assert better.tolist() == [False, True, True]
    assert torch.equal(state['best'][0], x[0]) and torch.equal(state['best'][1:], 1 - x[1:3])
    assert state['score'].tolist() == [float('-inf'), float('inf'), 1.]


@pytest.mark.parametrize('seed', [
    [.5] * 40, torch.rand(40), torch.arange(40)[:, None], [1, 2], '7', 2 ** 80, [2 ** 70] * 40, 1.5, True])
def test_seeds_that_are_none(problem, seed):
    with pytest.raises(InputError, match='seed: '):
        PGD(steps=1)(*problem, LINF, seed=seed)


def test_a_copy_of_other_classes_is_refused(problem):
    with pytest.raises(InputError, match='fast_model: has 7 classes, but the model has 4'):
        PGD(steps=1)(*problem, Linf(0.), fast_model=TinyNet(num_classes=7).eval())


def test_a_gpu_is_asked_after_1_2_4_and_8_steps_and_then_every_8(problem, monkeypatch):
    model, x, y = problem
    monkeypatch.setattr(loop, 'longest_gap', lambda device: 8)
    looks = []
    original = loop._Pool._advance

    def advance(self, model, state, steps):
        looks.append(steps)
        return original(self, model, state, steps)

    monkeypatch.setattr(loop._Pool, '_advance', advance)
    PGD(steps=28)(model, x, y, Linf(0.))  # which nothing is fooled by
    assert looks == [1, 2, 4, 8, 8, 6] and sum(looks) == 29
    looks.clear()
    FGSM()(model, x, y, Linf(0.))
    assert looks == [1, 1]


def test_the_batch_stays_full_until_the_queue_is_empty(problem):
    model, x, y = problem
    counting = Counting(model)
    found = APGD(steps=20, restarts=2).run(counting, x, y, LINF, batch_size=8, all_correct=True)
    assert 0 < found.fooled.sum() < 40
    shrinking = next(i for i, n in enumerate(counting.sizes) if n < 8)
    assert all(n == 8 for n in counting.sizes[:shrinking]) and sum(counting.sizes[:shrinking]) > 40 * 8
    assert counting.sizes[shrinking:] == sorted(counting.sizes[shrinking:], reverse=True)
    assert found.queries.sum() == sum(counting.sizes)
    # a fooled image costs no more; one that resists costs both runs: 20 steps and the start, twice
    assert (found.queries[~found.fooled] == 42).all() and (found.queries[found.fooled] < 42).any()


@pytest.mark.parametrize('cls', [Square, RayS])
def test_queries_are_counted_truly_and_limited(problem, cls):
    model, x, y = problem
    counting = Counting(model)
    found = cls(query_limit=37).run(counting, x, y, LINF, batch_size=16, all_correct=True)
    assert found.queries.sum() == sum(counting.sizes) and found.queries.max() == 37
    assert (found.queries[~found.fooled] == 37).all() and found.fooled.any()
    more = cls(query_limit=400).run(model, x, y, LINF)
    assert more.fooled.sum() > found.fooled.sum() and (more.fooled | ~found.fooled).all()


def never_fooled():
    """A network that answers class 0 for every image."""
    robust = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()
    nn.init.zeros_(robust[1].weight)
    with torch.no_grad():
        robust[1].bias[:] = torch.arange(10., 0, -1)
    return robust


def test_apgd_costs_one_evaluation_a_step_and_fab_one_an_iteration(problem):
    _, x, y = problem
    robust = never_fooled()
    y = torch.zeros(40, dtype=torch.int64)
    for attack, most in ((APGD(), 101), (FABT(), 9 * 101 + 1)):
        counting = Counting(robust)
        attack(counting, x, y, LINF, all_correct=True)
        assert sum(counting.sizes) / 40 == most, 'nothing can be fooled here, so every evaluation is made'


def test_under_l1_runs_in_parallel_grow_and_parts_end_without_gradients(problem):
    _, x, _ = problem
    robust, sizes, gradients = never_fooled(), [], []

    def counting(images):
        sizes.append(len(images))
        gradients.append(images.requires_grad)
        return robust(images)

    y, attack = torch.zeros(10, dtype=torch.int64), APGDT(steps=10)
    found = attack.run(counting, x[:10], y, L1(1), batch_size=40, all_correct=True)
    assert sizes[1:] == [width for width in (10, 10, 20, 40, 10) for _ in range(11)], 'the first call chooses targets'
    assert gradients[1:] == [k not in (2, 5, 10) for _ in range(5) for k in range(11)]
    assert (found.queries == 9 * 11).all()
    sizes.clear()
    found = attack.run(counting, x[:10], y, L1(1), batch_size=12, all_correct=True)
    assert max(sizes) == 12 and (found.queries == 9 * 11).all()


def test_progress_tells_every_image_once(problem):
    model, x, y = problem
    for attack in (APGDT(steps=5), PGD(steps=5), AutoAttack(version='rand')):
        told = []
        attack(model, x, y, LINF, batch_size=7, progress=told.append)
        assert sum(told) == 40 and len(told) > 2


class Liar(nn.Module):
    """A search network that, after so many calls, calls everything fooled."""

    def __init__(self, model, after=0):
        super().__init__()
        self.model, self.honest = model, after

    def forward(self, x):
        self.honest -= 1
        return self.model(x) if self.honest >= 0 else -self.model(x)


def test_what_fools_only_the_copy_does_not_count(problem):
    model, x, y = problem
    for attack in (PGD(steps=10), APGD(steps=10)):
        expected = accuracy(model, attack(model, x, y, LINF), y)
        assert 0 < expected < 1
        assert accuracy(model, attack(model, x, y, LINF, fast_model=Liar(model)), y) == expected


class Blind(nn.Module):
    """The network, but on bright images, on which it sees nothing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        bright = x.mean((1, 2, 3), keepdim=True) > .5
        return self.model(torch.where(bright, x.detach() * 0 + .5, x))


@pytest.mark.parametrize('attack', [PGD(steps=10), APGD(steps=10), Square(query_limit=60)], ids=str)
def test_what_a_copy_cannot_fool_is_looked_at_too(problem, attack):
    """A copy that is wrong on some images, as of a network that decides by the image what it does, hides nothing."""
    model, x, y = problem
    expected = attack.run(model, x, y, LINF, seed=list(range(40)))
    found = attack.run(model, x, y, LINF, seed=list(range(40)), fast_model=Blind(model))
    bright = x.mean((1, 2, 3)) > .5
    assert 5 < bright.sum() < 35 and 3 < expected.fooled[bright].sum()
    assert torch.equal(found.fooled, expected.fooled)
    assert not attack.counts_queries or found.queries.max() <= 60


@pytest.mark.parametrize('name', ['resnet18', 'robustnorm_resnet20_cifar', 'robustnorm_vgg11_cifar', 'nofrost_resnet26',
                                  'nf_resnet26', 'resnetv2_50', 'vgg11_bn', 'vit_tiny_patch16_224'])
def test_folded_copies_compute_the_same(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **({'img_size': 32} if 'vit' in name else {}))
    size = 64 if name == 'vgg11_bn' else 32
    x = torch.rand(4, 3, size, size)
    for module in model.modules():
        if getattr(module, 'running_mean', None) is not None:
            nn.init.normal_(module.running_mean, std=.1)
            nn.init.uniform_(module.running_var, .5, 2)
            nn.init.uniform_(module.weight, .5, 1.5)
            nn.init.normal_(module.bias)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold_for_inference(model, x)
    with torch.no_grad():
        wanted, got = model(x), make_fast_model(model, x)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if 'vit' in name:
        assert folded is None
        return
    left = sum(isinstance(m, nn.BatchNorm2d) or type(m).__name__ in ('RobustNorm2d', 'ScaledStdConv2d')
               for m in folded.modules())
    before = sum(isinstance(m, nn.BatchNorm2d) or type(m).__name__ in ('RobustNorm2d', 'ScaledStdConv2d')
                 for m in model.modules())
    # pre-activation networks normalize what no convolution made
    assert left < before and (left == 0 or name == 'resnetv2_50')


def test_no_copy_of_a_network_that_normalizes_by_the_batch():
    model = set_bn_mode(timm.create_model('robustnorm_resnet20_cifar').eval(), 'batch')
    assert make_fast_model(model, torch.rand(2, 3, 32, 32)) is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_searching_on_a_copy_leaves_the_answer(dtype):
    """--exact against a folded copy: verdicts are those of the network either way, and as many are fooled."""
    torch.manual_seed(0)
    model = timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d', num_classes=10).eval()
    x = torch.rand(24, 3, 32, 32)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    threat = Linf(0.002)
    faster = make_fast_model(model, x[:4], dtype)
    left = [accuracy(model, PGD(steps=10)(model, x, y, threat, space=PIXELS, fast_model=m), y) for m in (None, faster)]
    assert 0 < left[0] < 1 and abs(left[0] - left[1]) <= 1 / 24


def test_the_copy_is_what_is_searched(problem):
    model, x, y = problem
    own, faster = Counting(model), Counting(model)
    found = APGD(steps=5).run(own, x, y, LINF, fast_model=faster, all_correct=True)
    resists = (~found.fooled).sum()
    assert sum(own.sizes) == 40, 'a last look at each image'
    assert sum(faster.sizes) == found.queries.sum() + resists, 'and at those it could not fool'


@pytest.mark.parametrize('cls', [Square, RayS])
def test_a_copy_that_lies_costs_no_more_queries_than_allowed(problem, cls):
    model, x, y = problem
    liar = Counting(Liar(model, after=25))
    found = cls(query_limit=40).run(model, x, y, LINF, fast_model=liar)
    assert found.queries.max() == 40 and sum(liar.sizes) < 40 * 40
    with torch.no_grad():
        assert torch.equal(found.fooled, model(found.adversarial).argmax(1) != y) and not found.fooled.all()
    if cls is RayS:
        return  # draws nothing, so it is not run twice
    twice = Square(query_limit=40, restarts=2).run(model, x, y, LINF, fast_model=Liar(model, after=25))
    spent = twice.queries[~twice.fooled]
    assert 80 <= spent.min() and spent.max() <= 81, 'both runs may stand in one batch, and end with it'
    assert (twice.fooled | ~found.fooled).all()


def test_target_classes_go_by_descending_logit():
    logits = torch.tensor([[4., 1., 3., 2.], [0., 5., 1., 9.]])
    assert wrong_classes(logits, torch.tensor([0, 1]), None).tolist() == [[2, 3, 1], [3, 2, 0]]
    assert wrong_classes(logits, torch.tensor([2, 3]), 2).tolist() == [[0, 3], [1, 2]]


PARTS = {  # attacks, restarts and passes a gradient, as the authors publish them
    'standard': [('apgd-ce', 1, 1), ('apgd-t', 1, 1), ('fab-t', 1, 1), ('square', 1, 1)],
    'plus': [('apgd-ce', 5, 1), ('apgd-dlr', 5, 1), ('fab', 5, 1), ('square', 1, 1), ('apgd-t', 1, 1),
             ('fab-t', 1, 1)],
    'rand': [('apgd-ce', 1, 20), ('apgd-dlr', 1, 20)],
}


@pytest.mark.parametrize('version, num_classes, names', [
    ('standard', 2, 'apgd-ce,apgd-t-gap,fab-t,square'), ('standard', 3, 'apgd-ce,apgd-t-gap,fab-t,square'),
    ('standard', 4, 'apgd-ce,apgd-t,fab-t,square'), ('plus', 2, 'apgd-ce,apgd-gap,fab,square,apgd-t-gap,fab-t'),
    ('plus', 3, 'apgd-ce,apgd-dlr,fab,square,apgd-t-gap,fab-t'), ('rand', 2, 'apgd-ce,apgd-gap'),
    ('rand', 3, 'apgd-ce,apgd-dlr')])
def test_autoattack_for_few_classes(version, num_classes, names):
    assert ','.join(map(str, AutoAttack(version=version).members(num_classes))) == names


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('num_classes', [1, 2, 3])
def test_autoattack_of_a_linear_network_of_few_classes_is_exact(num_classes, norm):
    """Whose robust images are known; so large are its logits that the cross-entropy has no gradient."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes)).double()
    x = torch.rand(60, 3, 4, 4, dtype=torch.float64) * .4 + .3
    with torch.no_grad():
        linear[1].bias -= linear(x).mean(0)
        for parameter in linear.parameters():
            parameter *= 1e4
        z, w = as_logits(linear(x), 60), linear[1].weight
        w = w if num_classes > 1 else torch.cat([0 * w, w])
        y = z.argmax(1)
        gap = z.gather(1, y[:, None]) - z
        slope = (w[None] - w[y][:, None]).abs().sum(2) if norm == 'Linf' else (w[None] - w[y][:, None]).norm(dim=2)
        distance = (gap / slope.clamp_min(1e-9)).scatter(1, y[:, None], math.inf).amin(1)
    eps = distance.median().item()
    without_square = type('Part', (AutoAttack,), {
        'members': lambda self, count=None, threat=None: AutoAttack().members(count)[:3]})
    found = without_square()(linear, x, y, make_threat(norm, eps))
    fooled = as_logits(linear(found), 60).argmax(1) != y
    clear = (distance / eps - 1).abs() > .02
    assert torch.equal(fooled[clear], distance[clear] < eps) and 20 < fooled.sum() < 40
    plain = APGD()(linear, x, y, make_threat(norm, eps))
    assert (as_logits(linear(plain), 60).argmax(1) != y).sum() < fooled.sum(), 'the logit gap is not needed'


class Brightness(nn.Module):
    """Bright images are of class 0."""

    def forward(self, x):
        bright = x.mean((1, 2, 3)) - .5
        return torch.stack([bright, -bright, bright - 1, bright - 2], 1)


@pytest.mark.parametrize('version', PARTS)
def test_versions_of_autoattack(version, monkeypatch):
    """Each part gets what those before it left, with the published settings."""
    x = torch.ones(20, 1, 2, 2)
    made, sizes = [], []

    def darken_three(self, model, x, y, threat, call):
        made.append((str(self), getattr(self, 'restarts', 1), self.queries))
        sizes.append(len(x))
        adv = torch.cat([torch.zeros_like(x[:3]), x[3:]])
        return AttackResult(adv, adv.amax((1, 2, 3)) == 0, torch.ones(len(x), dtype=torch.int64))

    monkeypatch.setattr(Attack, 'attack_images', darken_three)
    attack = AutoAttack(version=version)
    adv = attack(Brightness().eval(), x, torch.zeros(20, dtype=torch.int64), LINF)
    assert made == PARTS[version] and sizes == [20 - 3 * k for k in range(len(made))]
    assert [str(member) for member in attack.members(10)] == [name for name, _, _ in made]
    assert (adv == 0).all((1, 2, 3)).sum() == 3 * len(made)


def test_standard_autoattack_under_l1_has_settings_of_its_own():
    standard = AutoAttack().members(10, L1(12))
    assert standard == (APGD(restarts=5), APGDT(num_targets=5), FABT(), Square())
    assert AutoAttack().members(4, L1(12))[1] == APGDT(num_targets=3)
    assert AutoAttack(num_targets=2).members(10, L1(12))[1:3] == (APGDT(num_targets=2), FABT(num_targets=2))
    for attack, threat in ((AutoAttack(), LINF), (AutoAttack(version='plus'), L1(12)), (AutoAttack(), L2(1))):
        assert attack.members(10, threat) == attack.members(10)


@pytest.mark.parametrize('attack', [
    FABT(steps=5, num_targets=2), Square(query_limit=40), RayS(query_limit=60)], ids=str)
def test_what_takes_more_digits_is_not_searched_in_bfloat16(attack):
    torch.manual_seed(0)
    model = timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d', num_classes=10).eval()
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    faster = make_fast_model(model, x, torch.bfloat16)
    threat = Linf(0.02)
    low, full = (attack(model, x, y, threat, space=PIXELS, fast_model=m) for m in (faster, faster.float32()))
    assert torch.equal(low, full) and not torch.equal(low, x)


def test_autoattack_on_a_network_left_in_train_mode():
    torch.manual_seed(0)
    model = TinyNet(norm=True, drop=.5).eval()
    x = torch.rand(20, 3, 8, 8)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    before = copy.deepcopy(model).state_dict()
    attack = AutoAttack(version='rand')
    expected = attack(model, x, y, LINF)
    assert 0 < accuracy(model, expected, y) < 1
    assert torch.equal(attack(model.train(), x, y, LINF), expected) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_autoattack_is_at_least_as_strong_as_each_part(problem):
    model, x, y = problem
    alone = [accuracy(model, attack(model, x, y, LINF), y) for attack in (APGD(), APGDT(), FABT())]
    assert accuracy(model, AutoAttack()(model, x, y, LINF), y) <= min(alone) < 1


def test_a_network_that_cannot_be_copied_is_declined():
    class Handle(nn.Module):
        def __deepcopy__(self, memo):
            raise TypeError('cannot pickle a handle')

        def forward(self, x):
            return x.flatten(1)[:, :4]

    assert make_fast_model(Handle().eval(), torch.rand(2, 3, 4, 4)) is None


def test_processes_attack_their_own_images_without_waiting_for_each_other(tmp_path):
    """DistributedDataParallel exchanges buffers in each pass, of which the processes make different numbers here."""
    script = """
import torch, timm_robust, torch.distributed as dist
from helpers import TinyNet
from timm_robust.attacks import APGD
from timm_robust.compat import AutoAttack
dist.init_process_group('gloo')
torch.manual_seed(0)
rank, model = dist.get_rank(), TinyNet(norm=True).eval()
x, y = torch.rand(4, 3, 8, 8), torch.arange(4) % 4
wrapped = torch.nn.parallel.DistributedDataParallel(model)
apgd = APGD(steps=5 + 10 * rank)
assert torch.equal(apgd(wrapped, x, y, 'Linf 0.01'), apgd(model, x, y, 'Linf 0.01'))
other = AutoAttack(wrapped, eps=.01, seed=0, verbose=False, device='cpu', version='custom', attacks_to_run=['square'])
other.square.n_queries = 5 + 10 * rank
other.run_standard_evaluation(x, model(x).argmax(1))
print('fine')
"""
    assert run_distributed(script, tmp_path).count('fine') == 2
