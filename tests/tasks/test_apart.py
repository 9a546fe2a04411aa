import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import TinyNet, run_distributed

from timm_robust.errors import InputError
from timm_robust.layers import NormPerturbation
from timm_robust.tasks import APART, ApartTask, create_task


def batch(n=8, dtype=torch.float64):
    return torch.randn(n, 3, 8, 8, dtype=dtype), torch.arange(n) % 4


def small_net(dtype=torch.float64):
    """Two BatchNorms whose tracked statistics say something."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Tanh(),
        nn.Flatten(), nn.Linear(80, 4)).to(dtype).train()
    for norm in (model[1], model[4]):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, .5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor, std=.5)
    return model


def by_hand(norm, x, d_mean, d_var, groups, whole):
    """APART's layer as the paper writes it, image by image in groups; statistics of the batch or of each group."""
    shift = norm.running_mean / (norm.running_var + norm.eps).sqrt()
    y = torch.empty_like(x)
    for g in range(groups):
        own = x[g::groups]
        of = x if whole else own
        mean, var = of.mean((0, 2, 3), keepdim=True), of.var((0, 2, 3), unbiased=False, keepdim=True)
        normalized = (own - mean) / (var + norm.eps).sqrt()
        scale = (norm.weight * (1 + d_var[g])).view(1, -1, 1, 1)
        y[g::groups] = scale * (normalized - (d_mean[g] * shift).view(1, -1, 1, 1)) + norm.bias.view(1, -1, 1, 1)
    return y


def reference_step(model, x, y, epsilon, groups, second):
    """Two passes and two backward passes on the network written out; gradients add up in .grad."""
    d = [torch.zeros(groups, 6 if k < 2 else 5, dtype=x.dtype, requires_grad=True) for k in range(4)]

    def run(x, d, whole):
        z = by_hand(model[1], model[0](x), d[0], d[1], groups, whole)
        z = by_hand(model[4], model[3](z.relu()), d[2], d[3], groups, whole)
        return model[7](z.tanh().flatten(1))

    share = len(x) / (len(x) + second)
    first = F.cross_entropy(run(x, d, True), y)
    (share * first).backward()
    moved = [epsilon * t.grad.sign() for t in d]
    with torch.no_grad():
        model(x)  # tracks the statistics of the first pass, which the shift of the second takes
    after = F.cross_entropy(run(x[:second], moved, False), y[:second])
    ((1 - share) * after).backward()
    return first, after


