"""The rules every attack keeps, for all that are registered: a new one is tested by being there."""
import copy
import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from helpers import EPS, TinyNet, defined_attacks, documented_attack, short_attack, state_equal

from timm_robust.attacks import (
    APGD,
    APGDT,
    ATTACKS,
    CWL2,
    FAB,
    FGSM,
    L2,
    MIM,
    NFGSM,
    NORMS,
    PGD,
    Adaptive,
    AutoAttack,
    Clean,
    CWLinf,
    Ensemble,
    InputSpace,
    Linf,
    RayS,
    Square,
    attack_from_dict,
    make_threat,
    parse_attack,
    parse_attacks,
    registry,
)
from timm_robust.errors import InputError
from timm_robust.models import NormalizedModel


def has(cls, field):
    return field in {f.name for f in dataclasses.fields(cls)}


every_attack = pytest.mark.parametrize('cls, threat', list(defined_attacks()))
each_class = pytest.mark.parametrize('cls', [c for c in ATTACKS.values() if c is not NFGSM], ids=lambda c: c.name)


def its_threat(cls):
    norm = 'Linf' if cls.norms is None else cls.norms[0]
    return make_threat(norm, EPS[norm])


@pytest.fixture
def problem():
    """A network that classifies all images correctly, some of them by little."""
    torch.manual_seed(3)
    model, x = TinyNet().eval(), torch.rand(20, 3, 8, 8)
    with torch.no_grad():
        model.fc.weight *= 20
        model.fc.bias -= model(x).mean(0)
        return model, x, model(x).argmax(1)


@every_attack
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_images_are_allowed_and_nothing_else_changes(cls, threat, dtype):
    torch.manual_seed(1)
    model = TinyNet(norm=True, drop=0.5).to(dtype).train()
    model.conv.weight.requires_grad_(False)
    model.norm.eval()
    before, flags = copy.deepcopy(model), [m.training for m in model.modules()]
    x = torch.rand(8, 3, 8, 8, dtype=dtype)
    x[0], x[1] = 0., 1.
    y = torch.randint(0, 4, (8,))
    clean, state, attack = x.clone(), torch.get_rng_state(), short_attack(cls)
    adv = attack(model, x, y, threat, seed=0)
    assert torch.equal(x, clean), 'the clean images were written to'
    assert torch.equal(state, torch.get_rng_state()), 'the global generator moved'
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert state_equal(model, before), 'weights or running statistics moved'
    assert not adv.requires_grad and adv.dtype == dtype and adv.shape == x.shape
    assert adv.min() >= 0 and adv.max() <= 1
    size = threat.size(adv.double() - x.double())
    assert size.max() <= threat.eps * (1 + 3e-6 if dtype == torch.float32 else 1 + 1e-12)
    assert torch.equal(adv, attack(model, x, y, threat, seed=0)), 'the same seed gave another image'
    with torch.no_grad():
        fooled = copy.deepcopy(model).eval()(adv).argmax(1) != y
    assert torch.equal(attack.run(model, x, y, threat).fooled, fooled)


@every_attack
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(cls, threat, dtype, problem):
    """With refilled batches, restarts and targets; as many are fooled as in float32, but for those in doubt."""
    model, x, y = problem
    low, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    with torch.no_grad():
        y = low(x).argmax(1)
    settings = {k: v for k, v in dict(restarts=2, num_targets=2).items() if has(cls, k) and not issubclass(
        cls, Ensemble)}
    attack, size = short_attack(cls, **settings), {} if cls is Adaptive else dict(batch_size=3)
    found = attack.run(low, x, y, threat, **size)
    adv = found.adversarial
    assert adv.dtype == torch.float32 and torch.isfinite(adv).all() and 0 <= adv.min() and adv.max() <= 1
    with torch.no_grad():
        assert torch.equal(low(adv.to(dtype)).argmax(1) != y, found.fooled)
    full = attack.run(model, x.float(), y, threat, **size).fooled
    assert cls is Clean or full.sum() > 0, 'the comparison says nothing'
    assert (found.fooled != full).sum() <= 5
    assert threat.size(adv.double() - x.double()).max() <= threat.eps * (1 + 3e-6)


