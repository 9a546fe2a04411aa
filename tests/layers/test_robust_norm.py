import copy

import pytest
import timm
import torch
import torch.nn as nn
from helpers import run_distributed, state_equal
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d

from timm_robust.errors import InputError
from timm_robust.layers import RobustNorm2d, RobustNormAct2d, replace_norm, set_bn_mode
from timm_robust.layers.range_norm import normalize_by_batch


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


def test_meta_device():
    meta = RobustNorm2d(3, device='meta')
    assert meta(torch.empty(2, 3, 4, 4, device='meta')).shape == (2, 3, 4, 4)


LAYERS = pytest.mark.parametrize('norm', [RobustNorm2d, RobustNormAct2d])
MODES = pytest.mark.parametrize('bn_mode', ['training', 'batch', 'mean', 'population'])


def layer_in(bn_mode, norm=RobustNorm2d):
    layer = norm(3, **({} if bn_mode == 'training' else {'bn_mode': bn_mode})).train(bn_mode == 'training')
    for tensor in layer.state_dict().values():
        tensor.uniform_(.5, 2)
    return layer


@MODES
@LAYERS
@pytest.mark.parametrize('convert', [
    torch.jit.script,
    lambda layer: torch.fx.symbolic_trace(nn.Sequential(layer)),
    lambda layer: torch.compile(layer, backend='eager', fullgraph=True),
], ids=['script', 'fx', 'compile'])
def test_script_plain_trace_and_compile(convert, norm, bn_mode):
    layer = layer_in(bn_mode, norm)
    converted = convert(copy.deepcopy(layer))
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(converted(x), layer(x))
        for own, other in zip(layer.buffers(), converted.buffers()):
            torch.testing.assert_close(own, other)


@pytest.mark.parametrize('convert', [lambda f: f, torch.jit.script], ids=['plain', 'script'])
def test_statistics_of_the_batch_have_no_gradient(convert):
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y, mean, value_range = convert(normalize_by_batch)(x, None, None, None, .2, 1e-5)
    assert [t.requires_grad for t in (y, mean, value_range)] == [True, False, False]


