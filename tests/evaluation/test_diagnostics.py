"""Every check of `diagnose` on a network that has the fault it looks for, and on an honest one."""
import copy
import io
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import TinyNet, state_equal

from timm_robust.attacks import FGSM, L2, PGD, Linf, image_seeds
from timm_robust.errors import InputError
from timm_robust.evaluation.batch_dependence import adaptive_accuracy, compare_batches, even_batch_size, judge_adaptive
from timm_robust.evaluation.diagnostics import diagnose
from timm_robust.evaluation.render import plot_loss_surface
from timm_robust.evaluation.surface import LossSurface, loss_surface
from timm_robust.layers import replace_norm, set_bn_mode
from timm_robust.settings import from_mapping, to_mapping

THREAT = Linf(0.1)
COLOURS = torch.tensor([[0.3, 0.5, 0.7], [0.7, 0.5, 0.3], [0.5, 0.7, 0.5], [0.5, 0.3, 0.5]])
PER_IMAGE = [
    'randomness', 'zero_gradients', 'saturated_logits', 'more_steps', 'black_box', 'transfer', 'unbounded', 'noise',
    'single_step', 'loss_surface', 'batch_dependence']
WHOLE_BATCHES = [
    'randomness', 'zero_gradients', 'saturated_logits', 'adaptive', 'noise', 'single_step', 'loss_surface',
    'batch_dependence']


def problem(n=60, seed=0):
    """Four colours under noise."""
    y = torch.arange(n) % 4
    noise = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (COLOURS[y].view(n, 3, 1, 1) + 0.15 * noise).clamp(0, 1), y


