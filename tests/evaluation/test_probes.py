"""What every evaluation finds on its first images."""
import pytest
import timm
import torch
import torch.nn as nn

from timm_robust import evaluate
from timm_robust.attacks import PGD, Square
from timm_robust.errors import InputError
from timm_robust.evaluation.probes import Probe, probe
from timm_robust.inputs import fingerprint
from timm_robust.layers import set_bn_mode
from timm_robust.models import NormalizedModel

QUIET = {'progress': False, 'save_images': 0, 'diagnose': False, 'allow_chance': True, 'batch_size': 6}


class Computed(nn.Module):
    """Maps the mean of each image to an output, so that all outcomes are known."""

    def __init__(self, output):
        super().__init__()
        self.scale, self.output = nn.Parameter(torch.tensor(1.)), output

    def forward(self, x):
        return self.output(self.scale * (x.mean((1, 2, 3)) - .5))


def two(z):
    return torch.stack([-z, z], 1)


@pytest.fixture
def images():
    level = torch.linspace(.1, .9, 12)[torch.randperm(12)]
    return level.view(-1, 1, 1, 1).expand(12, 3, 4, 4).contiguous(), (level > .5).long()


def found(model, images, attacks='clean,pgd2'):
    report = evaluate(model.eval(), images, attacks=attacks, threat='Linf 0.2', **QUIET)
    assert report == type(report).from_dict(report.to_dict())
    for text in report.settings.suspicions:
        assert f'WARNING: {text}' in str(report)
    return report.settings.suspicions


def test_a_single_output_is_a_logit(images):
    plain = evaluate(Computed(lambda z: z).eval(), images, attacks='clean', **QUIET)
    assert plain.clean_accuracy == 100
    with pytest.raises(InputError, match='as after a sigmoid.*before the sigmoid'):
        evaluate(Computed(lambda z: z.sigmoid()[:, None]).eval(), images, attacks='clean', **QUIET)
    # two outputs may be probabilities, and a few logits may lie there by chance
    probabilities = Computed(lambda z: two(z).softmax(1)).eval()
    assert evaluate(probabilities, images, attacks='clean', **QUIET).clean_accuracy == 100
    x, y = images
    few = torch.where(y == 1)[0][:3]
    evaluate(Computed(lambda z: z).eval(), (x[few], y[few]), attacks='clean', **QUIET)
    bright = y.argsort(descending=True)
    more, label = torch.cat([x[bright[:6]], x[bright]]), torch.cat([y[bright[:6]], y[bright]])
    assert label[:8].all(), 'the first eight logits are in [0, 1]'
    assert evaluate(Computed(lambda z: z).eval(), (more, label), attacks='clean', **QUIET).clean_accuracy == 100


@pytest.mark.parametrize('output', [lambda z: two(10_000 * z), lambda z: two(z.round(decimals=2))],
                         ids=['saturated', 'rounded'])
def test_gradients_that_are_zero(images, output):
    text, = found(Computed(output), images)
    assert 'is exactly zero for 8 of the first 8 correctly' in text
    assert not found(Computed(two), images)
    # no attack that follows a gradient
    for attacks in ('clean', ['clean', Square(query_limit=3)]):
        assert not found(Computed(output), images, attacks)


@pytest.mark.parametrize('attack', ['fmn2', 'ddn2', 'fab-t2', 'malt', 'quick'])
def test_every_attack_that_uses_gradients_needs_them(images, attack):
    several = Computed(lambda z: torch.stack([-z, z, z * 0 - 9, z * 0 - 8], 1).round(decimals=2)).eval()
    threat = 'L2 0.2' if attack == 'ddn2' else 'Linf 0.2'
    report = evaluate(several, images, attacks=['clean', attack], threat=threat, **QUIET)
    assert 'is exactly zero for 8 of the first 8' in report.settings.suspicions[0] and not report.findings


