import pytest
import timm
import torch
import torch.nn as nn
from helpers import run_distributed
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d

from timm_robust.layers import RobustNorm2d, RobustNormAct2d, set_bn_mode


def reference(x, weight, bias, power=0.2, eps=1e-5, mean=None, value_range=None):
    """The paper's equation, channel by channel, with the extrema read at one index each."""
    out = []
    for c in range(x.shape[1]):
        values = x[:, c].reshape(-1)
        mu = values.mean() if mean is None else mean[c]
        if value_range is None:
            r = values[values.argmax()] - values[values.argmin()]
        else:
            r = value_range[c]
        out.append(weight[c] * (x[:, c] - mu) / (r ** power + eps) + bias[c])
    return torch.stack(out, dim=1)


def layer_in_float64(**kwargs):
    layer = RobustNorm2d(5, dtype=torch.float64, **kwargs)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize('power', [0., 0.2, 1.])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_training_output_and_gradients(power, memory_format):
    layer = layer_in_float64(power=power).train()
    x = torch.randn(4, 5, 3, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
    upstream = torch.randn_like(x)
    inputs = [x.clone().requires_grad_(), layer.weight, layer.bias]
    y = layer(inputs[0])
    expected_inputs = [x.clone().requires_grad_(), layer.weight.detach().clone().requires_grad_(),
                       layer.bias.detach().clone().requires_grad_()]
    expected = reference(*expected_inputs, power=power)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    actual = torch.autograd.grad((y * upstream).sum(), inputs)
    wanted = torch.autograd.grad((expected * upstream).sum(), expected_inputs)
    for a, w in zip(actual, wanted):
        torch.testing.assert_close(a, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('shape', [(4, 5, 3, 6), (3, 16, 4, 4), (2, 70, 1, 1), (1, 5, 8, 2)])
@pytest.mark.parametrize('affine', [True, False])
def test_ties_give_the_gradient_to_the_first(memory_format, shape, affine):
    channels = shape[1]
    layer = RobustNorm2d(channels, affine=affine, dtype=torch.float64).train()
    weight, bias = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if affine:
        nn.init.normal_(layer.weight)
        weight, bias = layer.weight.detach(), layer.bias.detach()
    x = torch.randint(3, shape).double()  # three values: every extremum is tied
    x[:, 0] = 5.
    upstream = torch.randn(shape, dtype=torch.float64)
    varies = [c for c in range(channels) if x[:, c].max() > x[:, c].min()]
    assert len(varies) > 1 and 0 not in varies
    wanted_x = x.clone().requires_grad_()
    wanted = reference(wanted_x[:, varies], weight[varies], bias[varies])
    (wanted * upstream[:, varies]).sum().backward()
    own_x = x.clone().contiguous(memory_format=memory_format).requires_grad_()
    y = layer(own_x)
    (y * upstream).sum().backward()
    torch.testing.assert_close(y[:, varies], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_x.grad[:, varies], wanted_x.grad[:, varies], rtol=1e-11, atol=1e-12)
    assert (own_x.grad[:, 0] == 0).all()


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_graph_keeps_the_input_and_vectors(memory_format):
    layer = RobustNorm2d(8).train()
    x = torch.randn(16, 8, 12, 12).contiguous(memory_format=memory_format).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() > 2 * 8]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize('bn_mode', ['batch', 'mean', 'population'])
def test_attacks_in_eval_mode_get_the_gradient_of_the_equation(bn_mode):
    layer = layer_in_float64(bn_mode=bn_mode).eval().requires_grad_(False)
    layer.running_mean.normal_()
    layer.running_var.uniform_(1, 3)
    x = torch.randn(4, 5, 3, 6, dtype=torch.float64)
    upstream = torch.randn_like(x)
    own, wanted = (x.clone().requires_grad_() for _ in range(2))
    # a gradient that was expanded, as a mean over pixels gives
    (layer(own).mean((2, 3)) * upstream[:, :, 0, 0]).sum().backward()
    y = reference(
        wanted, layer.weight, layer.bias, mean=None if bn_mode == 'batch' else layer.running_mean,
        value_range=layer.running_range if bn_mode == 'population' else None)
    (y.mean((2, 3)) * upstream[:, :, 0, 0]).sum().backward()
    torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradgradcheck(layer, own.detach()[:2, :, :2, :2].contiguous().requires_grad_())


def test_gradcheck_twice():
    layer = layer_in_float64().train()
    layer.momentum = 0.
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize('bn_mode', ['batch', 'mean', 'population'])
def test_inference_modes(bn_mode):
    layer = layer_in_float64(bn_mode=bn_mode).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(1, 3)
    x = torch.randn(4, 5, 3, 6, dtype=torch.float64)
    expected = reference(
        x, layer.weight, layer.bias,
        mean=None if bn_mode == 'batch' else layer.running_mean,
        value_range=layer.running_range if bn_mode == 'population' else None,
    )
    before = layer.running_mean.clone(), layer.running_var.clone()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.running_mean, before[0]) and torch.equal(layer.running_var, before[1])


