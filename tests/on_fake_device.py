"""Everything on a second device that refuses to be mixed with the CPU and counts waits; run by test_fake_device.py.

    pytest tests/on_fake_device.py

What runs must give the CPU's outcome for each image. The host may wait where a batch of an attack is looked at, and in
training where a line is logged: a wait in every step would keep a GPU idle.
"""
import copy

import fake_device as backend  # before any backward pass
import pytest
import timm
import torch
import torch.nn as nn
from helpers import TinyNet

from timm_robust import evaluate
from timm_robust.attacks import (
    ATTACKS,
    L2,
    NFGSM,
    NORMS,
    PGD,
    Ensemble,
    InputSpace,
    Linf,
    Square,
    loop,
    make_fast_model,
    make_threat,
    parse_attacks,
)
from timm_robust.errors import TrainingDivergedError
from timm_robust.evaluation import diagnose
from timm_robust.evaluation.norm_statistics import compare_bn_modes
from timm_robust.evaluation.plan import Plan
from timm_robust.evaluation.properties import measure_properties
from timm_robust.layers import RobustNorm2d, cached_weights
from timm_robust.models import NormalizedModel
from timm_robust.tasks import AWP, OBJECTIVES, NoFrostStar, TrainingAttack, create_task
from timm_robust.training.loop import train_one_epoch

EPS = {'Linf': .03, 'L2': .3, 'L1': 2.}
SETTINGS = {
    'cw-l2': dict(steps=10, binary_search_steps=2, initial_const=10.), 'rays': dict(query_limit=40),
    'ddn': dict(first_norm=.2), 'square': dict(query_limit=24),
    'fab': dict(steps=3), 'fab-t': dict(steps=3), 'apgd-t': dict(num_targets=2)}
SPACE = InputSpace((.5, .4, .3), (.2, .25, .5))
# besides those of looks: ranges of images and labels, first logits and what an ensemble does between its members
SETUP = 6
BETWEEN_MEMBERS = 12


@pytest.fixture
def fake():
    with backend.fake_device() as device:
        yield device


@pytest.fixture(params=[True, False], ids=['', 'without_float64'])
def either(request):
    """The device, and one without float64, as Apple's."""
    with backend.fake_device(has_float64=request.param) as device:
        yield device


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def problem(count=12, norm=False):
    """A network that classifies all images correctly, some of them by little."""
    torch.manual_seed(3)
    model, x = TinyNet(norm=norm).eval(), torch.rand(count, 3, 8, 8)
    with torch.no_grad():
        model.fc.weight *= 20
        model.fc.bias -= model(x).mean(0)
        return model, x, model(x).argmax(1)


def short(cls):
    """An attack of the class that does not take long."""
    if issubclass(cls, Ensemble):
        members = tuple(short(type(m)) for m in cls().members())
        return type(cls.__name__, (cls,), {'members': lambda self, num_classes=None, threat=None: members})()
    return cls(**{**({cls.budget: 6} if cls.budget else {}), **SETTINGS.get(cls.name, {})})


def defined():
    for cls in ATTACKS.values():
        attack = short(cls)
        members = attack.members()
        for norm in [n.norm for n in NORMS.values()]:
            if cls is not NFGSM and all(m.norms is None or norm in m.norms for m in members):
                yield pytest.param(attack, make_threat(norm, EPS[norm]), id=f'{cls.name}-{norm}')


@pytest.fixture
def looks(fake, monkeypatch):
    """How often the loop looked, and the waits between looks."""
    seen, advance = [], loop._Pool._advance

    def counted(self, *args):
        before = len(fake.waits)
        advance(self, *args)
        seen.append(fake.waits[before:])

    monkeypatch.setattr(loop._Pool, '_advance', counted)
    return seen


