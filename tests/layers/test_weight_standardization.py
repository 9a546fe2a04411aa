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
        before = model(x)
        CHANGES[change](model, other)
        x = x.to(next(model.parameters()).dtype)
        after = model(x)
        torch.testing.assert_close(after, other(x))
    assert not torch.allclose(before.double(), after.double())


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
