import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import TinyNet, state_equal
from timm.layers import convert_sync_batchnorm

from timm_robust.attacks import PGD, InputSpace, Linf
from timm_robust.errors import InputError
from timm_robust.layers import (
    at_gamma,
    convert_aux_norm,
    fold_for_inference,
    has_aux_norm,
    plain_branch,
    set_bn_mode,
    set_gamma,
)
from timm_robust.tasks import MBNAT, MbnatTask, TrainingAttack, create_task

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
THREAT, STEP = Linf(8 / 255), 3 / 255


def make_task(model, **kwargs):
    attack = TrainingAttack(steps=2, step_size=STEP, random_start=False)
    return MbnatTask(model, nn.CrossEntropyLoss(), attack=attack, space=SPACE, verbose=False, **kwargs)


def batch(dtype=torch.float64):
    return SPACE.normalize(torch.rand(6, 3, 8, 8, dtype=dtype)), torch.arange(6) % 4


def different_twins(model):
    """A converted model whose auxiliary layers are not copies any more."""
    convert_aux_norm(model)
    for name, tensor in model.state_dict().items():
        if '.aux.' in name and tensor.is_floating_point():
            tensor.mul_(1.5).add_(.1)
    return model


def test_loss_gradients_and_statistics_are_those_of_two_networks_that_share_all_but_the_norms():
    model = different_twins(TinyNet(norm=True).double()).train()
    plain = {
        branch: TinyNet(norm=True).double().train() for branch in ('main', 'aux')}
    for branch, network in plain.items():
        network.load_state_dict(plain_branch(model, branch).state_dict())
    x, y = batch()
    result = make_task(model, weight=.3)(x, y)
    result['loss'].backward()
    adv = PGD(steps=2, step_size=STEP, random_start=False).craft(plain['aux'].eval(), x, y, THREAT, space=SPACE)
    plain['aux'].train()
    loss = .7 * F.cross_entropy(plain['main'](x), y) + .3 * F.cross_entropy(plain['aux'](adv), y)
    loss.backward()
    torch.testing.assert_close(result['loss'].detach(), loss.detach(), rtol=1e-12, atol=1e-12)
    for name in ('conv.weight', 'fc.bias'):
        both = sum(network.get_parameter(name).grad for network in plain.values())
        torch.testing.assert_close(model.get_parameter(name).grad, both, rtol=1e-10, atol=1e-12)
    for prefix, network in (('norm', plain['main']), ('norm.aux', plain['aux'])):
        for name in ('weight', 'bias'):
            torch.testing.assert_close(
                model.get_parameter(f'{prefix}.{name}').grad, network.norm.get_parameter(name).grad)
        for name, value in network.norm.named_buffers():
            torch.testing.assert_close(model.get_buffer(f'{prefix}.{name}'), value)
    assert result['output'].shape == (6, 4) and model.norm.gamma == 0


