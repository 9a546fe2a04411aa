"""The network that answers is the one whose weights and settings were named, or nothing is evaluated."""
import copy
import json
import shutil
import time

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from timm_robust.errors import InputError
from timm_robust.inputs import NetworkConfig, build_network, build_surrogate, create_network, weights_sha256
from timm_robust.inputs.weights import logits_of_fixed_input
from timm_robust.layers import convert_aux_norm, plain_branch, set_gamma
from timm_robust.models._build import CIFAR10_MEAN, CIFAR10_STD

PACKAGED = 'nofrost_resnet20_cifar'
CIFAR10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def network(**settings):
    return build_network(NetworkConfig(device='cpu', **settings))


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(4)
    return timm.create_model('nofrost_resnet11_mnist', num_classes=4, in_chans=3).eval()


@pytest.fixture
def export(tmp_path, model):
    folder = tmp_path / 'export'
    save_for_hf(
        model, str(folder), safe_serialization=True, model_config={
            'weights_sha256': weights_sha256(model), 'pretrained_cfg': {'tag': 'x'}, 'label_names': list('abcd')},
        data_config={'input_size': (3, 32, 32), 'mean': (.1, .2, .3), 'std': (.4, .5, .6)})
    return folder


def edited(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    for key, value in changes.items():
        place = config['pretrained_cfg'] if key in ('mean', 'std', 'interpolation', 'input_size') else config
        if value is None:
            place.pop(key)
        else:
            place[key] = value
    (folder / 'config.json').write_text(json.dumps(config))


def refused(*words, **settings):
    with pytest.raises(InputError) as caught:
        network(**settings)
    text = str(caught.value)
    assert '\n' not in text and all(word in text for word in words), text


def test_an_exported_folder_is_a_model_with_or_without_local_dir(export, model):
    for name in (str(export), f'local-dir:{export}'):
        found = network(model=name)
        assert found.weights_sha256 == weights_sha256(model) and found.class_names() == list('abcd')
        assert found.preprocessing['mean'] == (.1, .2, .3) and found.preprocessing['input_size'] == (3, 32, 32)
        x = torch.rand(2, 3, 32, 32)
        wanted = model((x - torch.tensor([.1, .2, .3]).view(3, 1, 1)) / torch.tensor([.4, .5, .6]).view(3, 1, 1))
        torch.testing.assert_close(found.pixel_model(x), wanted)
        assert not found.pixel_model.training


def test_folders_and_names_that_are_no_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'resnet10t').mkdir()  # timm's name wins
    refused("model='run'", 'is a folder without config.json; give the folder export/', model='run')
    refused('pretrained', model='nofrost_resnet11_mnist')
    refused("model='resnet5000'", 'Unknown model', 'timm.list_models()', model='resnet5000')
    refused('local-dir:nowhere', 'config.json cannot be read', 'No such file', model='local-dir:nowhere')
    assert create_network(NetworkConfig(model='resnet10t', num_classes=3), pretrained=False).num_classes == 3


def test_a_dropped_head_is_never_evaluated():
    refused('num_classes=12: the pretrained weights have 10 classes, not 12', model=PACKAGED, num_classes=12)
    refused('in_chans=1: the pretrained weights have 3 input channels, not 1', model=PACKAGED, in_chans=1)
    assert network(model=PACKAGED, num_classes=10, in_chans=3).num_classes == 10
    adapted = create_network(NetworkConfig(model=PACKAGED, num_classes=12), pretrained=True, adapt=True)
    assert adapted.num_classes == 12


@pytest.mark.parametrize('edit, words', [
    (dict(num_classes=12), ('the pretrained weights have 12 classes, not 4',)),
    (dict(num_classes=12, model_args={}), ('12',)),
    (dict(weights_sha256='0' * 64), ('its weights do not match its config (000000000000)',)),
    (dict(weights_sha256=7), ('its config.json has 7 as weights_sha256',)),
    (dict(architecture=None), ('its config.json names no architecture',)),
    (dict(pretrained_cfg=3), ('its config.json names no architecture',)),
    (dict(mean=['a', 'b', 'c']), ("its config.json has ['a', 'b', 'c'] as mean",)),
    (dict(mean='.5'), ("its config.json has '.5' as mean",)),
    (dict(std=[0, 0, 0]), ('must be above 0',)),
    (dict(num_classes='4'), ("its config.json has '4' as num_classes",)),
    (dict(mean=[.5, .5]), ('its config.json has 2 numbers as mean, for 3 channels',)),
])
def test_a_config_that_was_edited(export, edit, words):
    edited(export, **edit)
    refused(str(export), *words, model=str(export)) if 'std' not in edit else refused(*words, model=str(export))


