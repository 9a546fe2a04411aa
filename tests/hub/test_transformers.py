"""What is exported and published loads in transformers, with equal logits and the names of its classes."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import WRITER
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_robust  # noqa: F401
from timm_robust.cli.main import main
from timm_robust.hub.card import read_card
from timm_robust.inputs import NetworkConfig, build_network, export_model, write_weights

transformers = pytest.importorskip('transformers', reason="pip install 'timm-robust[transformers]'")
CARDS = Path(__file__).resolve().parents[2] / 'hub_cards'


def same_network(place, model, names):
    """Equal logits from tensors, and the same class of a picture with its name and probability."""
    loaded = transformers.AutoModelForImageClassification.from_pretrained(place).eval()
    config = resolve_data_config({}, model=model)
    x = torch.rand(2, *config['input_size'])
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x))
    assert loaded.config.id2label == dict(enumerate(names))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    best, = transformers.pipeline('image-classification', model=place)(picture, top_k=1)
    with torch.no_grad():
        chances = model(create_transform(**config)(picture)[None]).softmax(1)[0]
    assert best['label'] == names[chances.argmax()]
    assert best['score'] == pytest.approx(chances.max().item(), abs=1e-6)  # softmax of float32, by two libraries


def test_an_export(tmp_path):
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=4, act_layer='silu').eval()
    names = ['a cat', 'dog', 'bird', 'ship']
    export_model(model, tmp_path, preprocessing=resolve_data_config({}, model=model), class_names=names)
    same_network(str(tmp_path), model, names)


def test_classes_of_imagenet_are_shown_as_what_they_are(tmp_path):
    synsets = ['n01440764', 'n02102040']
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=2).eval()
    export_model(model, tmp_path, preprocessing=resolve_data_config({}, model=model), class_names=synsets)
    same_network(str(tmp_path), model, ['tench, Tinca tinca', 'English springer, English springer spaniel'])
    network = build_network(NetworkConfig(model=str(tmp_path), device='cpu'))
    assert network.class_names(synsets) == synsets and network.class_names(synsets[::-1]) != synsets[::-1]


def test_all_of_imagenet(tmp_path):
    from timm.data import ImageNetInfo
    info = ImageNetInfo('imagenet-1k')
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=1000).eval()
    export_model(
        model, tmp_path, preprocessing=resolve_data_config({}, model=model), class_names=info.label_names())
    same_network(str(tmp_path), model, list(info.label_descriptions(as_dict=True).values()))
    network = build_network(NetworkConfig(model=str(tmp_path), device='cpu'))
    assert network.class_names(info.label_names()) == info.label_names()


def test_a_card_folder_and_the_hub(hub, tmp_path, monkeypatch):
    """A card of this package with its weights: from its folder, and from the Hub."""
    name = 'nofrost_resnet20_cifar.nofrost_linf8_cifar10'
    folder = shutil.copytree(CARDS / name, tmp_path / name)
    model = timm.create_model(name, pretrained=True).eval()
    write_weights(folder / 'model.safetensors', model.state_dict())
    same_network(str(folder), model, model.pretrained_cfg['label_names'])
    repo_id = read_card(folder)[0].repo_id
    monkeypatch.setenv('HF_TOKEN', WRITER)
    assert main(['push', str(folder), '--repo-id', repo_id, '--public']) == 0
    same_network(repo_id, model, model.pretrained_cfg['label_names'])
    assert timm.create_model(f'hf-hub:{repo_id}', pretrained=True).pretrained_cfg['hf_hub_id'] == repo_id
