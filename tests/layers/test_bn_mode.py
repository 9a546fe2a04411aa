import copy
import io
import itertools
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import state_equal
from timm.layers import BatchNormAct2d, SplitBatchNorm2d, convert_sync_batchnorm

from timm_robust.errors import InputError
from timm_robust.layers import (
    RobustNorm2d,
    RobustNormAct2d,
    convert_aux_norm,
    has_aux_norm,
    has_batch_statistics,
    plain_branch,
    replace_norm,
    set_bn_mode,
    set_gamma,
    sync_norm_statistics,
)


def filled(model):
    """A model whose statistics and parameters are not those it began with."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(.5, 2)
    return model


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, BatchNormAct2d])
def test_batch_norm_switches_to_batch_statistics_and_back(norm):
    model = nn.Sequential(filled(norm(3))).eval()
    untouched = copy.deepcopy(model)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    population = model(x)
    assert set_bn_mode(model, 'batch') is model
    assert has_batch_statistics(model) and isinstance(model[0], norm)
    expected = copy.deepcopy(untouched).train()(x)
    torch.testing.assert_close(model(x), expected)
    assert state_equal(model, untouched), 'running averages moved'
    set_bn_mode(model, 'batch')
    set_bn_mode(model, 'population')
    assert type(model[0]) is norm and not has_batch_statistics(model)
    assert torch.equal(model(x), population)


def test_switch_refuses_what_does_not_exist():
    with pytest.raises(InputError, match='choose one of batch, mean, population'):
        set_bn_mode(nn.BatchNorm2d(3), 'batches')
    with pytest.raises(InputError, match="mode='mean': BatchNorm has no such mode"):
        set_bn_mode(nn.BatchNorm2d(3), 'mean')
    with pytest.raises(InputError, match='no BatchNorm or RobustNorm layer'):
        set_bn_mode(timm.create_model('nofrost_resnet11_mnist'), 'batch')
    with pytest.raises(InputError, match='tracks no statistics'):
        set_bn_mode(nn.BatchNorm2d(3, track_running_stats=False), 'population')
    model = nn.Sequential(RobustNorm2d(3), nn.BatchNorm2d(3), SplitBatchNorm2d(3))
    with pytest.raises(InputError, match='SplitBatchNorm2d is a custom BatchNorm'):
        set_bn_mode(model, 'batch')
    assert model[0].bn_mode == 'population' and type(model[1]) is nn.BatchNorm2d, 'half of it was done'


def test_a_bare_layer_is_returned_converted_and_shares_its_tensors():
    layer = nn.BatchNorm2d(3).eval()
    switched = set_bn_mode(layer, 'batch')
    assert type(layer) is nn.BatchNorm2d and switched is not layer and switched.running_mean is layer.running_mean
    twins = convert_aux_norm(layer)
    assert twins.weight is layer.weight and twins.aux.weight is not layer.weight and not hasattr(layer, 'aux')
    with pytest.raises(InputError, match='BatchModeBatchNorm2d uses batch statistics'):
        convert_aux_norm(switched)
    robust = RobustNorm2d(3)
    assert set_bn_mode(robust, 'mean') is robust and robust.bn_mode == 'mean'


def test_parameters_hooks_and_a_second_place_survive_a_conversion():
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    parameters, calls = list(model.parameters()), []
    handle = shared.register_forward_hook(lambda *_: calls.append(1))
    for mode in ('batch', 'population', 'batch'):
        set_bn_mode(model, mode)
        assert model[0] is model[2] and all(p is q for p, q in zip(parameters, model.parameters()))
    model(torch.randn(2, 3, 4, 4))
    assert len(calls) == 2
    handle.remove()
    model(torch.randn(2, 3, 4, 4))
    assert len(calls) == 2
    sync_norm_statistics(model)
    assert model[0] is model[2] and all(p is q for p, q in zip(parameters, model.parameters()))


MODES = {
    'population': lambda m: set_bn_mode(m, 'population'),
    'batch': lambda m: set_bn_mode(m, 'batch'),
    'mean': lambda m: set_bn_mode(m, 'mean'),
    'twins': lambda m: set_gamma(convert_aux_norm(m), .25),
    'sync': sync_norm_statistics,
    'sync batch': lambda m: sync_norm_statistics(set_bn_mode(m, 'batch')),
    'sync twins': lambda m: sync_norm_statistics(set_gamma(convert_aux_norm(m), 1)),
}


class OneDimension(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Flatten(), nn.BatchNorm1d(3 * 16 * 16)

    def forward(self, x):
        return self.norm(self.stem(x))


NETWORKS = {
    'BatchNorm1d': OneDimension,
    'BatchNorm2d': lambda: timm.create_model('resnet10t', num_classes=3),
    'BatchNorm3d': lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.BatchNorm3d(1)),
    'BatchNormAct2d': lambda: timm.create_model('test_efficientnet', num_classes=3),
    'RobustNorm2d': lambda: timm.create_model('robustnorm_resnet20_cifar', num_classes=3),
    'RobustNormAct2d': lambda: replace_norm(timm.create_model('test_efficientnet', num_classes=3)),
}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('network', NETWORKS)
def test_models_pickle_copy_and_save_whole_in_every_mode(network, mode):
    model = filled(NETWORKS[network]()).eval()
    if ('Robust' in network) == ('twins' in mode) or mode == 'mean' and 'Robust' not in network:
        if mode == 'mean' or 'twins' in mode:
            with pytest.raises(InputError):
                MODES[mode](model)
            return
    model = MODES[mode](model)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(again(x), wanted) and state_equal(again, model)
            assert has_batch_statistics(again) == (mode in ('batch', 'mean', 'sync batch'))
            assert {type(m) for m in again.modules()} == {type(m) for m in model.modules()}


class Expected:
    """What a model of one layer should be after some switches, or that a switch must be refused."""

    def __init__(self, layer):
        self.robust, self.mode, self.twin, self.sync, self.gamma = False, 'population', False, False, 0.
        self.main = {k: v.clone() for k, v in layer.state_dict().items()}
        self.act = F.silu if hasattr(layer, 'act') else lambda x: x

    def switch(self, name):
        """Follow a switch; returns False if it must be refused."""
        if name in ('batch', 'mean', 'population'):
            if name == 'batch' and self.twin or name == 'mean' and not self.robust:
                return False
            self.mode = name
        elif name == 'twins':
            if self.robust or self.mode == 'batch' and not self.twin:
                return False
            if not self.twin:
                self.twin, self.gamma = {k: v.clone() for k, v in self.main.items()}, 0.
        elif name == 'gamma':
            if not self.twin:
                return False
            self.gamma = .25
        elif name in ('main', 'aux'):
            if not self.twin:
                return False
            self.main, self.twin, self.gamma = self.twin if name == 'aux' else self.main, False, 0.
        elif name in ('robust', 'batchnorm'):
            if self.robust == (name == 'robust') or self.twin or (name == 'batchnorm' and self.mode == 'mean'):
                return False
            self.robust = not self.robust
            self.main['running_var'] = torch.ones_like(self.main['running_var'])
        else:
            self.sync = True
        return True

    def _normalize(self, x, weights, training):
        mean, var, weight, bias = (weights[k] for k in ('running_mean', 'running_var', 'weight', 'bias'))
        if not self.robust:
            by_batch = training or self.mode == 'batch'
            return F.batch_norm(x, *((None, None) if by_batch else (mean, var)), weight, bias, by_batch)
        if training or self.mode != 'population':
            mean = mean if self.mode == 'mean' and not training else x.mean((0, 2, 3))
            var = x.amax((0, 2, 3)) - x.amin((0, 2, 3))
        of_channel = [t.view(1, -1, 1, 1) for t in (mean, weight / (var ** .2 + 1e-5), bias)]
        return (x - of_channel[0]) * of_channel[1] + of_channel[2]

    def __call__(self, x, training=False):
        y = self._normalize(x, self.main, training)
        if self.twin:
            y = torch.lerp(y, self._normalize(x, self.twin, training), self.gamma)
        return self.act(y)


def unlike(model):
    """Twins that differ."""
    for name, tensor in model.state_dict().items():
        if '.aux.' in name and tensor.is_floating_point():
            tensor.mul_(1.5)
    return model


SWITCHES = {
    'batch': lambda m: set_bn_mode(m, 'batch'),
    'mean': lambda m: set_bn_mode(m, 'mean'),
    'population': lambda m: set_bn_mode(m, 'population'),
    'twins': convert_aux_norm,
    'gamma': lambda m: set_gamma(m, .25),
    'main': lambda m: plain_branch(m, 'main'),
    'aux': lambda m: plain_branch(m, 'aux'),
    'robust': replace_norm,
    'batchnorm': lambda m: replace_norm(m, nn.BatchNorm2d, source=(RobustNorm2d,)),
    'sync': sync_norm_statistics,
}


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('first', SWITCHES)
def test_every_order_of_switches_ends_in_the_right_network_or_is_refused(fused, first):
    norm = partial(BatchNormAct2d, act_layer='silu') if fused else nn.BatchNorm2d
    x = torch.randn(4, 3, 5, 5)
    for rest in itertools.product(SWITCHES, repeat=2):
        torch.manual_seed(0)
        model = nn.Sequential(filled(norm(3))).eval()
        expected = Expected(model[0])
        for name in (first, *rest):
            before = model(x)
            if expected.switch(name):
                had_twins = has_aux_norm(model)
                model = SWITCHES[name](model)
                if has_aux_norm(model) and not had_twins:
                    unlike(model)
                    for key in expected.twin:
                        expected.twin[key] = model[0].aux.state_dict()[key].clone()
            else:
                with pytest.raises(InputError):
                    SWITCHES[name](model)
                assert torch.equal(model(x), before)
            torch.testing.assert_close(model(x), expected(x), msg=f'{first}, {rest} at {name}')
        assert has_batch_statistics(model) == (expected.mode != 'population')
        layer = model[0]
        if expected.robust:
            assert type(layer) is (RobustNormAct2d if fused else RobustNorm2d)
            assert layer.sync == expected.sync
        else:
            assert isinstance(layer, nn.SyncBatchNorm) == expected.sync
            assert not expected.twin or isinstance(layer.aux, nn.SyncBatchNorm) == expected.sync
        if expected.gamma != .25:
            torch.testing.assert_close(copy.deepcopy(model).train()(x), expected(x, training=True))


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, BatchNormAct2d])
def test_converters_that_would_forget_a_mode_are_refused(norm, convert):
    for model in (set_bn_mode(nn.Sequential(norm(3)), 'batch'), convert_aux_norm(nn.Sequential(norm(3)))):
        with pytest.raises(InputError, match='would lose its mode in a conversion; synchronize it with'):
            convert(model)
    convert(set_bn_mode(set_bn_mode(nn.Sequential(norm(3)), 'batch'), 'population'))


def test_batch_mode_takes_part_in_training_and_compiles():
    model = set_bn_mode(nn.Sequential(nn.BatchNorm2d(3)), 'batch').train()
    x = torch.randn(4, 3, 5, 5) + 3
    model(x)
    torch.testing.assert_close(model[0].running_mean, .1 * x.mean((0, 2, 3)))
    compiled = torch.compile(model.eval(), backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