def test_running_averages():
    layer = RobustNorm2d(3, momentum=0.3).train()
    x = torch.randn(8, 3, 5, 5)
    layer(x)
    values = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, 0.3 * values.mean(1))
    torch.testing.assert_close(layer.running_range, 0.7 + 0.3 * (values.amax(1) - values.amin(1)))


def test_constant_channel_is_finite():
    layer = RobustNorm2d(2).train()
    nn.init.constant_(layer.bias, 0.5)
    x = torch.randn(4, 2, 3, 3)
    x[:, 1] = 7.
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y[:, 1], torch.full_like(y[:, 1], 0.5))
    gradient, = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_keeps_dtype_and_statistics(dtype):
    layer = RobustNorm2d(3).train()
    x = torch.randn(8, 3, 16, 16)
    wanted = RobustNorm2d(3).train()(x)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.02)
    # the mean of 2048 values, taken in low precision, would be off by more
    torch.testing.assert_close(layer.running_mean, 0.1 * x.to(dtype).float().mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_meta_device_script_and_compile():
    meta = RobustNorm2d(3, device='meta')
    assert meta(torch.empty(2, 3, 4, 4, device='meta')).shape == (2, 3, 4, 4)
    x = torch.randn(4, 3, 5, 5)
    for bn_mode in ('batch', 'mean', 'population'):
        layer = RobustNorm2d(3, bn_mode=bn_mode).eval()
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
        compiled = torch.compile(layer, backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))


def test_single_image_warns_once_and_single_value_is_refused():
    layer = RobustNorm2d(3, bn_mode='batch').eval()
    with pytest.warns(UserWarning, match='batch of one image'):
        layer(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        RobustNorm2d(3).train()(torch.randn(1, 3, 1, 1))
    with pytest.raises(ValueError, match='bn_mode'):
        RobustNorm2d(3, bn_mode='sample')
    with pytest.raises(ValueError, match='power'):
        RobustNorm2d(3, power=2.)


@pytest.mark.parametrize('convert', [
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
    lambda model: convert_splitbn_model(model, 2),
    nn.SyncBatchNorm.convert_sync_batchnorm,
])
def test_converters_of_batch_norm_leave_it_alone(convert):
    model = convert(nn.Sequential(RobustNorm2d(3), RobustNormAct2d(3), nn.BatchNorm2d(3)))
    assert type(model[0]) is RobustNorm2d and type(model[1]) is RobustNormAct2d
    assert type(model[2]) is not nn.BatchNorm2d, 'the converter did nothing at all'


def test_batch_norm_twin_differs_only_in_the_norm():
    robust = timm.create_model('robustnorm_resnet20_cifar')
    twin = timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d')
    assert any(isinstance(m, RobustNorm2d) for m in robust.modules())
    assert not any(isinstance(m, RobustNorm2d) for m in twin.modules())
    assert {n: p.shape for n, p in robust.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}


def test_predictions_depend_on_the_batch_only_in_batch_modes():
    model = timm.create_model('robustnorm_resnet20_cifar').eval()
    x = torch.randn(6, 3, 32, 32)
    for bn_mode, depends in (('population', False), ('mean', True), ('batch', True)):
        set_bn_mode(model, bn_mode)
        with torch.no_grad():
            together = model(x)[:3]
            apart = model(x[:3])
        assert torch.allclose(together, apart, atol=1e-5) is not depends, bn_mode


SYNC_SCRIPT = """
import torch, torch.distributed as dist
from timm.utils import distribute_bn
from timm_robust.layers import RobustNorm2d, sync_norm_statistics
dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(0)
x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
upstream = torch.randn_like(x)
whole = RobustNorm2d(3, dtype=torch.float64).train()
x_whole = x.clone().requires_grad_()
(whole(x_whole) * upstream).sum().backward()
own = slice(0, 2) if rank == 0 else slice(2, 6)
layer = sync_norm_statistics(RobustNorm2d(3, dtype=torch.float64).train())
x_own = x[own].clone().requires_grad_()
y = layer(x_own)
(y * upstream[own]).sum().backward()
torch.testing.assert_close(y, whole(x)[own])
torch.testing.assert_close(x_own.grad, x_whole.grad[own])
torch.testing.assert_close(layer.running_range, 0.9 + 0.1 * (x.amax((0, 2, 3)) - x.amin((0, 2, 3))))
plain = RobustNorm2d(3).train()
plain(torch.full((2, 3, 4, 4), float(rank)))
distribute_bn(plain, 2, reduce=True)
torch.testing.assert_close(plain.running_mean, torch.full((3,), 0.05))
del y  # its graph holds the process group, which must not outlive itself
dist.barrier()
dist.destroy_process_group()
print('fine', rank)
"""


def test_statistics_shared_between_processes(tmp_path):
    assert run_distributed(SYNC_SCRIPT, tmp_path).count('fine') == 2