@every_attack
def test_gradients_are_taken_whatever_is_switched_off_around(cls, threat, problem):
    model, x, y = problem
    attack = short_attack(cls)
    expected = attack(model, x, y, threat)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, threat), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        within = attack(model, x.clone(), y.clone(), threat)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(within, expected)
    with torch.autocast('cpu', torch.bfloat16):
        low = attack.run(model, x, y, threat)
    with torch.no_grad():
        fooled = model(expected).argmax(1) != y
    assert cls is Clean or fooled.any()
    assert low.adversarial.dtype == x.dtype and (low.fooled != fooled).sum() <= 5


@each_class
def test_a_network_that_cuts_the_graph_has_gradient_zero(cls, problem):
    model, x, y = problem
    found = short_attack(cls).run(lambda z: model(z.detach()), x, y, its_threat(cls))
    assert torch.isfinite(found.adversarial).all() and found.adversarial.shape == x.shape


@each_class
@pytest.mark.parametrize('kind', ['int32', 'uint8', 'list', 'numpy'])
def test_labels_of_any_integer_type(cls, kind, problem):
    model, x, y = problem
    given = {'int32': y.int(), 'uint8': y.to(torch.uint8), 'list': y.tolist(), 'numpy': y.numpy().astype(np.int16)}
    attack, threat = short_attack(cls), its_threat(cls)
    assert torch.equal(attack(model, x, given[kind], threat), attack(model, x, y, threat))


@each_class
@pytest.mark.parametrize('labels, message', [
    (lambda y: y[:, None], r'labels: have shape \(20, 1\)'), (lambda y: y.float(), 'labels: are torch.float32'),
    (lambda y: y[:7], 'labels: 7 for 20 images'), (lambda y: y + 3, 'contain class [456], but the model has 4 classes'),
    (lambda y: y - 9, 'labels: contain -'), (lambda y: y.bool(), 'labels: are torch.bool'),
    (lambda y: ['a'] * len(y), 'labels: are not class indices'), (lambda y: 3, 'labels: a single number for 20 images'),
    (lambda y: torch.ones(len(y), 3), 'soft targets of 3 classes, but the model has 4'),
    (lambda y: torch.full((len(y), 4), -1.), 'labels: contain negative or'),
    (lambda y: torch.full((len(y), 4), float('nan')), 'labels: contain negative or non-finite values')])
def test_labels_that_fit_nothing_are_refused(cls, labels, message, problem):
    model, x, y = problem
    with pytest.raises(InputError, match=message):
        short_attack(cls)(model, x, labels(y), its_threat(cls))


@each_class
@pytest.mark.parametrize('network, message', [
    (lambda z: (z, z), 'model: returns tuple'), (lambda z: {'logits': z}, 'model: returns dict'),
    (lambda z: z[:, :, None, None], r'model: returns a tensor of shape \(20, 4, 1, 1\)'),
    (lambda z: z[:7], r'model: returns a tensor of shape \(7, 4\)'),
    (lambda z: (1000 * z).long(), 'model: returns a tensor of .*int64'),
    (lambda z: z * float('nan'), 'model: returns logits that are not finite')])
def test_networks_that_return_no_logits_are_refused(cls, network, message, problem):
    model, x, y = problem
    with pytest.raises(InputError, match=message):
        short_attack(cls)(lambda z: network(model(z)), x, y, its_threat(cls))


@each_class
def test_a_network_may_compute_in_another_precision(cls, problem):
    model, x, y = problem
    found = short_attack(cls).run(
        lambda z: model(z).double(), x, y, its_threat(cls), batch_size=7 if cls.image_by_image else None)
    assert found.adversarial.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(found.fooled, model(found.adversarial).argmax(1) != y)