@pytest.mark.parametrize('groups,ratio,second', [(1, 1., 8), (1, .5, 4), (2, 1., 8), (2, .8, 6), (4, 1., 8)])
def test_gradients_equal_two_backward_passes(groups, ratio, second):
    torch.manual_seed(groups)
    model = small_net()
    twin, original = copy.deepcopy(model), copy.deepcopy(model)
    x, y = batch()
    task = ApartTask(model, nn.CrossEntropyLoss(), epsilon=.1, groups=groups, ratio=ratio, verbose=False)
    result = task(x, y)
    result['loss'].backward()
    first, after = reference_step(twin, x, y, .1, groups, second)
    torch.testing.assert_close(result['clean_loss'], first.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result['adv_loss'], after.detach(), rtol=1e-12, atol=1e-12)
    share = 8 / (8 + second)
    torch.testing.assert_close(result['loss'].detach(), share * first.detach() + (1 - share) * after.detach())
    assert abs(first - after) > 1e-3, 'the comparison says nothing'
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)
    # running statistics are those of one plain pass over the whole batch
    original(x)
    for (name, a), b in zip(model.named_buffers(), original.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    assert all('forward' not in m.__dict__ for m in model.modules())
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(isinstance(m.weight, nn.Parameter) and m.momentum == .1 for m in (model[1], model[4]))


def test_a_forward_somebody_else_put_on_a_layer_stays():
    model = small_net()
    own = model[1].forward
    model[1].forward = lambda x: own(x)
    mine = model[1].forward
    for groups in (1, 2):
        ApartTask(model, nn.CrossEntropyLoss(), groups=groups, verbose=False)(*batch())
        assert model[1].__dict__['forward'] is mine and 'forward' not in model[4].__dict__


def test_hand_written_loop():
    model = small_net()
    twin = copy.deepcopy(model)
    x, y = batch()
    apart = NormPerturbation(model)
    with apart.clean_pass():
        loss = .5 * F.cross_entropy(model(x), y)
    loss.backward()
    apart.ascend([t.grad for t in apart.tensors], .1)
    with apart.adversarial_pass():
        loss = .5 * F.cross_entropy(model(x), y)
    loss.backward()
    reference_step(twin, x, y, .1, 1, 8)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_epsilon_zero_is_a_plain_step():
    model = TinyNet(norm=True).double().train()
    twin = copy.deepcopy(model)
    x, y = batch()
    ApartTask(model, nn.CrossEntropyLoss(), epsilon=0., verbose=False)(x, y)['loss'].backward()
    F.cross_entropy(twin(x), y).backward()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_accumulated_and_scaled_losses_scale_both_passes():
    x, y = batch()
    grads = []
    for factor in (1., 1024.):
        torch.manual_seed(0)
        model = small_net()
        (ApartTask(model, nn.CrossEntropyLoss(), verbose=False)(x, y)['loss'] * factor).backward()
        grads.append([p.grad / factor for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_share_is_not_lost_to_rounding():
    task = ApartTask(TinyNet(norm=True), ratio=.29, verbose=False)
    assert task._second_size(100) == 29


class Odd(nn.Module):
    """A layer that has no part in the output, and norms without affine parameters or without use."""

    def __init__(self):
        super().__init__()
        self.body, self.plain = TinyNet(norm=True, num_classes=6), nn.BatchNorm1d(6, affine=False)
        self.unused, self.fc, self.norm = nn.Linear(3, 3), nn.Linear(6, 4), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.fc(self.plain(self.body(x)))


def test_layers_without_a_part_and_norms_without_parameters():
    model = Odd().double().train()
    twin = copy.deepcopy(model)
    x, y = batch()
    ApartTask(model, nn.CrossEntropyLoss(), verbose=False)(x, y)['loss'].backward()
    twin(x)
    assert model.unused.weight.grad is None and model.norm.weight.grad is None and model.fc.weight.grad is not None
    assert model.plain.num_batches_tracked == 1 and model.plain.momentum == .1
    for (name, a), b in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(a, b, msg=name)


def test_float16_is_scaled_whatever_the_network_returns():
    class Float(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).float()

    found = {}
    for name in ('half', 'float'):
        torch.manual_seed(0)
        model = small_net(torch.float32)
        task = ApartTask(model if name == 'half' else Float(model), nn.CrossEntropyLoss(), verbose=False)
        task.load_task_state({'loss_scale': 65536.})
        assert task.get_task_state() == {'loss_scale': 65536.}
        x, y = batch(dtype=torch.float32)
        with torch.autocast('cpu', dtype=torch.float16):
            loss = task(x, y)['loss']
        (loss * 65536.).backward()
        assert task.loss_scale == 65536.
        found[name] = [p.grad / 65536. for p in model.parameters()]
    torch.manual_seed(0)
    model = small_net(torch.float32)
    ApartTask(model, nn.CrossEntropyLoss(), verbose=False)(*batch(dtype=torch.float32))['loss'].backward()
    for own in found.values():
        # biases before a BatchNorm have gradient zero, and noise
        for (name, p), g in zip(model.named_parameters(), own):
            assert name in ('0.bias', '3.bias') or (p.grad - g).norm() < .02 * p.grad.norm(), name


def test_second_order_is_refused():
    model = small_net()
    loss = ApartTask(model, nn.CrossEntropyLoss(), verbose=False)(*batch())['loss']
    with pytest.raises(RuntimeError, match='create_graph=True'):
        loss.backward(create_graph=True)


@pytest.mark.parametrize('name', ['resnet10t', 'robustnorm_resnet20_cifar', 'test_efficientnet'])
def test_timm_models(name):
    model = timm.create_model(name, num_classes=4).train()
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    result = ApartTask(model, nn.CrossEntropyLoss(), ratio=.5, verbose=False)(x, y)
    result['loss'].backward()
    assert torch.isfinite(result['loss']) and all(p.grad is not None for p in model.parameters())
    assert result['adv_loss'] > 0 and not result['output'].requires_grad


def test_bfloat16_autocast_keeps_every_gradient():
    model = small_net(torch.float32)
    x, y = batch(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = ApartTask(model, nn.CrossEntropyLoss(), verbose=False)(x, y)
    result['loss'].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bad_input():
    with pytest.raises(InputError, match='TinyNet has no BatchNorm'):
        ApartTask(TinyNet(), verbose=False)
    for kwargs, message in ((dict(ratio=0.), 'ratio=0'), (dict(ratio=1.5), 'ratio=1.5'),
                            (dict(epsilon=-.1), 'epsilon=-0.1'), (dict(groups=0), 'groups=0')):
        with pytest.raises(InputError, match=message):
            ApartTask(TinyNet(norm=True), verbose=False, **kwargs)
    with pytest.raises(InputError, match='groups=3 does not divide a batch of 8'):
        ApartTask(TinyNet(norm=True).double(), nn.CrossEntropyLoss(), groups=3, verbose=False)(*batch())
    with pytest.raises(InputError, match='static_graph=True'):
        ApartTask(TinyNet(norm=True), verbose=False).prepare_distributed(static_graph=True)
    with pytest.raises(InputError, match='ratio=0.2 of 8 images leaves fewer than two'):
        ApartTask(TinyNet(norm=True).double(), nn.CrossEntropyLoss(), ratio=.2, verbose=False)(*batch())
    with pytest.raises(InputError, match='groups=2: RobustNorm2d cannot be split'):
        ApartTask(timm.create_model('robustnorm_resnet20_cifar'), groups=2, verbose=False)


DDP_SCRIPT = """
import copy, torch, torch.distributed as dist
from torch import nn
from test_apart import small_net, batch
from timm_robust.tasks import ApartTask
dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(0)
model = small_net()
alone = [copy.deepcopy(model) for _ in range(2)]
x, y = batch(16)
task = ApartTask(model, nn.CrossEntropyLoss(), verbose=False)
task.prepare_distributed(device_ids=None, broadcast_buffers=True)
task(x[rank * 8:rank * 8 + 8], y[rank * 8:rank * 8 + 8])['loss'].backward()
for k, network in enumerate(alone):
    ApartTask(network, nn.CrossEntropyLoss(), verbose=False)(x[k * 8:k * 8 + 8], y[k * 8:k * 8 + 8])['loss'].backward()
for p, a, b in zip(model.parameters(), *(n.parameters() for n in alone)):
    torch.testing.assert_close(p.grad, (a.grad + b.grad) / 2, rtol=1e-10, atol=1e-12)
del task
dist.destroy_process_group()
"""


def test_two_processes_average_both_passes(tmp_path):
    run_distributed(f'import sys; sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})\n'
                    + DDP_SCRIPT, tmp_path)


def test_settings_build_the_task():
    settings = APART(epsilon=.2, groups=2, ratio=.5)
    task = create_task(settings, TinyNet(norm=True), verbose=False)
    assert type(task) is ApartTask and (task.epsilon, task.perturbation.groups, task.ratio) == (.2, 2, .5)
    with pytest.raises(InputError, match="objective='apart': TinyNet has no BatchNorm"):
        settings.prepare_model(TinyNet())


@pytest.mark.parametrize('kwargs', [dict(epsilon=-1.), dict(groups=0), dict(ratio=0.)])
def test_bad_settings(kwargs):
    with pytest.raises(InputError, match=f'{next(iter(kwargs))}='):
        APART(**kwargs)