@pytest.mark.parametrize('edit, words', [
    (dict(interpolation='foo'), "interpolation='foo': unknown"),
    (dict(input_size=[3, 0, 32]), 'input_size=0: must be a whole number of at least 1'),
])
def test_preprocessing_that_a_config_cannot_mean(export, edit, words):
    edited(export, **edit)
    refused(words, model=str(export))


def test_names_of_classes_that_are_none(export):
    edited(export, label_names=7)
    assert network(model=str(export)).class_names() is None


def test_a_config_that_is_null(export):
    (export / 'config.json').write_text('null')
    refused('must hold a JSON mapping', model=str(export))


@pytest.mark.parametrize('adapt', [False, True])
def test_other_weights_in_whatever_file(export, adapt):
    weights = {k: v + .01 for k, v in load_file(export / 'model.safetensors').items()}
    (export / 'model.safetensors').unlink()
    torch.save(weights, export / 'pytorch_model.bin')
    refused('its weights do not match its config', model=str(export))
    config = NetworkConfig(model=str(export), num_classes=7 if adapt else None)
    with pytest.raises(InputError, match='its weights do not match its config'):
        create_network(config, pretrained=True, adapt=True)  # as training does


def test_a_new_head_on_right_weights_may_be_trained(export):
    found = create_network(NetworkConfig(model=str(export), num_classes=7), pretrained=True, adapt=True)
    assert found.num_classes == 7


def test_a_surrogate_goes_through_the_same_checks(export, model):
    attacked = network(model=str(export))
    other = export.parent / 'other'
    shutil.copytree(export, other)
    assert build_surrogate(str(other), attacked).weights_sha256 == attacked.weights_sha256
    save_file({k: v + .01 for k, v in load_file(other / 'model.safetensors').items()}, other / 'model.safetensors')

    def fails(match, name, path=''):
        with pytest.raises(InputError, match=match):
            build_surrogate(name, attacked, path)

    fails('^surrogate=.*its weights do not match its config', str(other))
    fails('^surrogate_checkpoint=.nowhere.*no such file', 'nofrost_resnet11_mnist', 'nowhere')
    fails('has 10 classes, but the model has 4', PACKAGED)
    torch.save(timm.create_model('resnet10t', num_classes=4).state_dict(), export.parent / 's.pth')
    fails('surrogate_checkpoint=.*check `surrogate`, `num_classes`', 'nofrost_resnet11_mnist',
          str(export.parent / 's.pth'))
    fails(r'takes .3, 48, 48. images, but the model takes .3, 32, 32.; give both the same `input_size`',
          'nofrost_resnet11_mnist', checkpoint(export.parent, model, class_names=None))
    edited(export, label_names=list('abdc'))
    shutil.rmtree(other)
    shutil.copytree(export, other)
    fails('has different classes from the model, or in a different order', str(other))


RUN = dict(num_classes=4, in_chans=3, img_size=48, mean=[.1, .2, .3], std=[.4, .5, .6], crop_pct=.5,
           interpolation='bilinear', crop_mode='squash', gp=None, model_kwargs={}, lr=.1, class_names=list('wxyz'))


def checkpoint(tmp_path, model, **run):
    torch.save({'state_dict': model.state_dict(), 'args': {**RUN, **run}}, tmp_path / 'last.pth.tar')
    return str(tmp_path / 'last.pth.tar')