def trained(make, steps=120):
    """Adversarial training, until about half of the images withstand."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(steps):
        x, y = problem(64, seed=1 + step)
        x = FGSM().craft(model.eval(), x, y, THREAT)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope='module')
def honest():
    return trained(TinyNet)


@pytest.fixture(scope='module')
def robust_norm():
    return trained(lambda: replace_norm(TinyNet(norm=True)))


class Around(nn.Module):
    """A network with something in front of it and something behind it."""

    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def quantized(model):
    return Around(model, before=lambda x: torch.round(x * 4) / 4).eval()


def findings(model, threat=THREAT, batch_size=32, data=None, **kwargs):
    x, y = data or problem()
    kwargs = {'steps': (5, 20, 50), 'black_box_queries': 200, **kwargs}
    return {f.name: f for f in diagnose(model, x, y, threat, batch_size=batch_size, progress=False, **kwargs)}


@pytest.mark.parametrize('threat', [THREAT, L2(1.2)])
def test_an_honest_network_raises_no_alarm(honest, threat):
    found = findings(honest, threat)
    assert list(found) == PER_IMAGE
    assert [f.name for f in found.values() if f.verdict == 'alarm'] == []
    for name in ('randomness', 'zero_gradients', 'saturated_logits', 'unbounded', 'noise', 'loss_surface',
                 'batch_dependence'):
        assert found[name].verdict == 'ok', found[name].text
    accuracy = [run['accuracy'] for run in found['more_steps'].measured['runs']]
    assert accuracy == sorted(accuracy, reverse=True) and 20 < accuracy[-1] < 80, 'the network proves nothing'
    assert found['noise'].measured['fgsm'] < found['noise'].measured['noise'] - 10
    assert found['transfer'].verdict == 'skipped' and 'No surrogate' in found['transfer'].text
    for finding in found.values():
        assert '60 images, seed 0' in finding.text
        settings = {k: finding.measured[k] for k in ('num_examples', 'norm', 'eps', 'seed')}
        assert settings == {'num_examples': 60, 'norm': threat.norm, 'eps': threat.eps, 'seed': 0}


def test_a_network_without_gradients_is_caught(honest):
    found = findings(quantized(honest), surrogate=honest)
    for name in ('zero_gradients', 'black_box', 'transfer', 'unbounded'):
        assert found[name].verdict == 'alarm', found[name].text
    assert found['zero_gradients'].measured['images'] == {'float32': 60, 'float64': 60}
    assert 'not differentiable' in found['zero_gradients'].text
    assert 'misleading' in found['black_box'].text and found['black_box'].measured['left_by_gradients'] == 60
    assert 'masked' in found['transfer'].text and found['transfer'].measured['broken'] > 10
    assert found['unbounded'].measured['survivors'] == 60
    assert found['loss_surface'].verdict == 'warning' and found['noise'].verdict != 'ok'
    assert found['batch_dependence'].verdict == 'ok'


def test_an_honest_network_is_no_easier_through_a_surrogate(honest):
    assert findings(honest, surrogate=honest)['transfer'].verdict == 'ok'


def test_a_network_that_cuts_the_graph_is_diagnosed_all_the_same(honest):
    found = findings(Around(honest, before=torch.Tensor.detach).eval())
    assert found['zero_gradients'].verdict == found['unbounded'].verdict == 'alarm'


def test_saturation_is_told_from_masking(honest):
    by_100 = findings(Around(honest, after=lambda z: 100 * z).eval())
    assert by_100['saturated_logits'].verdict == by_100['zero_gradients'].verdict == 'alarm'
    images = by_100['zero_gradients'].measured['images']
    assert images['float32'] > 30 and images['float64'] == 0
    assert 'saturates in float32' in by_100['zero_gradients'].text
    assert by_100['black_box'].verdict == 'ok', 'a loss that ignores the scale sees the slope'
    by_10000 = findings(Around(honest, after=lambda z: 1e4 * z).eval())
    assert by_10000['saturated_logits'].verdict == by_10000['unbounded'].verdict == 'alarm'
    assert by_10000['zero_gradients'].measured['images']['float64'] > 50


def test_a_randomized_network_is_caught_and_torchs_generator_is_left_alone(honest):
    noisy = Around(honest, before=lambda x: x + 0.1 * torch.randn_like(x)).eval()
    state = torch.random.get_rng_state()
    found = findings(noisy)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found['randomness'].verdict == 'alarm' and 'rand' in found['randomness'].text
    assert found['batch_dependence'].verdict == 'skipped'
    torch.rand(1)
    assert findings(noisy) == found


def test_a_gradient_worse_than_noise_is_caught(honest):
    downhill = Around(honest, before=lambda x: 2 * x.detach() - x).eval()
    x, _ = problem()
    between_classes = 0.45 * x + 0.55 * x.roll(1, 0)
    data = between_classes, downhill(between_classes).argmax(1)
    found = findings(downhill, data=data, steps=(5,), black_box_queries=50)
    assert found['noise'].verdict == 'alarm' and 'no better than a random direction' in found['noise'].text
    assert found['noise'].measured['noise'] < found['noise'].measured['clean'] - 5, found['noise'].text
    assert found['loss_surface'].verdict == 'warning' and found['loss_surface'].measured['gradient_rise'] < 0
    assert found['zero_gradients'].verdict == 'ok', 'there is a gradient, and it misleads'


def test_a_loss_bent_around_the_image_is_caught(honest):
    """The gradient is right on a grid of pixel values, which the data keeps to, and misleads beside it."""
    x, y = problem()
    ripples = Around(honest, before=lambda x: x + 0.005 * torch.sin(160 * torch.pi * x)).eval()
    found = findings(ripples, data=((10 * x).round() / 10, y), steps=(20,), black_box_queries=50)
    assert found['single_step'].verdict == 'alarm' and found['single_step'].measured['only_by_single_step'] > 5
    assert findings(honest, data=((10 * x).round() / 10, y), steps=(20,))['single_step'].verdict == 'ok'


def test_an_attack_that_has_not_converged_is_told(honest):
    assert findings(honest, L2(1.2), steps=(1, 2, 50))['more_steps'].verdict == 'warning'
    accuracy = [run['accuracy'] for run in findings(honest, steps=(20, 1))['more_steps'].measured['runs']]
    assert accuracy == sorted(accuracy, reverse=True), 'a run attacks only what those before left'


@pytest.mark.parametrize('statistics', ['batch', 'mean', 'population'])
def test_robust_norm_by_its_statistics(robust_norm, statistics):
    model = set_bn_mode(copy.deepcopy(robust_norm), statistics)
    found = findings(model)
    if statistics == 'population':
        assert list(found) == PER_IMAGE and found['batch_dependence'].verdict == 'ok'
        assert all(found['batch_dependence'].measured[k]['changed'] == 0 for k in ('alone', 'shuffled', 'one_class'))
        return
    assert list(found) == WHOLE_BATCHES
    assert found['batch_dependence'].verdict == 'alarm' and found['adaptive'].verdict in ('warning', 'alarm')
    measured = found['adaptive'].measured
    assert measured['clean'] > 90 and measured['adaptive'] <= measured['pgd'] < measured['clean']
    assert 20 < measured['population_apgd_ce'] < measured['population_clean']
    assert measured['batch_size'] == 30 and (measured['few_steps'], measured['steps']) == (5, 20)
    assert 'population statistics' in found['adaptive'].text and 'guarantees nothing' in found['adaptive'].text
    if statistics == 'batch':
        assert found['batch_dependence'].measured['one_class']['changed'] > 10


def test_neighbours_are_shuffled_even_if_all_images_fit_in_one_batch(robust_norm):
    model = set_bn_mode(copy.deepcopy(robust_norm), 'batch')
    found = findings(model, data=problem(40), batch_size=40, steps=(2, 3))['batch_dependence']
    assert found.measured['batch_size'] == 20 and '(size 20)' in found.text
    x, y = problem(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))  # that of `diagnose`
    assert found.measured['shuffled'] == compare_batches(model, x[order], y[order], batch_size=20, seed=1)['shuffled']


def test_population_numbers_are_those_of_the_network_with_population_statistics(robust_norm):
    own = findings(set_bn_mode(copy.deepcopy(robust_norm), 'batch'))['adaptive'].measured
    population = findings(robust_norm, steps=(20,))
    assert population['more_steps'].measured['runs'][0]['accuracy'] == own['population_apgd_ce']
    assert population['noise'].measured['clean'] == own['population_clean']


def test_statistics_taken_as_fixed_are_those_of_the_population(robust_norm):
    x, y = problem(24)
    order = y.argsort(stable=True)  # batches of one class, where the two kinds of statistics are far apart
    x, y = x[order], y[order]
    model = set_bn_mode(copy.deepcopy(robust_norm), 'batch')
    measured = adaptive_accuracy(model, x, y, THREAT, batch_size=6, few_steps=2, steps=7, restarts=1, seed=3)
    seeds = image_seeds(3, 24, x.device).tolist()
    adv = PGD(steps=7).craft(robust_norm, x, y, THREAT, seed=seeds)
    logits, clean = (torch.cat([model(part) for part in images.split(6)]) for images in (adv, x))
    held = int(((logits.argmax(1) == y) & (clean.argmax(1) == y)).sum())
    assert measured['standing'] == pytest.approx(100 * held / 24)
    assert held != int((robust_norm(adv).argmax(1) == y).sum()), 'the comparison says nothing'


def test_what_an_attacker_owes_to_ignorance_is_told():
    measured = {
        'clean': 90., 'pgd': 60., 'adaptive': 40., 'standing': 70., 'population_clean': 91., 'population_apgd_ce': 42.}
    verdict, text = judge_adaptive(measured, THREAT, few_steps=20, steps=100, restarts=5)
    assert verdict == 'alarm' and '30.0 points' in text and 'APGD-CE (100 steps) 42.0 %' in text
    assert judge_adaptive({**measured, 'pgd': 40., 'standing': 41.}, THREAT, 20, 100, 5)[0] == 'warning'
    verdict, text = judge_adaptive({**measured, 'standing': 20.}, THREAT, 20, 100, 5)
    assert verdict == 'alarm' and 'The lowest, 20.0 %' in text, 'gradients through the statistics mislead'


def test_batch_norm_on_batches_it_cannot_take():
    """One value per channel is refused by BatchNorm in its batch mode, which is an answer too."""
    model = set_bn_mode(nn.Sequential(TinyNet(norm=True)), 'batch').eval()
    x, y = problem(9)
    measured = compare_batches(model, x[:, :, :1, :1], y, batch_size=3)
    assert measured['alone'] is None and measured['own']['changed'] == 0 and measured['shuffled'] is not None


def test_without_tracked_statistics_there_is_none_to_deploy():
    model = TinyNet(norm=True)
    model.norm = nn.BatchNorm2d(8, track_running_stats=False)
    x, y = problem()
    model.eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    found = {f.name: f for f in diagnose(model, x, y, THREAT, steps=(2, 3), progress=False)}
    assert found['adaptive'].measured['standing'] is None
    assert found['adaptive'].measured['population_apgd_ce'] is None and 'no statistics' in found['adaptive'].text


def test_findings_are_json_and_repeat_and_the_model_is_untouched(robust_norm):
    model = set_bn_mode(copy.deepcopy(robust_norm), 'batch')
    model.fc.weight.requires_grad_(False)
    model.conv.train()  # a part that trains on, in a network in eval mode
    frozen = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model)
    found = findings(model)
    assert state_equal(model, before) and [p.requires_grad for p in model.parameters()] == frozen
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert json.loads(json.dumps([f.measured for f in found.values()])) == [f.measured for f in found.values()]
    assert findings(model) == found
    honest_findings = findings(robust_norm)
    assert findings(robust_norm) == honest_findings
    assert findings(robust_norm, seed=1) != honest_findings


@pytest.mark.parametrize('threat', [THREAT, L2(1.2)])
def test_loss_surface(honest, threat):
    x, y = problem(20)
    surface = loss_surface(honest, x, y, threat, points=5)
    assert from_mapping(LossSurface, json.loads(json.dumps(to_mapping(surface)))) == surface
    assert surface.coordinates == (-1, -0.5, 0, 0.5, 1) and (surface.norm, surface.eps) == (threat.norm, threat.eps)
    loss = torch.tensor(surface.loss)
    with torch.no_grad():
        clean = F.cross_entropy(honest(x), y)
        adv = FGSM().craft(honest, x, y, threat)
        torch.testing.assert_close(loss[2, 2], clean)
        torch.testing.assert_close(loss[2, 4], F.cross_entropy(honest(adv), y))
    assert loss[2, 0] < clean != loss[4, 2] and loss[2, 4] - clean > 5 * (loss[4, 2] - clean).abs()
    file = io.BytesIO()
    plot_loss_surface(surface, 'loss', file)
    assert file.getvalue().startswith(b'\x89PNG')


def test_bad_input(honest):
    x, y = problem(8)
    with pytest.raises(InputError, match="threat='L7 1'"):
        diagnose(honest, x, y, 'L7 1')
    with pytest.raises(InputError, match='labels: 7 for 8 images'):
        diagnose(honest, x, y[:-1], THREAT)
    with pytest.raises(InputError, match='pixels'):
        diagnose(honest, x * 255, y, THREAT)
    with pytest.raises(InputError, match='no image'):
        diagnose(honest, x, (y + 1) % 4, THREAT)
    with pytest.raises(InputError, match='label 4'):
        diagnose(honest, x, torch.full_like(y, 4), THREAT)
    with pytest.raises(InputError, match='no image'):
        diagnose(honest, x[:0], y[:0], THREAT)


def test_even_batch_size():
    assert [even_batch_size(n, 128) for n in (1, 128, 129, 200, 300)] == [1, 128, 65, 100, 100]