@each_class
def test_one_output_is_two_classes(cls, problem):
    model, x, _ = problem

    def lead(z):
        return model(z)[:, 1:2] - model(z)[:, :1]

    y = (lead(x)[:, 0] > 0).long()
    if cls().classes_needed > 2:
        with pytest.raises(InputError, match='classes'):
            short_attack(cls)(lead, x, y, its_threat(cls))
        return
    found = short_attack(cls).run(lead, x, y, its_threat(cls))
    two = short_attack(cls).run(lambda z: torch.cat([0 * lead(z), lead(z)], 1), x, y, its_threat(cls))
    flat = short_attack(cls).run(lambda z: lead(z)[:, 0], x, y, its_threat(cls))
    assert torch.equal(found.fooled, two.fooled) and torch.equal(found.fooled, flat.fooled)
    assert cls is Clean or found.fooled.any()


@each_class
def test_nothing_to_do(cls, problem):
    model, x, y = problem
    norm = its_threat(cls).norm
    assert torch.equal(short_attack(cls)(model, x, y, make_threat(norm, 0.)), x), 'moved at eps 0'
    empty = short_attack(cls).run(model, x[:0], y[:0], its_threat(cls))
    assert empty.adversarial.shape == (0, 3, 8, 8) and empty.fooled.shape == empty.queries.shape == (0,)
    assert empty.fooled.dtype == torch.bool


@each_class
def test_images_in_the_wrong_space_are_refused(cls, problem):
    model, x, y = problem
    attack, threat = short_attack(cls), its_threat(cls)
    mean, std = (.5, .4, .3), (.2, .25, .5)
    space = InputSpace(mean, std)
    network = timm.create_model('test_resnet', num_classes=4).eval()
    for wrapped in (network, nn.DataParallel(network)):
        with pytest.raises(InputError, match='model: a timm model expects normalized images'):
            attack(wrapped, x, y, threat)
    with pytest.raises(InputError, match='images: span .* but pixels in'):
        attack(model, space.normalize(x), y, threat)
    with pytest.raises(InputError, match='space=.*the network normalizes its input'):
        attack(NormalizedModel(model, mean, std), x, y, threat, space=space)
    with pytest.raises(InputError, match='images: are torch.uint8'):
        attack(model, (x * 255).to(torch.uint8), y, threat)
    with pytest.raises(InputError, match=r'images: have shape \(3, 8, 8\)'):
        attack(model, x[0], y[:1], threat)
    in_pixels = attack.run(NormalizedModel(model, mean, std).eval(), x, y, threat)
    normalized = attack.run(model, space.normalize(x), y, threat, space=space)
    assert (in_pixels.fooled != normalized.fooled).sum() <= 1
    both = in_pixels.fooled & normalized.fooled
    torch.testing.assert_close(
        space.to_pixels(normalized.adversarial)[both], in_pixels.adversarial[both], rtol=0, atol=1e-5)


@each_class
def test_targets_steer_or_are_refused(cls, problem):
    model, x, y = problem
    attack, threat, target = short_attack(cls), its_threat(cls), (y + 1) % 4
    if not cls.steerable:
        if cls is not Clean:
            with pytest.raises(InputError, match='targets: '):
                attack(model, x, y, threat, targets=target)
        return
    wide = make_threat(threat.norm, .2 if threat.norm == 'Linf' else 3.)
    with torch.no_grad():
        away, to = (model(attack(model, x, y, wide, targets=t)).argmax(1) for t in ((y + 2) % 4, target))
    assert (to == target).float().mean() > (away == target).float().mean() + .2, 'the target does not matter'
    with pytest.raises(InputError, match='targets: contain class 4, but the model has 4 classes'):
        attack(model, x, y, threat, targets=torch.full_like(y, 4))
    with pytest.raises(InputError, match='targets: contain the true class'):
        attack(model, x, y, threat, targets=torch.cat([target[:-1], y[-1:]]))
    with pytest.raises(InputError, match='targets: are torch.float32'):
        attack(model, x, y, threat, targets=target.float())


