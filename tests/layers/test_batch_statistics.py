import copy
import random
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from helpers import TinyNet, state_equal
from timm.layers import EvoNorm2dB0, EvoNorm2dS0, SplitBatchNorm2d

from timm_robust.layers import batch_statistics, has_batch_statistics, set_bn_mode


@pytest.fixture
def no_passes(monkeypatch):
    """No network may be tried out."""
    monkeypatch.delattr(batch_statistics, '_measure')


def test_networks_of_timm_and_this_package_are_known(no_passes):
    nofrost = timm.create_model('nofrost_resnet11_mnist')
    robust = timm.create_model('robustnorm_resnet20_cifar')
    assert not has_batch_statistics(nofrost, training=True)
    assert has_batch_statistics(robust, training=True) and not has_batch_statistics(robust)
    assert has_batch_statistics(set_bn_mode(robust, 'mean'))
    for name in ('test_vit', 'test_convnext', 'test_nfnet', 'test_byobnet'):
        batch_norm = name == 'test_byobnet'
        model = timm.create_model(name)
        assert not has_batch_statistics(model) and has_batch_statistics(model, training=True) == batch_norm, name
    for norm in (nn.GroupNorm(1, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4, track_running_stats=True), EvoNorm2dS0(32)):
        assert not has_batch_statistics(norm, training=True)
    assert has_batch_statistics(EvoNorm2dB0(4), training=True) and not has_batch_statistics(EvoNorm2dB0(4))
    assert has_batch_statistics(SplitBatchNorm2d(4), training=True) and not has_batch_statistics(SplitBatchNorm2d(4))
    assert has_batch_statistics(nn.BatchNorm2d(3, track_running_stats=False))
    assert not has_batch_statistics(TinyNet()), 'a container is nothing to try out without images'


class CentredNorm(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class OwnImageNorm(nn.Module):
    """Normalizes each image, with some noise."""
    noise = 0.

    def forward(self, x):
        return x / x.std((1, 2, 3), keepdim=True) + self.noise * torch.randn_like(x)


class NoisyNorm(OwnImageNorm):
    noise = .1


class UnseededNorm(OwnImageNorm):
    """Noise that no seed of torch repeats."""

    def forward(self, x):
        return super().forward(x) * random.uniform(.5, 2)


class OwnBatchNorm(nn.BatchNorm2d):
    """Another BatchNorm, by its base class."""

    def forward(self, x):
        mean = x.mean((0, 2, 3)) if self.training else self.running_mean
        self.running_mean += .5 * (mean - self.running_mean)
        return x - mean.view(1, -1, 1, 1)


class Unnamed(nn.Module):
    """Another BatchNorm, by its running statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer('running_median', torch.zeros(8))

    def forward(self, x):
        return x - x.median()


@pytest.mark.parametrize('norm, at_inference, in_training', [
    (CentredNorm, True, True), (OwnImageNorm, False, False), (NoisyNorm, False, False),
    (UnseededNorm, False, False),
    (lambda: OwnBatchNorm(8), False, True), (Unnamed, True, True)])
def test_layers_from_elsewhere_are_tried_out(norm, at_inference, in_training):
    model = TinyNet(drop=.5)
    model.norm = norm()
    before, images = copy.deepcopy(model), torch.randn(1, 3, 8, 8)
    generator = torch.get_rng_state()
    assert has_batch_statistics(model) is at_inference
    assert has_batch_statistics(model, training=True) is in_training
    assert has_batch_statistics(model, images=images) is at_inference
    assert state_equal(model, before) and model.training and model.norm.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_with_images_any_module_from_elsewhere_is_tried_out():
    class Wrapper(TinyNet):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    images = torch.randn(6, 3, 8, 8)
    assert has_batch_statistics(Wrapper(), images=images) and not has_batch_statistics(TinyNet(), images=images)
    scripted = torch.jit.script(TinyNet(norm=True))
    assert has_batch_statistics(scripted, training=True) and not has_batch_statistics(scripted)


def test_a_network_that_takes_no_usual_images_is_taken_to_mix_them():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 2), OwnImageNorm())
    with pytest.warns(UserWarning, match='OwnImageNorm could not be tested and is assumed to use batch statistics'):
        assert has_batch_statistics(model)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), OwnImageNorm())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not has_batch_statistics(model)
