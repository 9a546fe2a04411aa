"""auto-attack's interface: the settings it means, one verdict per image, and evaluations that continue."""
import copy
import itertools
import json

import pytest
import timm
import torch
from helpers import TinyNet

import timm_robust.compat.autoattack as module
from timm_robust import InputError, set_bn_mode
from timm_robust.compat import AutoAttack, EvaluationState

EPS = 8 / 255


@pytest.fixture
def case():
    torch.manual_seed(0)
    model, x = TinyNet(num_classes=6), torch.rand(12, 3, 8, 8)
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)  # so that classes are near each other
        y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 6
    return model, x, y


def small(model, names=('apgd-ce', 'square'), eps=EPS, **how):
    adversary = AutoAttack(model, eps=eps, version='custom', attacks_to_run=names, device='cpu', seed=0, **how)
    adversary.apgd.n_restarts, adversary.apgd.n_iter, adversary.square.n_queries = 1, 3, 20
    return adversary


def settings_of(adversary, x, y, path):
    """What decides the outcomes, as the state file says; with labels that are all wrong nothing is attacked."""
    wrong = (adversary.model(x).argmax(1) + 1) % 6
    adversary.run_standard_evaluation(x, wrong, state_path=path)
    return json.loads(path.read_text())['_attacks_to_run']


# autoattack.py of the authors: __init__ and set_version
PUBLISHED = {
    'standard': {'apgd-ce': (100, 1, 1), 'apgd-t': (100, 1, 1), 'fab-t': (100, 1, None), 'square': (5000, 1, None)},
    'plus': {'apgd-ce': (100, 5, 1), 'apgd-dlr': (100, 5, 1), 'fab': (100, 5, None), 'square': (5000, 1, None),
             'apgd-t': (100, 1, 1), 'fab-t': (100, 1, None)},
    'rand': {'apgd-ce': (100, 1, 20), 'apgd-dlr': (100, 1, 20)},
    'custom': {'fab-t': (100, 1, None), 'fab': (100, 5, None), 'apgd-dlr': (100, 5, 1), 'apgd-t': (100, 1, 1)},
}


@pytest.mark.parametrize('version', PUBLISHED)
def test_versions_are_the_published_ones(case, tmp_path, version):
    names = tuple(PUBLISHED[version])
    how = {'attacks_to_run': names} if version == 'custom' else {}
    adversary = AutoAttack(case[0], version=version, device='cpu', verbose=False, **how)
    assert tuple(adversary.attacks_to_run) == names
    found = settings_of(adversary, *case[1:], tmp_path / 'state.json')
    assert {name: (own.get('steps', own.get('query_limit')), own['restarts'], own.get('eot_iter'))
            for name, own in found.items()} == PUBLISHED[version]


def test_settings_by_the_names_of_auto_attack(case, tmp_path):
    adversary = small(case[0], ('apgd-dlr', 'apgd-t', 'fab-t', 'fab', 'square'), verbose=False)
    adversary.apgd.rho, adversary.apgd_targeted.n_target_classes, adversary.square.p_init = .5, 2, .3
    adversary.fab.n_target_classes, adversary.fab.n_restarts = 3, 4
    found = settings_of(adversary, *case[1:], tmp_path / 'state.json')
    expected = {
        'apgd-dlr': {'loss': 'dlr', 'steps': 3, 'restarts': 1, 'rho': .5}, 'apgd-t': {'num_targets': 2, 'rho': .75},
        'fab-t': {'num_targets': 3, 'restarts': 1}, 'fab': {'restarts': 4}, 'square': {'query_limit': 20, 'p_init': .3}}
    assert {name: {k: found[name][k] for k in own} for name, own in expected.items()} == expected
    assert {own['threat'] for own in found.values()} == {'Linf 8/255'}


@pytest.mark.parametrize('norm, eps', [('Linf', EPS), ('L2', .1)])
def test_an_image_that_counts_as_broken_is_misclassified_within_eps(case, tmp_path, norm, eps, capsys):
    model, x, y = case
    model.train()
    x_adv, y_adv = small(model, norm=norm, eps=eps, log_path=tmp_path / 'log.txt').run_standard_evaluation(
        x, y, bs=5, return_labels=True, state_path=tmp_path / 'state.json')
    assert model.training
    model.eval()
    flags = EvaluationState.from_disk(tmp_path / 'state.json').robust_flags
    assert torch.equal(model(x_adv).argmax(1), y_adv) and torch.equal(y_adv == y, flags)
    assert 0 < flags.sum() < 10
    size = (x_adv - x).flatten(1).abs().amax(1) if norm == 'Linf' else (x_adv - x).flatten(1).norm(dim=1)
    assert size.max() <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1  # a rounding of float32
    assert torch.equal(x_adv[flags], x[flags])
    lines = (tmp_path / 'log.txt').read_text()
    assert 'initial accuracy: 83.33%' in lines and lines in capsys.readouterr().out
    assert f'robust accuracy after SQUARE: {flags.float().mean():.2%} (total time' in lines


