import copy

import pytest
import timm
import torch
import torch.nn as nn
from helpers import state_equal
from timm.layers import BatchNormAct2d

from timm_robust.layers import RobustNorm2d, RobustNormAct2d, has_batch_statistics, replace_norm, set_bn_mode


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_byobnet', 'resnet18'])
def test_replace_norm_keeps_weights_and_names(name):
    model = timm.create_model(name, num_classes=5)
    for p in model.parameters():
        nn.init.normal_(p)
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight.requires_grad_(False)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    before = copy.deepcopy(dict(model.named_parameters()))
    converted = replace_norm(model, power=0.3)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())
    assert all(m.power == 0.3 for m in converted.modules() if isinstance(m, RobustNorm2d))
    after = dict(converted.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert [n for n, p in converted.named_parameters() if not p.requires_grad] == frozen
    converted.train()
    converted(torch.randn(2, 3, 64, 64)).sum().backward()


def test_replace_norm_keeps_fused_activation_and_goes_back():
    fused = BatchNormAct2d(4, act_layer='silu')
    nn.init.normal_(fused.weight)
    robust = replace_norm(fused)
    assert type(robust) is RobustNormAct2d and type(robust.act) is nn.SiLU
    back = replace_norm(robust, nn.BatchNorm2d, source=(RobustNorm2d,))
    assert type(back) is BatchNormAct2d and torch.equal(back.weight, fused.weight)
    x = torch.randn(4, 4, 5, 5)
    torch.testing.assert_close(back.train()(x), fused.train()(x))


def test_replace_norm_names_a_model_without_batch_norm():
    with pytest.raises(ValueError, match='model=VisionTransformer: no layer'):
        replace_norm(timm.create_model('test_vit'))


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, BatchNormAct2d])
def test_batch_norm_switches_to_batch_statistics_and_back(norm):
    layer = norm(3)
    layer.running_mean.normal_()
    layer.running_var.uniform_(1, 2)
    model = nn.Sequential(layer).eval()
    untouched = copy.deepcopy(model)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    population = model(x)
    set_bn_mode(model, 'batch')
    assert has_batch_statistics(model) and isinstance(model[0], norm)
    expected = copy.deepcopy(untouched).train()(x)
    torch.testing.assert_close(model(x), expected)
    assert state_equal(model, untouched), 'running averages moved'
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    set_bn_mode(model, 'batch')
    set_bn_mode(model, 'population')
    assert type(model[0]) is norm and not has_batch_statistics(model)
    torch.testing.assert_close(model(x), population)


def test_switch_refuses_what_does_not_exist():
    with pytest.raises(ValueError, match='choose one of batch, mean, population'):
        set_bn_mode(nn.BatchNorm2d(3), 'batches')
    with pytest.raises(ValueError, match='BatchNorm has no such mode'):
        set_bn_mode(nn.BatchNorm2d(3), 'mean')
    with pytest.raises(ValueError, match='no BatchNorm or RobustNorm layer'):
        set_bn_mode(timm.create_model('nofrost_resnet11_mnist'), 'batch')


def test_has_batch_statistics():
    nofrost = timm.create_model('nofrost_resnet11_mnist')
    robust = timm.create_model('robustnorm_resnet20_cifar')
    assert not has_batch_statistics(nofrost, training=True)
    assert has_batch_statistics(robust, training=True) and not has_batch_statistics(robust)
    assert has_batch_statistics(set_bn_mode(robust, 'mean'))
