import copy

import pytest
import timm
import torch
import torch.nn as nn
from helpers import run_distributed
from timm.layers import ScaledStdConv2d
from timm.utils import ModelEmaV3

from timm_robust.layers import cached_weights
from timm_robust.layers import weight_standardization as module


@pytest.fixture
def model():
    return timm.create_model('nofrost_resnet20_cifar', num_classes=4).eval()


@pytest.fixture
def count(monkeypatch):
    """How often a weight was standardized for the cache."""
    calls = []
    own = module.standardized_weight
    monkeypatch.setattr(module, 'standardized_weight', lambda conv: calls.append(conv) or own(conv))
    return calls


def convs(model):
    return [m for m in model.modules() if isinstance(m, ScaledStdConv2d)]


@pytest.mark.parametrize(
    'name', ['nofrost_resnet20_cifar', 'nf_resnet26', 'nfnet_f0', 'resnetv2_50', 'resnetv2_50x1_bit'])
def test_results_are_bit_equal(name, count):
    kwargs = {'num_classes': 3} if name.startswith('no') else {'num_classes': 3, 'pretrained': False}
    model = timm.create_model(name, **kwargs).eval().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    wanted = model(x)
    gradient, = torch.autograd.grad(wanted.logsumexp(1).sum(), x)
    with cached_weights(model):
        for _ in range(3):
            y = model(x)
            own, = torch.autograd.grad(y.logsumexp(1).sum(), x)
            assert torch.equal(y, wanted) and torch.equal(own, gradient)
    assert len(count) == len(set(count)) and (name == 'resnetv2_50' or len(count) > 15)
    assert all('forward' not in m.__dict__ for m in model.modules())


def spoil(model):
    """Weights that are others in every layer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * .1)
    return other


CHANGES = {
    'optimizer': lambda model, other: [
        torch.optim.SGD([p], lr=1.).step() for p, q in zip(model.parameters(), other.parameters())
        if setattr(p, 'grad', p.detach() - q.detach()) is None],
    'load': lambda model, other: model.load_state_dict(other.state_dict()),
    'swap': lambda model, other: [
        setattr(p, 'data', q.data) for p, q in zip(model.parameters(), other.parameters())],
    'average': lambda model, other: [
        p.lerp_(q, 1.) for p, q in zip(model.state_dict().values(), other.state_dict().values())],
    'double': lambda model, other: (model.load_state_dict(other.state_dict()), model.double(), other.double()),
}


@pytest.mark.parametrize('change', CHANGES)
def test_no_weight_is_stale(model, change):
    other = spoil(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), cached_weights(model):
        before = [model(x) for _ in range(3)][-1]
        CHANGES[change](model, other)
        x = x.to(next(model.parameters()).dtype)
        after = model(x)
        torch.testing.assert_close(after, other(x))
    assert not torch.allclose(before.double(), after.double())


def noise_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * .1)


def noise_by_assignment(model):
    for p in model.parameters():
        p.data = p.data + torch.randn_like(p) * .1


def noise_behind_the_back(model):
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * .1)


def noise_as_other_parameters(model):
    for m in convs(model):
        m.weight = nn.Parameter(m.weight + torch.randn_like(m.weight) * .1, requires_grad=False)


@pytest.mark.parametrize('noise', [
    noise_in_place, noise_by_assignment, noise_behind_the_back, noise_as_other_parameters])
def test_a_defence_by_weight_noise_computes_what_it_does_outside(model, noise):
    class Defence(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model.requires_grad_(False)

        def forward(self, x):
            state = copy.deepcopy(self.net.state_dict())
            noise(self.net)
            y = self.net(x)
            for name, p in self.net.named_parameters():
                p.data.copy_(state[name])
            return y

    defence, x = Defence(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    wanted = [defence(x) for _ in range(4)]
    torch.manual_seed(1)
    with cached_weights(defence):
        assert all(torch.equal(defence(x), w) for w in wanted)
    assert not torch.allclose(wanted[0], wanted[1])


def test_weights_called_with_are_those_used(model):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), cached_weights(model):
        for _ in range(6):  # fresh tensors, at addresses of earlier ones
            state = {n: p + torch.randn_like(p) * .1 for n, p in model.named_parameters()}
            got = torch.func.functional_call(model, state, (x,))
            other = copy.deepcopy(model)
            other.load_state_dict(state, strict=False)
            assert torch.equal(got, other(x))
            del state


def test_transforms_of_torch_func_pass_through(model, count):
    x = torch.randn(2, 3, 32, 32)
    state = {n: p.detach() for n, p in model.named_parameters()}

    def loss(state):
        return torch.func.functional_call(model, state, (x,)).logsumexp(1).sum()

    wanted = torch.func.grad(loss)(state)
    with cached_weights(model):
        got = torch.func.grad(loss)(state)
    assert all(torch.equal(got[n], wanted[n]) for n in wanted) and not count


def test_weights_made_in_inference_mode(count):
    with torch.inference_mode():
        model = timm.create_model('nofrost_resnet20_cifar', num_classes=4).eval()
        x = torch.randn(2, 3, 32, 32)
        wanted = model(x)
        with cached_weights(model):
            assert torch.equal(model(x), wanted) and torch.equal(model(x), wanted)


def test_an_average_is_cached_by_itself(model):
    average = ModelEmaV3(model, decay=.5)
    other = spoil(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), cached_weights(average):
        before = average(x)
        average.update(other, step=5)
        assert torch.equal(average(x), copy.deepcopy(average.module)(x)) and not torch.equal(average(x), before)


def test_weights_that_need_a_gradient_are_not_cached(model, count):
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with cached_weights(model):
        model(x).sum().backward()
    assert not count and all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted))


def test_nested_inference_mode_and_an_exception(model, count):
    x = torch.randn(2, 3, 32, 32)
    model.requires_grad_(False)
    with pytest.raises(KeyError), cached_weights(model):
        with cached_weights(model), torch.inference_mode():
            model(x)
        assert len(count) == len(convs(model)) and 'forward' in convs(model)[0].__dict__
        own = x.clone().requires_grad_()
        model(own).sum().backward()  # what inference mode left cannot be differentiated through
        raise KeyError
    assert all('forward' not in m.__dict__ for m in model.modules())
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_compiled_and_parallel_wrappers(model, count):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x)
        compiled = torch.compile(model, backend='eager')
        with cached_weights(compiled):
            torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(compiled(x), wanted)
        with cached_weights(nn.DataParallel(model)):
            assert 'forward' not in convs(model)[0].__dict__


DDP_SCRIPT = """
import timm, timm_robust, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from timm_robust.layers import cached_weights
dist.init_process_group('gloo')
torch.manual_seed(0)
model = timm.create_model('nofrost_resnet20_cifar', num_classes=4)
wrapped = DistributedDataParallel(model)
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    wanted = model(x)
    with cached_weights(wrapped):
        assert torch.equal(wrapped(x), wanted) and 'forward' in model.stem.conv.__dict__
wrapped(x).sum().backward()
assert all(p.grad is not None for p in model.parameters())
del wrapped
dist.destroy_process_group()
print('fine')
"""


def test_distributed(tmp_path):
    assert run_distributed(DDP_SCRIPT, tmp_path).count('fine') == 2
