"""What is exported loads in timm as the same network, and says what its classes are."""
import json
import os

import pytest
import timm
import torch
from timm.data import ImageNetInfo

from timm_robust.errors import InputError
from timm_robust.inputs import NetworkConfig, build_network, export_model, weights_sha256
from timm_robust.inputs.weights import logits_of_fixed_input

PREPROCESSING = dict(
    input_size=(3, 40, 40), interpolation='bilinear', mean=(.1, .2, .3), std=(.4, .5, .6), crop_pct=.9,
    crop_mode='squash')


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('nofrost_resnet20_cifar', num_classes=4, act_layer='silu', global_pool='max').eval()


def test_the_same_network_in_timm(tmp_path, model):
    export_model(
        model, tmp_path / 'x', preprocessing=PREPROCESSING, class_names=list('abcd'), pretrained_cfg={'tag': 'mine'})
    config = json.loads((tmp_path / 'x' / 'config.json').read_text())
    assert config['weights_sha256'] == weights_sha256(model) and config['label_names'] == list('abcd')
    assert config['num_classes'] == 4 and 'num_classes' not in config['model_args']  # transformers passes it twice
    assert config['model_args']['act_layer'] == 'silu' and config['pretrained_cfg']['tag'] == 'mine'
    assert sorted(os.listdir(tmp_path / 'x')) == ['config.json', 'model.safetensors']
    again = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    torch.testing.assert_close(again(torch.ones(1, 3, 40, 40)), model(torch.ones(1, 3, 40, 40)))
    found = build_network(NetworkConfig(model=str(tmp_path / 'x'), device='cpu'))
    assert found.preprocessing == PREPROCESSING and found.class_names() == list('abcd')
    assert torch.equal(logits_of_fixed_input(found.model), logits_of_fixed_input(again))


def test_names_of_other_weights_are_not_kept(tmp_path):
    pretrained = timm.create_model('nofrost_resnet20_cifar', pretrained=True)
    assert pretrained.pretrained_cfg['label_names'][0] == 'airplane'
    export_model(pretrained, tmp_path, preprocessing=PREPROCESSING)
    assert build_network(NetworkConfig(model=str(tmp_path), device='cpu')).class_names() is None


def test_synsets_are_shown_as_what_they_are_and_known_again(tmp_path):
    synsets = ['n01440764', 'n02102040', 'n02979186', 'n03000684']
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=4)
    export_model(model, tmp_path, preprocessing=PREPROCESSING, class_names=synsets)
    shown = json.loads((tmp_path / 'config.json').read_text())['label_names']
    assert shown[0] == 'tench, Tinca tinca' and shown[3] == 'chain saw, chainsaw'
    network = build_network(NetworkConfig(model=str(tmp_path), device='cpu'))
    assert network.class_names(synsets) == synsets
    assert network.class_names() == shown == network.class_names(synsets[::-1])
    # timm and transformers know the names of all 1,000 by their number
    everything = ImageNetInfo('imagenet-1k').label_names()
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=1000)
    export_model(model, tmp_path, preprocessing=PREPROCESSING, class_names=everything)
    assert 'label_names' not in json.loads((tmp_path / 'config.json').read_text())
    network = build_network(NetworkConfig(model=str(tmp_path), device='cpu'))
    assert network.class_names(everything) == everything


def test_a_bit_that_flipped_is_seen(tmp_path, model):
    export_model(model, tmp_path, preprocessing=PREPROCESSING)
    path = tmp_path / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match='its weights do not match its config'):
        build_network(NetworkConfig(model=str(tmp_path), device='cpu'))


def test_a_write_that_fails_leaves_no_config(tmp_path, model, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('timm_robust.inputs.weights.write_bytes', full)
    with pytest.raises(OSError, match='No space'):
        export_model(model, tmp_path / 'x', preprocessing=PREPROCESSING)
    assert not os.listdir(tmp_path / 'x')