def test_a_checkpoint_brings_the_settings_of_its_run(tmp_path, model):
    found = network(model='nofrost_resnet11_mnist', checkpoint=checkpoint(tmp_path, model))
    assert found.preprocessing == dict(
        input_size=(3, 48, 48), mean=(.1, .2, .3), std=(.4, .5, .6), crop_pct=.5, interpolation='bilinear',
        crop_mode='squash')
    assert found.class_names() == list('wxyz') and found.num_classes == 4
    x = torch.rand(2, 3, 48, 48)
    wanted = model((x - torch.tensor([.1, .2, .3]).view(3, 1, 1)) / torch.tensor([.4, .5, .6]).view(3, 1, 1))
    torch.testing.assert_close(found.pixel_model(x), wanted)
    told = network(
        model='nofrost_resnet11_mnist', checkpoint=checkpoint(tmp_path, model), input_size=(3, 32, 32), mean=(.5,))
    assert told.preprocessing['input_size'] == (3, 32, 32) and told.preprocessing['mean'] == (.5, .5, .5)
    assert told.preprocessing['std'] == (.4, .5, .6)
    data_config = dict(input_size=[3, 40, 40], mean=[.7] * 3)
    found = network(model='nofrost_resnet11_mnist', checkpoint=checkpoint(
        tmp_path, model, img_size=None, mean=None, data_config=data_config))
    assert found.preprocessing['input_size'] == (3, 40, 40) and found.preprocessing['mean'] == (.7, .7, .7)


def test_averaged_weights_are_a_choice(tmp_path, model):
    other = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save({'state_dict': other, 'state_dict_ema': model.state_dict(), 'args': RUN}, tmp_path / 'x.pth')
    settings = dict(model='nofrost_resnet11_mnist', checkpoint=str(tmp_path / 'x.pth'))
    assert network(**settings).weights_sha256 == weights_sha256(model)
    assert network(**settings, use_ema=False).weights_sha256 == weights_sha256(other)


def test_a_checkpoint_brings_the_architecture_of_its_run(tmp_path):
    torch.manual_seed(0)
    kwargs = dict(norm_layer='robustnorm2d', norm_kwargs={'power': .7})
    trained = timm.create_model('robustnorm_resnet20_cifar', num_classes=4, global_pool='max', **kwargs).eval()
    for tensor in trained.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(.5, 1.)
    path = checkpoint(tmp_path, trained, model_kwargs=kwargs, gp='max', mean=None, std=None, img_size=None)
    found = network(model='robustnorm_resnet20_cifar', checkpoint=path, bn_mode='population')
    trained = network(
        model='robustnorm_resnet20_cifar', checkpoint=path, bn_mode='population', model_kwargs=kwargs, gp='max')
    other = network(
        model='robustnorm_resnet20_cifar', checkpoint=path, bn_mode='population', model_kwargs={**kwargs, **dict(
            norm_kwargs={'power': .2})}, gp='max')
    assert torch.equal(logits_of_fixed_input(found.model), logits_of_fixed_input(trained.model))
    assert not torch.equal(logits_of_fixed_input(found.model), logits_of_fixed_input(other.model))


def test_arguments_of_a_run_that_are_broken(tmp_path, model):
    refused('checkpoint=', 'the arguments of its training run are invalid', 'img_size', model='nofrost_resnet11_mnist',
            checkpoint=checkpoint(tmp_path, model, img_size='large'))


def test_weights_that_are_not_finite(tmp_path, model):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights['head.fc.bias'][1] = float('inf')
    torch.save(weights, tmp_path / 'x.pth')
    refused("x.pth': head.fc.bias is not finite", model='nofrost_resnet11_mnist', num_classes=4, in_chans=3,
            checkpoint=str(tmp_path / 'x.pth'))


def test_one_output_decides_between_two_classes(tmp_path):
    torch.manual_seed(0)
    single = timm.create_model('nofrost_resnet11_mnist', num_classes=1).eval()
    torch.save(single.state_dict(), tmp_path / 'x.pth')
    found = network(model='nofrost_resnet11_mnist', num_classes=1, checkpoint=str(tmp_path / 'x.pth'))
    x = torch.rand(5, 1, 28, 28)
    logits, z = found.pixel_model(x), single((x - found.preprocessing['mean'][0]) / found.preprocessing['std'][0])
    assert found.num_classes == 2 and logits.shape == (5, 2)
    torch.testing.assert_close(logits.softmax(1)[:, 1], z[:, 0].sigmoid())
    assert found.weights_sha256 == weights_sha256(single)


