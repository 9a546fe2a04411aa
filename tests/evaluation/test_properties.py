"""Properties of the boundary on classifiers whose boundary is known."""
import math

import pytest
import torch
import torch.nn as nn

from timm_robust.attacks import L2, Linf, make_threat
from timm_robust.errors import InputError
from timm_robust.evaluation.properties import boundary_thickness, decision_margin, smoothness


class Linear(nn.Module):
    """Two classes whose logits differ by z = <w, x> + b."""

    def __init__(self, scale=1.):
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(scale * torch.randn(12, dtype=torch.float64), requires_grad=False)

    def z(self, x):
        return (x.flatten(1) - .5) @ self.w

    def forward(self, x):
        z = self.z(x)
        return torch.stack([z, -z], 1) / 2


def images(n=40):
    generator = torch.Generator().manual_seed(2)
    return .3 + .4 * torch.rand(n, 3, 2, 2, dtype=torch.float64, generator=generator)


def test_the_margin_of_a_linear_classifier_is_the_distance_to_its_hyperplane():
    model, x = Linear(), images()
    y = (model.z(x) < 0).long()
    y[:5] = 1 - y[:5]
    margin = decision_margin(model, x, y, L2(.05), num_targets=1)
    wanted = model.z(x).abs() / model.w.norm()
    wanted[:5] = 0
    torch.testing.assert_close(margin, wanted, rtol=1e-5, atol=1e-7)
    # along the signs of the gradient the way is longer, by as much as the norms say
    linf = decision_margin(model, x, y, Linf(.05), num_targets=1)
    torch.testing.assert_close(
        linf, wanted * model.w.norm() * math.sqrt(12) / model.w.abs().sum(), rtol=1e-5, atol=1e-7)


def test_no_boundary_is_said():
    class Constant(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2] * 0 + torch.tensor([1., 0.])

    x = images(4)
    assert decision_margin(Constant(), x, torch.zeros(4, dtype=torch.long), L2(.1)).isinf().all()


@pytest.mark.parametrize('alpha, beta', [(0., .75), (-.5, .5)])
def test_the_thickness_of_a_logistic_classifier(alpha, beta):
    model, x = Linear(scale=20.), images()
    near = model.z(x).abs() / model.w.norm() < .2
    found = boundary_thickness(model, x, L2(.4), alpha=alpha, beta=beta, points=2000, steps=50)
    # the difference in probability is tanh(z / 2), and z changes by |w| per unit of length
    wanted = 2 * (math.atanh(beta) - math.atanh(alpha)) / model.w.norm().item()
    enough = (model.z(x).abs() > 2 * math.atanh(.75) + .1) & near
    assert enough.sum() > 5
    torch.testing.assert_close(found[enough], torch.full_like(found[enough], wanted), rtol=.02, atol=0.)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_smoothness_of_a_logistic_classifier(norm):
    model, x, eps = Linear(), images(), .05
    reach = eps * (model.w.abs().sum() if norm == 'linf' else model.w.norm())
    log_p = model(x).log_softmax(1)

    def divergence(z):
        q = (torch.stack([z, -z], 1) / 2).log_softmax(1)
        return (log_p.exp() * (log_p - q)).sum(1)

    wanted = torch.maximum(divergence(model.z(x) + reach), divergence(model.z(x) - reach))
    found = smoothness(model, x, make_threat(norm, eps), restarts=8, steps=40)
    # in an L2 ball the noise of the start, 2 % of eps to the side, is never quite lost
    torch.testing.assert_close(found, wanted, rtol=1e-4 if norm == 'linf' else 1e-3, atol=1e-8)
    assert (smoothness(Linear(scale=.1), x, make_threat(norm, eps), restarts=8) < found).all()


class Normalized(Linear):
    """The classifier behind a BatchNorm that moves in train mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)

    def forward(self, x):
        return super().forward(self.norm(x))


@pytest.mark.parametrize('measure', [
    lambda m, x, y: decision_margin(m, x, y, L2(.5), num_targets=1),
    lambda m, x, y: boundary_thickness(m, x, L2(.5)),
    lambda m, x, y: smoothness(m, x, L2(.5)),
])
def test_a_network_in_train_mode_is_measured_at_rest_and_left_as_it_was(measure):
    model, x = Normalized(), images(8)
    y = (model.eval()(x).argmax(1)).long()
    wanted = measure(model, x, y)
    assert wanted.std() > 0
    torch.testing.assert_close(measure(model.train(), x, y), wanted, rtol=0, atol=0)
    assert model.training and model.norm.training
    assert model.norm.num_batches_tracked == 0 and not model.norm.running_mean.any()


def test_bad_input():
    with pytest.raises(InputError, match='alpha=0.8: must satisfy -1 <= alpha < beta <= 1 with `beta=0.5`'):
        boundary_thickness(Linear(), images(), L2(.1), alpha=.8, beta=.5)


def test_the_command(tmp_path, capsys):
    import json

    import timm
    from helpers import make_image_folder

    from timm_robust.cli.main import main
    folder = make_image_folder(tmp_path / 'data', splits=('test',), classes=tuple('abcd'), per_class=4)
    for name in ('nofrost_resnet20_cifar', 'robustnorm_resnet20_cifar'):
        torch.save(timm.create_model(name, num_classes=4).state_dict(), tmp_path / f'{name}.pth')
    argv = ['properties', '--num-classes', '4', '--data-dir', str(folder), '--split', 'test', '-j', '0', '-b', '8',
            '--num-examples', '12', '--steps', '2', '--device', 'cpu', '--output', str(tmp_path / 'out')]
    own = ['--model', 'nofrost_resnet20_cifar', '--checkpoint', str(tmp_path / 'nofrost_resnet20_cifar.pth')]
    assert main([*argv, *own]) == 0
    found = json.loads((tmp_path / 'out' / 'properties.json').read_text())
    assert [len(v) for v in found['properties'].values()] == [12, 12, 12]
    margins = found['properties']['decision margin (L2)']
    assert [m != 0 for m in margins] == [bool(c) for c in found['correct']]
    assert sum(found['correct']) == round(.12 * found['clean_accuracy'])
    printed = capsys.readouterr().out
    assert 'decision margin (L2)' in printed and '12 images, batch 8, Linf 8/255, seed 0, 2 steps' in printed
    for more, message in (
            (own, 'already holds properties.json'), ([*own, '--eps', '0'], '--eps 0'),
            (['--model', 'robustnorm_resnet20_cifar', '--checkpoint', str(tmp_path / 'robustnorm_resnet20_cifar.pth'),
              '--bn-mode', 'batch', '--output', str(tmp_path / 'b')], 'no decision boundary per image')):
        assert main([*argv, *more]) == 2
        assert message in capsys.readouterr().err