def test_a_whole_network_is_traced():
    model = replace_norm(timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d')).eval()
    x = torch.randn(2, 3, 32, 32)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    assert sum('robust_norm' in str(node.target) for node in traced.graph.nodes) > 15


@MODES
@LAYERS
@pytest.mark.parametrize('shape', [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_comes_of_nothing(norm, bn_mode, shape):
    layer, x = layer_in(bn_mode, norm), torch.empty(shape, requires_grad=True)
    before = copy.deepcopy(layer)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and state_equal(layer, before)
    assert all(torch.equal(p.grad, torch.zeros(3)) for p in layer.parameters())


@MODES
def test_transforms_of_torch_func(bn_mode):
    layer = layer_in(bn_mode)
    x, tangent = torch.randn(2, 4, 3, 5, 5)
    point = x.clone().requires_grad_()
    wanted = torch.autograd.grad(copy.deepcopy(layer)(point).pow(3).sum(), point)

    def loss(parameters, buffers, x):
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).pow(3).sum()

    state = dict(layer.named_parameters()), {n: b.clone() for n, b in layer.named_buffers()}
    of_parameters, of_input = torch.func.grad(loss, argnums=(0, 2))(*state, x)
    torch.testing.assert_close(of_input, wanted[0])
    if bn_mode == 'training':
        layer(x)
        for name, value in state[1].items():
            torch.testing.assert_close(value, layer.get_buffer(name))
        return
    _, along = torch.func.jvp(lambda x: layer(x).pow(3).sum(), (x,), (tangent,))
    torch.testing.assert_close(along, (wanted[0] * tangent).sum())
    both = torch.func.vmap(layer)(torch.stack([x, tangent]))
    torch.testing.assert_close(both, torch.stack([layer(x), layer(tangent)]))


@MODES
@pytest.mark.parametrize('shape', [(4, 3, 5, 6), (4, 3, 1, 1), (4, 1, 5, 5)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_gradients_on_a_gpu_are_those_on_the_cpu(memory_format, shape, bn_mode):
    layer = layer_in(bn_mode)
    layer = RobustNorm2d(shape[1], bn_mode=layer.bn_mode).train(layer.training)
    x, upstream = torch.randn(2, *shape)
    results = []
    for device in ('cpu', 'cuda'):
        own = copy.deepcopy(layer).to(device)
        point = x.to(device).contiguous(memory_format=memory_format).requires_grad_()
        y = own(point)
        results.append([y, *torch.autograd.grad((y * upstream.to(device)).sum(), [point, *own.parameters()])])
    for on_cpu, on_gpu in zip(*results):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('shape', [(2, 3, 5), (3, 3), (2, 3, 4, 4, 4)])
def test_only_images_are_normalized(training, shape):
    for layer in (RobustNorm2d(3).train(training), torch.jit.script(RobustNorm2d(3).train(training))):
        with pytest.raises((InputError, torch.jit.Error), match='Expected an input of shape'):
            layer(torch.randn(shape))


def test_single_image_warns_and_single_value_is_refused():
    layer = RobustNorm2d(3, bn_mode='batch').eval()
    with pytest.warns(UserWarning, match='batch of one image'):
        layer(torch.randn(1, 3, 4, 4))
    for layer in (RobustNorm2d(3).train(), torch.jit.script(RobustNorm2d(3).train())):
        with pytest.raises((InputError, torch.jit.Error), match='more than 1 value per channel'):
            layer(torch.randn(1, 3, 1, 1))
    with pytest.raises(InputError, match="bn_mode='sample': unknown; choose one of"):
        RobustNorm2d(3, bn_mode='sample')
    with pytest.raises(InputError, match='power=2.0: must be a number in'):
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
import copy, warnings
import torch, torch.distributed as dist
warnings.simplefilter('error', FutureWarning)
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
# a process without images takes part, and so does one with a single value per channel
for sizes in ((0, 6), (6, 0)):
    whole, layer = (copy.deepcopy(n) for n in (RobustNorm2d(3, dtype=torch.float64).train(), layer))
    layer.load_state_dict(whole.state_dict())
    own = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], 6)
    x_whole, x_own = x.clone().requires_grad_(), x[own].clone().requires_grad_()
    torch.testing.assert_close(layer(x_own), whole(x_whole)[own])
    (whole(x_whole) * upstream).sum().backward()
    (layer(x_own) * upstream[own]).sum().backward()
    torch.testing.assert_close(x_own.grad, x_whole.grad[own])
    torch.testing.assert_close(layer.running_range, whole.running_range)
layer(x[rank:rank + 1, :, :1, :1])
# the gradient can be differentiated again
own = slice(0, 2) if rank == 0 else slice(2, 6)
def penalty(layer, x):
    x = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]
torch.testing.assert_close(penalty(layer, x[own]), penalty(whole, x)[own])
# one process's infinity is an infinite range for all, as in one batch
x_inf = x.clone(); x_inf[0, 1, 0, 0] = float('inf')
whole.load_state_dict(layer.state_dict())
layer(x_inf[own]), whole(x_inf)
assert torch.isinf(layer.running_range[1]) and torch.equal(layer.running_range, whole.running_range)
plain = RobustNorm2d(3).train()
plain(torch.full((2, 3, 4, 4), float(rank)))
distribute_bn(plain, 2, reduce=True)
torch.testing.assert_close(plain.running_mean, torch.full((3,), 0.05))
del y, x_own  # graphs hold the process group, which must not outlive itself
dist.barrier()
dist.destroy_process_group()
print('fine', rank)
"""


def test_statistics_shared_between_processes(tmp_path):
    assert run_distributed(SYNC_SCRIPT, tmp_path).count('fine') == 2
