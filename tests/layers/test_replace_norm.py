import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, GroupNormAct

from timm_robust.errors import InputError
from timm_robust.layers import RobustNorm2d, RobustNormAct2d, replace_norm


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
    with pytest.raises(InputError, match='VisionTransformer has no layer of BatchNorm to replace'):
        replace_norm(timm.create_model('test_vit'))


def test_statistics_that_both_have_are_carried_over():
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=.2)
    norm.running_mean.normal_()
    norm.running_var.uniform_(2, 3)
    norm.bias.requires_grad_(False)
    robust = replace_norm(norm.eval())
    assert torch.equal(robust.running_mean, norm.running_mean) and (robust.running_range == 1).all()
    assert (robust.eps, robust.momentum, robust.training) == (1e-3, .2, False)
    assert robust.weight.requires_grad and not robust.bias.requires_grad
    back = replace_norm(robust, nn.BatchNorm2d, source=(RobustNorm2d,))
    assert torch.equal(back.running_mean, norm.running_mean) and (back.running_var == 1).all()


def test_a_layer_used_twice_is_replaced_in_both_places():
    shared = nn.BatchNorm2d(3)
    model = replace_norm(nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({'again': shared})))
    assert type(model[0]) is RobustNorm2d and model[2]['again'] is model[0]


def test_what_a_new_layer_would_change_is_refused_and_nothing_is_done():
    fused = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4))
    with pytest.raises(InputError, match='BatchNormAct2d has an activation, which InstanceNorm2d would drop'):
        replace_norm(fused, nn.InstanceNorm2d)
    assert [type(m) for m in fused] == [nn.BatchNorm2d, BatchNormAct2d]
    with pytest.raises(InputError, match='BatchNorm1d does not normalize'):
        replace_norm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3)))
    model = nn.Sequential(BatchNormAct2d(4, act_layer='silu'))
    grouped = replace_norm(model, lambda channels, momentum, affine, **kwargs: GroupNormAct(channels, 2, **kwargs))
    assert type(grouped[0]) is GroupNormAct and type(grouped[0].act) is nn.SiLU


def test_a_layer_without_tracked_statistics_goes_on_without():
    model = replace_norm(nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False))).eval()
    assert model[0].bn_mode == 'batch'
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x), copy.deepcopy(model).train()(x))