@each_class
def test_what_an_attack_says_of_itself(cls):
    attack = cls()
    assert attack == cls() and hash(attack) == hash(cls()) and eval(repr(attack), {cls.__name__: cls}) == attack
    assert attack_from_dict(json.loads(json.dumps(attack.to_dict()))) == attack
    assert parse_attack(str(attack)) == attack and parse_attack(str(attack).upper().replace('-', '_')) == attack
    assert cls.__doc__ and all(f.metadata.get('help') for f in dataclasses.fields(cls))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.steps = 3
    with pytest.raises(TypeError, match='speed'):
        cls(speed=3)
    if cls.budget is None:
        with pytest.raises(InputError, match='takes no number'):
            parse_attack(f'{cls.name}7')
        return
    seven = parse_attack(f'{cls.name}7')
    assert seven == cls(**{cls.budget: 7}) and str(seven).endswith('7') and parse_attack(str(seven)) == seven
    for bad in (0, -1, 2.5, True, '3', None):
        with pytest.raises(InputError, match=f'{cls.budget}='):
            cls(**{cls.budget: bad})
    with pytest.raises(InputError, match='must be at least 1'):
        parse_attack(f'{cls.name}0')


def test_names_people_write():
    assert [str(a) for a in parse_attacks('clean, FGSM,pgd20,pgd,apgd_ce,apgd-dlr50,square1000,aa,cw,mia5,cw-l2')] == [
        'clean', 'fgsm', 'pgd20', 'pgd20', 'apgd-ce', 'apgd-dlr50', 'square1000', 'autoattack', 'cw-linf20', 'mim5',
        'cw-l2']
    assert parse_attacks('autoattack-plus,autoattack_rand,cw30,apgd') == [
        AutoAttack(version='plus'), AutoAttack(version='rand'), CWLinf(steps=30), APGD()]
    assert parse_attacks([PGD(steps=3), 'apgd-dlr', 'cw-l220']) == [PGD(steps=3), APGD(loss='dlr'), CWL2(steps=20)]
    assert parse_attacks(FGSM()) == [FGSM()]


def test_a_shared_setting_goes_to_all_that_have_it_and_is_missed_by_none():
    shared = parse_attacks('clean,fgsm,pgd5,apgd-ce,autoattack', restarts=3, step_size='2/255', num_targets=2)
    assert shared == [
        Clean(), FGSM(), PGD(steps=5, restarts=3, step_size=2 / 255), APGD(restarts=3), AutoAttack(num_targets=2)]
    assert parse_attacks(['pgd5', PGD(steps=7)], restarts=3) == [PGD(steps=5, restarts=3), PGD(steps=7)]
    assert parse_attacks('pgd5', restarts=None) == [PGD(steps=5)]
    with pytest.raises(InputError, match='num_targets=3: clean, pgd5 have no such setting; .*apgd-t'):
        parse_attacks('clean,pgd5', num_targets=3)
    with pytest.raises(InputError, match='restarts=0'):
        parse_attacks('pgd5', restarts=0)
    assert parse_attacks('pgd5,mim', steps=5) == [PGD(steps=5), MIM(steps=5)]
    with pytest.raises(InputError, match='steps=100: contradicts pgd5; leave it out, or write pgd'):
        parse_attacks('mim,pgd5', steps=100)


@pytest.mark.parametrize('names, message', [
    ('clean,pdg20', "attacks='pdg20': unknown attack; choose from"), ('', 'names no attack'),
    (' , ', 'names no attack'),
    ('fgsm3', 'takes no number; write fgsm'), ('pgd0', 'must be at least 1'), ('pgd-5', 'unknown attack'),
    ('pgd2.5', 'unknown attack'), ('pgd２', 'unknown attack'), (f"pgd{'9' * 400}", r'must be below 2\*\*31'),
    ([3], 'neither a name nor an attack')])
def test_names_that_are_none(names, message):
    with pytest.raises(InputError, match=message):
        parse_attacks(names)


