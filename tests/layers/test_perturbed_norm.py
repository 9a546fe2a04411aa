import pytest
import torch
import torch.nn as nn
from helpers import TinyNet
from timm.layers import BatchNormAct2d

from timm_robust.errors import InputError
from timm_robust.layers import (
    NormPerturbation,
    RobustNorm2d,
    convert_aux_norm,
    replace_norm,
    set_bn_mode,
    sync_norm_statistics,
)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, RobustNorm2d, lambda c: RobustNorm2d(c, power=.7)])
def test_a_perturbed_layer_is_the_equation(norm):
    layer = norm(3).double().train()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(.5, 2)
    mean, spread = layer.running_mean.clone(), layer.running_var.clone()
    robust = isinstance(layer, RobustNorm2d)
    spread = spread ** layer.power + layer.eps if robust else (spread + layer.eps).sqrt()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    plain = nn.Sequential(layer)
    perturbation = NormPerturbation(plain)
    with perturbation.clean_pass():
        plain(x)
    mean_then, spread_then = layer.running_mean.clone(), layer.running_var.clone()
    spread_then = spread_then ** layer.power + layer.eps if robust else (spread_then + layer.eps).sqrt()
    perturbation.ascend([torch.randn_like(d) for d in perturbation.tensors], .1)
    d_mean, d_var = (d[0] for d in perturbation.tensors)
    with perturbation.adversarial_pass():
        actual = plain(x)
    of_batch = x.mean((0, 2, 3), keepdim=True)
    if robust:
        normalized = (x - of_batch) / ((x.amax((0, 2, 3), True) - x.amin((0, 2, 3), True)) ** layer.power + layer.eps)
    else:
        normalized = (x - of_batch) / (x.var((0, 2, 3), correction=0, keepdim=True) + layer.eps).sqrt()
    shape = (1, 3, 1, 1)
    wanted = (layer.weight * (1 + d_var)).view(shape) * (
        normalized - (d_mean * mean_then / spread_then).view(shape)) + layer.bias.view(shape)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(mean, mean_then) and torch.equal(layer.running_mean, mean_then)
    assert not torch.allclose(spread, spread_then)


def test_a_gradient_that_is_no_number_is_no_step():
    perturbation = NormPerturbation(nn.Sequential(nn.BatchNorm2d(4)))
    with perturbation.clean_pass():
        pass
    gradients = [torch.tensor([[float('nan'), float('inf'), -float('inf'), -1e-30]]), None]
    perturbation.ascend(gradients, .5)
    assert perturbation.tensors[0].tolist() == [[0., .5, -.5, -.5]] and perturbation.tensors[1].tolist() == [[0.] * 4]


def test_layers_exchanged_after_are_perturbed_all_the_same():
    model = TinyNet(norm=True).train()
    perturbation = NormPerturbation(model)
    replace_norm(model)
    model.norm.running_mean.fill_(.5)
    with perturbation.clean_pass():
        model(torch.randn(4, 3, 8, 8)).pow(2).sum().backward()
    assert perturbation.norms == [model.norm] and all(d.grad.abs().sum() > 0 for d in perturbation.tensors)


@pytest.mark.parametrize('convert', [
    replace_norm, sync_norm_statistics, convert_aux_norm, lambda m: set_bn_mode(m, 'batch')])
def test_only_a_plain_batch_norm_has_groups(convert):
    NormPerturbation(nn.Sequential(BatchNormAct2d(4)), groups=2)
    model = convert(TinyNet(norm=True))
    NormPerturbation(model)
    with pytest.raises(InputError, match='groups=2: .* cannot be split into groups'):
        NormPerturbation(model, groups=2)


def test_bad_arguments():
    with pytest.raises(InputError, match='groups=0: must be a whole number'):
        NormPerturbation(TinyNet(norm=True), groups=0)
    with pytest.raises(InputError, match='TinyNet has no BatchNorm or RobustNorm layer with affine parameters'):
        NormPerturbation(TinyNet())
