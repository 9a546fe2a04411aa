import copy

import pytest
import timm
import torch
import torch.nn as nn
from helpers import TinyNet
from timm.layers import BatchNormAct2d

from timm_robust.layers import convert_aux_norm, fold_for_inference, set_bn_mode, set_gamma, sync_norm_statistics


def filled(model):
    """A model whose statistics are not those it began with."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(.1, 1)
    return model.eval()


class Network(nn.Module):
    """One convolution and its norm, for subclasses that go other ways."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), norm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class ReadsWeight(Network):
    def forward(self, x):
        return super().forward(x) * self.bn.weight.sum()


class ByKeyword(Network):
    def forward(self, x):
        return self.fc(self.bn(input=self.conv(input=x)).mean((2, 3)))


class OfTheMean(Network):
    """Leaves its norm out for dark images."""

    def forward(self, x):
        h = self.conv(x)
        return self.fc((self.bn(h) if x.mean() > .3 else h).mean((2, 3)))


class ToDict(Network):
    def forward(self, x):
        return {'logits': super().forward(x)}


def weight_norm():
    model = Network()
    model.conv = nn.utils.weight_norm(model.conv)
    return model


def spectral_norm():
    model = Network()
    model.conv = nn.utils.spectral_norm(model.conv)
    return model


def not_a_number():
    model = Network()
    nn.init.constant_(model.conv.weight, float('nan'))
    return model


x = torch.rand(4, 3, 8, 8) * .6 + .4


@pytest.mark.parametrize('make', [ReadsWeight, OfTheMean, ToDict, weight_norm, spectral_norm, not_a_number])
def test_what_cannot_be_folded_is_declined(make):
    model = make().eval()
    model(x)
    if make is not not_a_number:
        filled(model.bn)
    assert fold_for_inference(model, x) is None


@pytest.mark.parametrize('make', [
    Network, ByKeyword, lambda: Network(BatchNormAct2d), lambda: sync_norm_statistics(Network()),
    lambda: sync_norm_statistics(Network(BatchNormAct2d))])
def test_a_norm_goes_into_its_convolution(make):
    model = filled(make())
    folded = fold_for_inference(model, x)
    torch.testing.assert_close(folded(x), model(x))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_statistics_of_the_batch_are_not_folded():
    assert fold_for_inference(set_bn_mode(filled(Network()), 'batch'), x) is None


@pytest.mark.parametrize('gamma', [0, .3, 1])
def test_a_mixture_of_two_batch_norms_is_folded(gamma):
    for model in (Network(), Network(BatchNormAct2d), timm.create_model('resnet10t', num_classes=3)):
        model = filled(convert_aux_norm(model))
        set_gamma(model, gamma)
        folded = fold_for_inference(model, x)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
        set_gamma(model, 1 - gamma if gamma != .3 else .9)
        assert not torch.allclose(folded(x), model(x), rtol=1e-3)


def test_a_fold_that_is_slightly_off_is_declined(monkeypatch):
    model = filled(TinyNet(norm=True))
    own = copy.deepcopy(model)
    from timm_robust.layers import fold
    affine = fold._affine
    assert fold_for_inference(model, x) is not None
    monkeypatch.setattr(fold, '_affine', lambda norm: (affine(norm)[0] * (1 + 1e-4), affine(norm)[1]))
    assert fold_for_inference(own, x) is None