@pytest.mark.parametrize('name', ['resnet10t', 'robustnorm_resnet20_cifar', 'test_efficientnet'])
def test_branches_are_plain_networks_and_mix_between(name):
    kwargs = {'norm_layer': 'batchnorm2d'} if 'robustnorm' in name else {}
    plain = timm.create_model(name, num_classes=5, **kwargs).double().eval()
    model = different_twins(copy.deepcopy(plain)).eval()
    assert has_aux_norm(model) and convert_aux_norm(model) is model
    assert set(plain.state_dict()) == {k for k in model.state_dict() if '.aux.' not in k}
    x = torch.rand(2, *plain.pretrained_cfg['input_size'], dtype=torch.float64)
    outputs = {}
    for branch, gamma in (('main', 0), ('aux', 1)):
        plain.load_state_dict(plain_branch(model, branch).state_dict())
        with at_gamma(model, gamma), torch.no_grad():
            outputs[gamma] = model(x)
            torch.testing.assert_close(outputs[gamma], plain(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        mixed = set_gamma(model, .5)(x)
        near = set_gamma(model, 1 - 1e-9)(x)
    assert not torch.allclose(mixed, outputs[0]) and not torch.allclose(mixed, outputs[1])
    torch.testing.assert_close(near, outputs[1], rtol=1e-5, atol=1e-6)


def test_fused_layers_mix_as_their_plain_parts_do_also_synchronized():
    model = different_twins(timm.create_model('test_efficientnet', num_classes=5)).eval()
    synchronized = convert_sync_batchnorm(timm.create_model('test_efficientnet', num_classes=5))
    synchronized = convert_aux_norm(synchronized).eval()
    synchronized.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 64, 64)
    for gamma in (0, .5, 1):
        torch.testing.assert_close(
            set_gamma(synchronized, gamma)(x), set_gamma(model, gamma)(x), rtol=1e-3, atol=1e-4)


def test_statistics_of_the_batch_are_refused():
    model = convert_aux_norm(TinyNet(norm=True))
    with pytest.raises(ValueError, match="mode='batch': two BatchNorms"):
        set_bn_mode(model, 'batch')
    assert set_bn_mode(model, 'population') is model


def test_a_mixture_is_of_the_normalized_features():
    model = different_twins(nn.Sequential(nn.BatchNorm2d(3))).double().eval()
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    main, aux, mixed = (set_gamma(model, b)(x) for b in (0, 1, .25))
    torch.testing.assert_close(mixed, .75 * main + .25 * aux)
    model.train()
    with pytest.raises(InputError, match='mixes two BatchNorms'):
        model(x)


def test_a_folded_copy_follows_the_branch():
    model = different_twins(timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d')).eval()
    x = torch.rand(2, 3, 32, 32)
    for gamma in (0, .5, 1):
        set_gamma(model, gamma)
        folded = fold_for_inference(model, x)
        assert folded is None or torch.allclose(folded(x), model(x), atol=1e-3)


def test_crafting_leaves_no_trace():
    model = different_twins(TinyNet(norm=True)).train()
    set_gamma(model, .4)
    before = copy.deepcopy(model)
    make_task(model).craft(*batch(torch.float32))
    assert state_equal(model, before) and model.norm.gamma == .4 and model.training


def test_bad_input():
    with pytest.raises(InputError, match='no auxiliary BatchNorm'):
        make_task(TinyNet(norm=True))
    with pytest.raises(InputError, match='weight=1: leaves one'):
        make_task(convert_aux_norm(TinyNet(norm=True)), weight=1)
    with pytest.raises(InputError, match='TinyNet has no BatchNorm'):
        convert_aux_norm(TinyNet())
    with pytest.raises(InputError, match='gamma=2: must be a number in'):
        set_gamma(convert_aux_norm(TinyNet(norm=True)), 2)
    with pytest.raises(InputError, match="branch='both': unknown; choose one of main, aux"):
        plain_branch(convert_aux_norm(TinyNet(norm=True)), 'both')


def test_plain_networks_out_of_both_branches():
    model = different_twins(timm.create_model('resnet10t', num_classes=3)).eval()
    x = torch.rand(2, 3, 64, 64)
    for branch, gamma in (('main', 0), ('aux', 1)):
        plain = plain_branch(model, branch)
        assert not has_aux_norm(plain) and type(plain.bn1) is type(timm.create_model('resnet10t').bn1)
        with at_gamma(model, gamma), torch.no_grad():
            assert torch.equal(plain(x), model(x))
    assert has_aux_norm(model)


def test_settings_prepare_the_network_and_build_the_task():
    model = MBNAT(gamma=.25).prepare_model(TinyNet(norm=True))
    task = create_task(MBNAT(gamma=.25), model, attack=TrainingAttack(steps=1), space=SPACE, verbose=False)
    assert type(task) is MbnatTask and model.norm.gamma == .25 and task.weight == .5
    task(*batch(torch.float32))['loss'].backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(InputError, match="objective='mbnat': TinyNet has no BatchNorm"):
        MBNAT().prepare_model(TinyNet())


@pytest.mark.parametrize('kwargs,message', [
    (dict(gamma=2.), 'gamma=2.0: must be a number in'),
    (dict(weight=1.), 'weight=1.0: leaves one of the two BatchNorms untrained'),
    (dict(weight=0.), 'weight=0.0: leaves one of the two BatchNorms untrained'),
])
def test_bad_settings(kwargs, message):
    with pytest.raises(InputError, match=message):
        MBNAT(**kwargs)