def test_each_attack_by_itself(case):
    model, x, y = case
    adversary = small(model, verbose=False)
    found = adversary.run_standard_evaluation_individual(x, y, return_labels=True)
    assert list(found) == adversary.attacks_to_run == ['apgd-ce', 'square']
    for name, (x_adv, _) in found.items():
        alone = small(model, (name,), verbose=False)
        assert torch.equal(alone.run_standard_evaluation(x, y), x_adv)
        assert alone.clean_accuracy(x_adv, y) == pytest.approx((model(x_adv).argmax(1) == y).float().mean().item())


def test_an_evaluation_that_was_cut_off_continues(case, tmp_path, monkeypatch):
    model, x, y = case
    path, whole = tmp_path / 'state.json', tmp_path / 'whole.json'
    small(model, verbose=False).run_standard_evaluation(x, y, state_path=whole)
    ran, call = [], module.Attack.__call__

    def cut(self, *args, **how):
        ran.append(self.name)
        if self.name == 'square' and len(ran) < 3:
            raise KeyboardInterrupt
        return call(self, *args, **how)

    monkeypatch.setattr(module.Attack, '__call__', cut)
    with pytest.raises(KeyboardInterrupt):
        small(model, verbose=False).run_standard_evaluation(x, y, state_path=path)
    assert EvaluationState.from_disk(path).run_attacks == ['apgd-ce']
    small(model, verbose=False).run_standard_evaluation(x, y, state_path=path)
    assert ran == ['apgd', 'square', 'square']
    first, second = EvaluationState.from_disk(path), EvaluationState.from_disk(whole)
    assert torch.equal(first.robust_flags, second.robust_flags) and first.robust_accuracy == second.robust_accuracy


def test_a_state_of_something_else_is_refused(case, tmp_path):
    model, x, y = case
    path, alike, constant = tmp_path / 'state.json', copy.deepcopy(model), copy.deepcopy(model)
    model.scale, constant.scale = 1., 2.  # a number that TinyNet ignores, but another network may not
    with torch.no_grad():
        alike.fc.bias += 1e-3
    small(model, verbose=False).run_standard_evaluation(x, y, state_path=path)
    others = {
        'threat model': (small(model, verbose=False, eps=4 / 255), x, y),
        'attacks': (small(model, ('square',), verbose=False), x, y),
        'images': (small(model, verbose=False), x[:10], y[:10]),
        'network': (small(TinyNet(num_classes=6), verbose=False), x, y),
        'network or': (small(alike, verbose=False), x, y),
        'network or threat': (small(constant, verbose=False), x, y),
        'images, ': (small(model, verbose=False), x * .999, y),
    }
    assert torch.equal(alike(x).argmax(1), model(x).argmax(1)) and torch.equal(
        model(x * .999).argmax(1), model(x).argmax(1)), 'accuracy does not tell them apart'
    for what, (adversary, *data) in others.items():
        with pytest.raises(InputError, match=f'state_path.*{what}'):
            adversary.run_standard_evaluation(*data, state_path=path)
    path.write_text('{"path": 1}')
    with pytest.raises(InputError, match='state_path.*not the state of'):
        small(model).run_standard_evaluation(x, y, state_path=path)


def test_a_state_of_auto_attack_continues(case, tmp_path):
    """As its `to_disk` writes it: the set of attacks as text."""
    model, x, y = case
    flags = model(x).argmax(1) == y
    flags[5] = False
    path = tmp_path / 'state.json'
    path.write_text(json.dumps({
        '_attacks_to_run': "{'square', 'apgd-ce'}", 'path': str(path), '_run_attacks': ['apgd-ce'],
        '_robust_flags': flags.tolist(), '_last_saved': '2026-01-01 00:00:00', '_SAVE_TIMEOUT': 60,
        '_clean_accuracy': 10 / 12}))
    x_adv = small(model, verbose=False).run_standard_evaluation(x, y, state_path=path)
    state = EvaluationState.from_disk(path)
    assert not state.robust_flags[5] and torch.equal(x_adv[5], x[5])
    assert sorted(state.run_attacks) == ['apgd-ce', 'square']
    reference = pytest.importorskip('autoattack.state').EvaluationState.from_disk(path)
    assert torch.equal(reference.robust_flags, state.robust_flags)