@pytest.mark.parametrize('settings, words', [
    (dict(crop_mode='sqash'), "crop_mode='sqash': unknown"),
    (dict(bn_mode='both'), "bn_mode='both': unknown"),
    (dict(gamma=1.5, checkpoint='x'), 'gamma=1.5: must be a number in [0, 1]'),
    (dict(gamma=.5), 'gamma=0.5: mixes the two BatchNorms of a training checkpoint'),
    (dict(gamma=.5, checkpoint='x', bn_mode='batch'), "bn_mode='batch': is incompatible with `gamma=0.5`"),
    (dict(use_ema='false'), "use_ema='false': must be true or false"),
    (dict(mean=['a']), "mean=['a']: must be"),
    (dict(crop_pct=0.), 'crop_pct=0.0: must be a number above 0'),
])
def test_settings_that_are_none(settings, words):
    with pytest.raises(InputError) as caught:
        NetworkConfig(**settings)
    assert words in str(caught.value)


def test_names_of_classes_by_number(model):
    assert network(model=PACKAGED).class_names() == CIFAR10
    imagenet = timm.create_model('resnet10t')
    from timm_robust.inputs.pretrained import label_names
    assert label_names(imagenet) is None and label_names(imagenet, ['cat', 'dog']) is None
    assert label_names(imagenet, ['n01440764', 'n02102040'])[1] == 'n01443537'


@pytest.mark.parametrize('name', ['resnet18', 'hf-hub:someone/model'])
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(name, caplog):
    begun = time.monotonic()
    refused(name, 'refused', model=name)  # nobody listens where the tests have their Hub
    assert time.monotonic() - begun < 5 and not caplog.records


def test_how_normalization_is_done_is_a_setting(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model('robustnorm_resnet20_cifar', num_classes=4, norm_layer='batchnorm2d')
    two = convert_aux_norm(copy.deepcopy(trained))
    for name, tensor in two.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(.5, 1.) if '.aux.' in name else tensor.uniform_(1., 2.)
    paths = [str(tmp_path / f'{name}.pth') for name in ('one', 'two')]
    for path, net in zip(paths, (trained, two)):
        torch.save(net.state_dict(), path)
    settings = dict(model='robustnorm_resnet20_cifar', num_classes=4, model_kwargs={'norm_layer': 'batchnorm2d'})
    x = torch.rand(4, 3, 32, 32)

    def logits(index, **more):
        return network(checkpoint=paths[index], **settings, **more).pixel_model(x)

    by_mode = [logits(0, bn_mode=mode) for mode in (None, 'population', 'batch')]
    assert torch.equal(by_mode[0], by_mode[1]) and not torch.equal(by_mode[1], by_mode[2])
    by_gamma = [logits(1, gamma=gamma) for gamma in (0, .3, 1)]
    branches = [plain_branch(two, name).eval() for name in ('main', 'aux')]
    normalized = (x - torch.tensor(CIFAR10_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR10_STD).view(3, 1, 1)
    for found, branch in zip((by_gamma[0], by_gamma[2]), branches):
        torch.testing.assert_close(found, branch(normalized))
    torch.testing.assert_close(by_gamma[1], set_gamma(two.eval(), .3)(normalized))
    refused('no BatchNorm', model=PACKAGED, checkpoint=paths[0], gamma=.5)
    refused("bn_mode='batch': ", 'no BatchNorm or RobustNorm', model=PACKAGED, bn_mode='batch')
    refused("bn_mode='mean': ", 'BatchNorm has no such mode', checkpoint=paths[0], bn_mode='mean', **settings)


def test_a_crop_of_nothing_is_refused(tmp_path):
    model = timm.create_model('nofrost_resnet11_mnist')
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(InputError, match=r'crop_pct=1e-09: images would be resized to 2.8e\+10 pixels, above 32768'):
        build_network(NetworkConfig(
            model='nofrost_resnet11_mnist', checkpoint=str(tmp_path / 'x.pth'), crop_pct=1e-9, device='cpu'))