@pytest.mark.parametrize('attack, threat', list(defined()))
def test_attack_finds_the_same_and_waits_for_looks_alone(attack, threat, fake, looks):
    model, x, y = problem()
    size = {'batch_size': 5} if attack.image_by_image and not isinstance(attack, Ensemble) else {}
    on_cpu = attack.run(model, x, y, threat, **size)
    looks.clear()
    model, images, labels = copy.deepcopy(model).to(fake.device), x.to(fake.device), y.to(fake.device)
    fake.waits.clear()
    found = attack.run(model, images, labels, threat, **size)
    waits = fake.count()
    assert found.adversarial.device == found.fooled.device == found.queries.device == fake.device
    assert torch.equal(found.fooled.cpu(), on_cpu.fooled)
    torch.testing.assert_close(found.adversarial.cpu(), on_cpu.adversarial, rtol=0, atol=1e-4)
    members = len(attack.members(4))
    in_steps = [wait.where.partition(':')[0] for look in looks for wait in look]
    # whether the first logits of each member are finite
    assert in_steps == ['attacks/checks.py'] * len(in_steps) and len(in_steps) <= members, f'waits in steps: {waits}'
    others = SETUP + len(in_steps) + BETWEEN_MEMBERS * members * isinstance(attack, Ensemble)
    if attack.name == 'adaptive':
        others += 2 * 3
    assert sum(waits.values()) <= len(looks) + others, waits


@pytest.mark.parametrize('threat', [Linf(.03), L2(.3)], ids=['Linf', 'L2'])
@pytest.mark.parametrize('attack', [PGD(steps=8), Square(query_limit=20)], ids=['pgd', 'square'])
def test_attack_without_float64(attack, threat):
    model, x, y = problem()
    on_cpu = attack.run(model, x, y, threat, batch_size=5)
    with backend.fake_device(has_float64=False) as fake:
        found = attack.run(model.to(fake.device), x.to(fake.device), y.to(fake.device), threat, batch_size=5)
        assert torch.equal(found.fooled.cpu(), on_cpu.fooled)
        with pytest.raises(TypeError, match='float64'):
            x.double().to(fake.device)


@pytest.mark.parametrize('tau', [None, 0, 1])
def test_attack_on_a_whole_batch(tau, fake):
    """With τ the attack asks after 1, 2, 4 and 8 steps who is left."""
    model, x, y = problem()
    attack = PGD(steps=10)
    on_cpu = attack.craft(model, x, y, Linf(.03), tau=tau)
    model, x, y = model.to(fake.device), x.to(fake.device), y.to(fake.device)
    fake.waits.clear()
    adv = attack.craft(model, x, y, Linf(.03), tau=tau)
    assert len(fake.waits) <= 1 + (0 if tau is None else 4), fake.count()
    torch.testing.assert_close(adv.cpu(), on_cpu, rtol=0, atol=1e-5)


@pytest.mark.parametrize('network', ['nofrost_resnet20_cifar', 'robustnorm_resnet20_cifar'])
def test_attack_with_a_faster_copy(network, fake):
    """Folding, cached weights and the second look on the network itself."""
    plain = timm.create_model(network, pretrained=True).eval()
    model = NormalizedModel(plain, plain.pretrained_cfg['mean'], plain.pretrained_cfg['std']).eval()
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = PGD(steps=2)
    on_cpu = attack.run(model, x, y, Linf('2/255'), fast_model=make_fast_model(model, x))
    model, x, y = model.to(fake.device), x.to(fake.device), y.to(fake.device)
    copied = make_fast_model(model, x)
    assert copied is not None and {p.device for p in copied.parameters()} == {fake.device}
    found = attack.run(model, x, y, Linf('2/255'), fast_model=copied)
    assert torch.equal(found.fooled.cpu(), on_cpu.fooled)
    with cached_weights(model), torch.no_grad():
        cached = model(x)
    torch.testing.assert_close(cached.cpu(), model(x).detach().cpu(), rtol=0, atol=1e-5)