@pytest.mark.parametrize('attack, threat, classes, message', [
    (RayS(), L2(1.), 10, "attack='rays': supports only Linf, not L2"), (CWL2(), Linf(.1), 10, 'supports only L2'),
    (APGD(loss='dlr'), Linf(.1), 2, "attack='apgd-dlr': needs at least 3 classes, but the model has 2"),
    (APGDT(), Linf(.1), 3, "attack='apgd-t': needs at least 4 classes, but the model has 3"),
    (AutoAttack(num_targets=3), Linf(.1), 3, 'num_targets=3: must be between 1 and 2'),
    (parse_attack('apgd-t', num_targets=4), Linf(.1), 4, 'num_targets=4: must be between 1 and 3')])
def test_what_an_attack_is_not_defined_for(attack, threat, classes, message):
    with pytest.raises(InputError, match=message):
        attack.check(threat, classes)
    with pytest.raises(InputError, match=message):
        attack(nn.Sequential(nn.Flatten(), nn.Linear(12, classes)), torch.rand(2, 3, 2, 2), [0, 1], threat)


TOY = '''
from timm_robust.attacks import GradientAttack, ThreatModel, register_norm


@register_norm
class PerChannel(ThreatModel):
    """Each channel changes by at most eps in L2."""
    norm = 'PerChannel'

    def size(self, delta):
        return delta.reshape(len(delta), 3, -1).norm(dim=2).amax(1)

    def steepest(self, gradient):
        return gradient / gradient.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None]


@register_attack
class TwoSteps(GradientAttack):
    """Two steps of eps."""
    name = 'toy-steps'

    @property
    def num_steps(self):
        return 2
'''


@pytest.fixture
def toys(tmp_path):
    """The module, registered for one test."""
    tables = [(table, dict(table)) for table in (ATTACKS, NORMS, registry._NAMES)]
    path = tmp_path / 'toy_plugin.py'
    path.write_text(f"{documented_attack('toy-noise')}\n\n{TOY}")
    spec = importlib.util.spec_from_file_location('toy_plugin', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['toy_plugin'] = module  # where dataclasses look types up
    spec.loader.exec_module(module)
    yield module
    del sys.modules['toy_plugin']
    for table, before in tables:
        table.clear()
        table.update(before)


def test_an_attack_and_a_norm_of_ones_own_are_one_class_each(toys, problem):
    model, x, y = problem
    threat = make_threat('perchannel', '1/2')
    assert str(threat) == 'PerChannel 0.5' and isinstance(threat, toys.PerChannel)
    for name in ('toy-noise40', 'toy-steps', 'pgd5', 'apgd-ce5', 'mim5', 'cw5', 'fgsm-rs'):
        attack = parse_attack(name)
        found = attack.run(model, x, y, 'perchannel 0.5', batch_size=7)
        size = threat.size(found.adversarial - x)
        assert size.max() <= .5 * (1 + 1e-5) and size.max() > .1
        with torch.no_grad():
            assert torch.equal(model(found.adversarial).argmax(1) != y, found.fooled)
        assert found.fooled.any() or name == 'toy-noise40'
        assert attack_from_dict(attack.to_dict()) == attack
    assert toys.Noise(tries=3) == parse_attack('toy_noise3') and str(toys.Noise(tries=3)) == 'toy-noise3'
    assert parse_attacks('pgd5,toy-noise', tries=4)[1] == toys.Noise(tries=4)
    crafted = toys.TwoSteps().craft(model, x, y, threat)
    assert threat.size(crafted - x).max() <= .5 * (1 + 1e-5)
    for attack in (Square(), FAB(), AutoAttack()):
        with pytest.raises(InputError, match='supports only Linf, L2 and L1, not PerChannel'):
            attack(model, x, y, threat)
    with pytest.raises(InputError, match="name='pgd': is taken by timm_robust.attacks.pgd.PGD"):
        registry.register_attack(type('Other', (PGD,), {'name': 'pgd', '__module__': 'elsewhere'}))
    with pytest.raises(InputError, match="name='My Attack': is not a valid attack name"):
        registry.register_attack(type('Other', (PGD,), {'name': 'My Attack'}))