@pytest.mark.parametrize('how, argument', [
    ({'is_tf_model': True}, 'is_tf_model'), ({'version': 'fast'}, 'version'), ({'norm': 'L7'}, 'norm'),
    ({'attacks_to_run': ['square']}, 'attacks_to_run'), ({'device': 'nowhere'}, 'device')])
def test_what_cannot_be_honoured_is_named(case, how, argument):
    with pytest.raises(InputError) as error:
        AutoAttack(case[0], **{'device': 'cpu', **how})
    assert error.value.argument == argument


def test_unknown_attacks_and_settings_are_named(case):
    model, x, y = case
    with pytest.raises(InputError, match="attacks_to_run='pgd20'"):
        small(model, ('pgd20',)).run_standard_evaluation(x, y)
    adversary = small(model)
    adversary.apgd.use_largereps = True
    with pytest.raises(InputError, match='apgd.use_largereps=True'):
        adversary.run_standard_evaluation(x, y)
    batch = set_bn_mode(TinyNet(norm=True), 'batch').eval()
    with pytest.raises(InputError, match='model: normalizes by the batch'):
        small(batch).run_standard_evaluation(x, y)


def test_a_randomized_network_is_said(case, capsys):
    model, x, y = case

    def noisy(images):
        return model(images) + torch.rand(len(images), 6)

    small(noisy).run_standard_evaluation(x, y)
    small(model).run_standard_evaluation(x, y)
    assert capsys.readouterr().out.count('randomized') == 1


@pytest.mark.parametrize('often, robust', [(.2, 10), ('every second pass', 0), (.8, 0)])
def test_several_passes_decide_on_a_randomized_network(case, capsys, often, robust):
    model, x, y = case

    passes = itertools.count()

    def mostly(images):  # noise alone misleads it, in each pass anew and whatever the image
        wrong = torch.tensor(next(passes) % 2 == 0) if isinstance(often, str) else torch.rand(len(images)) < often
        classes = torch.where(wrong, (y[0] + 4) % 6, y[0]).expand(len(images))
        return 5 * torch.nn.functional.one_hot(classes, 6) + 0 * model(images)

    labels = torch.cat([y[:1].expand(10), (y[:1] + 2).expand(2) % 6])  # never found
    adversary = AutoAttack(mostly, eps=EPS, version='rand', device='cpu', seed=0)
    adversary.apgd.n_iter = adversary.apgd.eot_iter = 2
    _, predicted = adversary.run_standard_evaluation(x, labels, return_labels=True)
    assert predicted[:10].tolist() == 10 * [int(y[0]) if robust else int(y[0] + 4) % 6]
    assert f'robust accuracy after APGD-DLR: {robust / 12:.2%}' in (log := capsys.readouterr().out)
    assert 'at least half of 100 passes' in log and 'use version=' not in log


def test_robustbench_runs_on_it_by_one_import(case, monkeypatch):
    """`benchmark` of the package itself on images of ours."""
    rb = pytest.importorskip('robustbench.eval')
    if not hasattr(rb, 'AutoAttack'):
        pytest.skip('the copy of robustbench in torchattacks has no AutoAttack')
    model, x, y = case
    monkeypatch.setattr(rb, 'AutoAttack', AutoAttack)
    monkeypatch.setattr(rb, 'load_clean_dataset', lambda *args: (x, y))
    clean, robust = rb.benchmark(model.eval(), 12, eps=EPS, device=torch.device('cpu'), batch_size=4)
    assert clean == pytest.approx(10 / 12) and robust < clean


@pytest.mark.parametrize('name, labels, message', [
    ('labels', lambda y: y[:, None], 'have shape'), ('labels', lambda y: y[:-1], 'give one per image'),
    ('labels', lambda y: torch.eye(6)[y], 'are soft targets'), ('images', lambda y: y, 'expected')])
def test_images_and_labels_are_checked_before_anything_is_said(case, capsys, name, labels, message):
    model, x, y = case
    adversary = small(model)
    for run in (adversary.clean_accuracy, adversary.run_standard_evaluation):
        with pytest.raises(InputError, match=f'{name}.*{message}'):
            run(x * 2 if name == 'images' else x, labels(y))
    assert not capsys.readouterr().out


def test_no_attacks_are_no_evaluation(case):
    model, x, y = case
    with pytest.raises(InputError, match='attacks_to_run: names no attack'):
        AutoAttack(model, eps=EPS, version='custom', device='cpu').run_standard_evaluation(x, y)


def test_a_network_that_expects_normalized_images_is_refused():
    network = timm.create_model('nofrost_resnet20_cifar').eval()
    x, y = torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    adversary = AutoAttack(network, eps=EPS, device='cpu', verbose=False)
    for run in (adversary.clean_accuracy, adversary.run_standard_evaluation):
        with pytest.raises(InputError, match='expects normalized images'):
            run(x, y)