def objectives():
    for name, cls in OBJECTIVES.items():
        yield pytest.param(cls(), AWP(), id=name)
        if cls.crafts:
            yield pytest.param(cls(), AWP(gamma=.005), id=f'{name}-awp')
    yield pytest.param(NoFrostStar(noise2net=True, terms=3), AWP(), id='nofrost_star-noise2net')


def trained(objective, awp, device, batches, **kwargs):
    """Weights and averages after an epoch."""
    torch.manual_seed(1)
    model = TinyNet(norm=True)
    model = objective.prepare_model(model).to(device).train()
    task = create_task(
        objective, model, nn.CrossEntropyLoss(), attack=TrainingAttack(steps=3), awp=awp, space=SPACE,
        steps_per_epoch=len(batches), device=device, verbose=False)
    views = getattr(task, 'views', 1)
    loader = [(SPACE.normalize(x).repeat(views, 1, 1, 1).to(device), y.repeat(views).to(device)) for x, y in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    averages = train_one_epoch(task, loader, optimizer, 0, device=torch.device(device), verbose=False, **kwargs)
    return model, averages


def training_batches(count, size=8):
    return [(torch.rand(size, 3, 8, 8), torch.arange(size) % 4) for _ in range(count)]


@pytest.mark.parametrize('objective, awp', list(objectives()))
def test_training_learns_the_same_and_waits_for_log_lines_alone(objective, awp, fake):
    batches = training_batches(5)
    on_cpu, expected = trained(objective, awp, 'cpu', batches)
    fake.waits.clear()
    model, averages = trained(objective, awp, fake.device, batches, log_interval=100)
    waits = [wait for wait in fake.waits if wait.where != 'outside of the package']
    assert averages == pytest.approx(expected, rel=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.cpu(), on_cpu.state_dict()[name], rtol=1e-4, atol=1e-5)
    # the first batch is looked at, and averages are read at the first and the last step
    looks = 4
    if 'fat' in objective.name:
        looks += 5 * 2  # of three steps a friendly attack asks after the first two
    assert len(waits) <= looks, fake.count()


def test_training_in_float16_does_not_ask_for_the_scale(fake):
    """APART takes the scale of the loop's loss, a tensor, off each gradient."""
    model = TinyNet(norm=True).half().to(fake.device).train()
    task = create_task(OBJECTIVES['apart'](), model, nn.CrossEntropyLoss(), device=fake.device, verbose=False)
    x, y = torch.rand(8, 3, 8, 8).half().to(fake.device), (torch.arange(8) % 4).to(fake.device)
    for _ in range(2):
        fake.waits.clear()
        (task(x, y)['loss'] * 64).backward()
    assert not fake.waits and task.loss_scale.device == fake.device, fake.count()


def test_synchronized_statistics_do_not_wait(fake, monkeypatch):
    for name, value in (('get_rank', 0), ('get_world_size', 1), ('all_reduce', None)):
        monkeypatch.setattr(torch.distributed, name, lambda *args, value=value, **kwargs: value)
    alone, shared = RobustNorm2d(3).to(fake.device), RobustNorm2d(3).to(fake.device)
    monkeypatch.setattr(shared, '_is_shared', lambda: True)
    x = torch.rand(4, 3, 5, 5).to(fake.device)
    fake.waits.clear()
    together = shared(x)
    assert not fake.waits, fake.count()
    torch.testing.assert_close(together.cpu(), alone(x).cpu())


def test_training_says_in_which_batch_the_loss_diverged(fake):
    batches = training_batches(6)
    batches[3][0][:] = float('nan')
    with pytest.raises(TrainingDivergedError, match='nan in epoch 0, batch 3'):
        trained(OBJECTIVES['standard'](), AWP(), fake.device, batches, log_interval=100)


@pytest.mark.parametrize('settings', [
    {'attacks': 'clean,fgsm,pgd4', 'eps_sweep': ('2/255',)}, {'attacks': 'pgd4,square20', 'exact': True},
    {'attacks': 'pgd4', 'worst_case': True, 'threat': 'L2 0.3'}, {'attacks': 'pgd4', 'surrogate': True}])
def test_evaluation_gives_the_same_report(settings, either):
    model, x, y = problem(20, norm=True)
    if settings.get('surrogate'):
        settings = {**settings, 'surrogate': TinyNet().eval()}
    on_cpu = evaluate(copy.deepcopy(model), x, y, device='cpu', batch_size=4, **settings)
    report = evaluate(model, x, y, device=str(either.device), batch_size=4, **settings)
    assert report.settings.device.startswith('fake')
    assert [a.correct for a in report.attacks] == [a.correct for a in on_cpu.attacks]
    assert report.eps_sweep == on_cpu.eps_sweep
    assert report.examples and [e.label for e in report.examples] == [e.label for e in on_cpu.examples]


@pytest.mark.parametrize('norm', [False, True], ids=['per_image', 'batch_statistics'])
def test_evaluation_diagnoses_the_same(norm, either):
    model, x, y = problem(norm=norm)
    if norm:
        model.norm.track_running_stats, model.norm.running_mean, model.norm.running_var = False, None, None
    how = dict(batch_size=6, steps=(2, 4, 8), black_box_queries=10)
    on_cpu = diagnose(model, x, y, Linf(.03), **how)
    device = either.device
    found = diagnose(copy.deepcopy(model).to(device), x.to(device), y.to(device), Linf(.03), **how)
    assert [(f.name, f.verdict) for f in found] == [(f.name, f.verdict) for f in on_cpu]


def test_evaluation_measures_the_same_properties(either):
    model, x, y = problem()
    on_cpu = measure_properties(model, x, y, Linf(.03), steps=3, batch_size=6)
    device = either.device
    found = measure_properties(model.to(device), x.to(device), y.to(device), Linf(.03), steps=3, batch_size=6)
    for ours, theirs in zip(found.properties, on_cpu.properties):
        assert ours.values == pytest.approx(theirs.values, rel=1e-3, abs=1e-4)


def test_evaluation_compares_the_same_statistics(either):
    model, x, y = problem(norm=True)
    plan = Plan(tuple(parse_attacks('clean,pgd3')), Linf(.03))
    on_cpu = compare_bn_modes(model, x, y, plan, batch_size=6)
    device = either.device
    found = compare_bn_modes(copy.deepcopy(model).to(device), x.to(device), y.to(device), plan, batch_size=6)
    assert found.accuracy == on_cpu.accuracy


def test_the_device_refuses_and_counts(fake):
    x = torch.rand(3).to(fake.device)
    with pytest.raises(RuntimeError, match='same device'):
        x + torch.rand(3)
    assert torch.equal((x + torch.tensor(1.)).cpu(), x.cpu() + 1)
    for wait in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x[x > .5], lambda: x.tolist(), lambda: bool(x[0] > 0),
                 lambda: torch.tensor([1], device=fake.device), lambda: x.nonzero(), lambda: torch.equal(x, x)):
        fake.waits.clear()
        wait()
        assert fake.waits
    fake.waits.clear()
    torch.rand(3).to(fake.device, non_blocking=True)
    x[torch.zeros(2, dtype=torch.int64).to(fake.device, non_blocking=True)].sum().add_(1)
    assert not fake.waits


def test_the_benchmark_of_a_gpu_runs(fake, monkeypatch, tmp_path):
    from benchmarks import gpu
    monkeypatch.setattr(gpu, '_NETWORKS', ('nofrost_resnet20_cifar',))
    monkeypatch.setattr(gpu, '_LINF', 'pgd-targeted1')
    monkeypatch.setattr(gpu, '_L2', 'fgsm')
    report = gpu.Report(tmp_path / 'gpu.json', {})
    for section in (lambda: gpu.attacks(report, fake.device, torch.rand(4, 3, 32, 32), torch.arange(4)),
                    lambda: gpu.layers(report, fake.device)):
        report.begin(str(section))
        section()
        assert report.found and all(check['ok'] for check in report.found.values())