@pytest.mark.parametrize('shape', [(-1,), (-1, 1)])
def test_a_network_with_one_logit_has_gradients(images, shape):
    assert not found(Computed(lambda z: (9 * z).view(shape)), images)
    text, = found(Computed(lambda z: (9 * z).round(decimals=2).view(shape)), images)
    assert 'exactly zero for 8 of the first 8' in text


def test_some_gradients_that_are_zero(images):
    text, = found(Computed(lambda z: two(torch.where(z.abs() > .3, 10_000 * z, z))), images)
    extreme = int(((images[0][:8].mean((1, 2, 3)) - .5).abs() > .3).sum())
    assert 0 < extreme < 8 and f'exactly zero for {extreme} of the first 8' in text


def test_probabilities_that_round_to_one():
    level = .5 + torch.tensor([.1, -.15, .2, -.25, .3, -.35, .4, -.45])
    images = level.view(-1, 1, 1, 1).expand(8, 3, 4, 4).contiguous(), (level > .5).long()
    # the probability is 1 from a gap of 17.4 between the logits, 2 |z| scale; with 16 / .5 only from |z| = .3 on
    text, = found(Computed(lambda z: two(17.4 / .5 * z)), images)
    assert 'rounds to 1 for 5 of the first 8 correctly' in text
    assert not found(Computed(lambda z: two(16 / .5 * z)), images)
    assert not found(Computed(lambda z: two(17.4 / .5 * z)), images, 'clean')


def test_predictions_that_depend_on_the_batch(images):
    text, = found(Computed(lambda z: two(z - .1 * z.mean())), images, 'clean')
    assert 'depend on the other images in the batch' in text


def test_a_network_with_batch_statistics_has_its_own_warning():
    model = NormalizedModel(timm.create_model('resnet20_cifar', num_classes=2)).eval()
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6) % 2
    for mode in ('batch', 'population'):
        set_bn_mode(model, mode)
        report = evaluate(model, (x, y), attacks='clean', **QUIET)
        assert report.settings.batch_dependent == (mode == 'batch') and report.settings.suspicions == ()


def test_several_passes_of_a_network_without_noise(images):
    assert found(Computed(two), images, 'autoattack-rand') == (
        'Two passes of this network agree, so it is not randomized: autoattack-rand is weaker than autoattack here.',)
    noisy = Computed(lambda z: two(z + .3 * torch.randn_like(z)))
    assert not found(noisy, images, 'autoattack-rand')
    # of a randomized network nothing else can be said
    report = evaluate(noisy.eval(), images, attacks=[PGD(steps=2)], threat='Linf 0.2', **QUIET)
    assert report.settings.randomized and report.settings.suspicions == ()


def test_attacks_crafted_on_another_network_need_no_gradient(images):
    report = evaluate(Computed(lambda z: two(z.round(decimals=2))).eval(), images, attacks='pgd2', threat='Linf 0.2',
                      surrogate=Computed(two).eval(), **QUIET)
    assert report.settings.suspicions == () and report.robust_accuracy is None and report.best_known is None
    text = str(report)
    assert 'crafted on Computed' in text and report.described(report['pgd2']) == 'pgd2 crafted on Computed'


def test_the_probe_leaves_no_trace(images):
    model = Computed(lambda z: two(z + .3 * torch.randn_like(z))).train()
    state = torch.random.get_rng_state()
    found = probe(model, *images, batch_size=6, batch_dependent=False, gradients=True)
    assert found == Probe(True) and torch.equal(state, torch.random.get_rng_state())
    assert model.training and model.scale.grad is None and model.scale.requires_grad


def test_the_fingerprint_of_a_randomized_network_is_none():
    model = timm.create_model('resnet20_cifar', num_classes=3).eval()
    state = torch.random.get_rng_state()
    known = fingerprint(model)
    assert known == fingerprint(model) and len(known) == 2 * 3
    model.register_forward_hook(lambda module, x, logits: logits + torch.randn_like(logits))
    assert fingerprint(model) is None and torch.equal(state, torch.random.get_rng_state())
