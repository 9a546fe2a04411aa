"""The weights that travel in the package."""
import csv
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from timm.data import create_dataset, create_transform
from timm.utils import natural_key

import timm_robust  # noqa: F401
from timm_robust.data import balanced_indices
from timm_robust.evaluation import read_reports
from timm_robust.inputs import weights_sha256
from timm_robust.models import NormalizedModel
from timm_robust.models._build import WEIGHTS_DIR

CARDS = Path(__file__).parents[2] / 'hub_cards'
NAMES = sorted(p.stem for p in WEIGHTS_DIR.glob('*.safetensors'))
CIFAR10 = [n for n in NAMES if n.endswith('_cifar10')]
MAX_BYTES = {  # float32, as they were measured; rounded to float16 they need AutoAttack again
    'nofrost_nfnet18_cifar.madry_linf8_cifar10': 10 ** 7, 'nofrost_nfnet18_cifar.nofrost_linf8_cifar10': 10 ** 7,
    'nofrost_resnet26.nofrost_linf4_imagenette': 3 * 10 ** 7}


def facts(name):
    return json.loads((WEIGHTS_DIR / f'{name}.json').read_text())


def measured(name):
    return read_reports(WEIGHTS_DIR / f'{name}.json')[0][1]


@pytest.mark.parametrize('name', NAMES)
def test_they_are_those_that_were_measured(name, monkeypatch):
    monkeypatch.setattr('socket.socket.connect', lambda *args: pytest.fail('the network was asked'))
    assert (WEIGHTS_DIR / f'{name}.safetensors').stat().st_size <= MAX_BYTES.get(name, 5 * 10 ** 6)
    model, config = timm.create_model(name, pretrained=True), json.loads((CARDS / name / 'config.json').read_text())
    assert weights_sha256(model) == facts(name)['weights_sha256'] == config['weights_sha256']
    assert list(model.pretrained_cfg['label_names']) == config['label_names']
    assert facts(name) == json.loads((CARDS / name / 'results.json').read_text())


@pytest.fixture
def open_images(request, tmp_path):
    """Opens the test images of the data that a model was measured on."""
    def opened(name):
        data = facts(name)['data_names'][0]
        if data == 'Fashion-MNIST':
            folder = request.getfixturevalue('fashion_mnist_dir')
            return create_dataset('torch/fashion_mnist', root=str(folder), split='test')
        fixture, split = {
            'CIFAR-10': ('cifar10_archive', 'test'), 'Imagenette (128x128 copy)': ('imagenette_archive', 'val')}[data]
        with tarfile.open(request.getfixturevalue(fixture)) as tar:
            tar.extractall(tmp_path, [m for m in tar if f'{split}/' in m.name], filter='data')
        return create_dataset('', root=str(tmp_path), split=split)

    return opened


def log(name):
    """args.yaml and summary.csv of the run that made some weights."""
    folder = CARDS.parent / 'train_scripts' / 'reproduce' / 'logs' / name
    with open(folder / 'summary.csv') as file:
        return yaml.safe_load((folder / 'args.yaml').read_text()), [*csv.DictReader(file)]


@pytest.mark.parametrize('name', NAMES)
def test_no_test_image_chose_the_epoch(name):
    trained, epochs = log(name)
    metric, text = f"eval_{trained['eval_metric']}", (CARDS / name / 'README.md').read_text()
    best = max(epochs, key=lambda row: float(row[metric]))  # the first of equals, as in training
    images = next(n for data, n in (('cifar10', 50_000), ('fashion_mnist', 60_000), ('imagenette', 9_469))
                  if name.endswith(data))
    held_out = round(images * trained['val_fraction'])
    count = trained['robust_eval_samples'] if 'robust' in metric else held_out
    assert 0 < count <= held_out and trained['train_split'] == 'train'
    assert f"epoch {best['epoch']} " in text and f'{float(best[metric]):.1f} %, on {count:,} images held out' in text
    assert measured(name).data.split == ('val' if name.endswith('imagenette') else 'test')


def test_which_images_chose_the_epoch(cifar10_archive):
    """The log that names them is of the run that the recipe of the weights compares itself with."""
    (trained, _), (named, _) = log('nofrost_nfnet18_cifar.madry_linf8_cifar10'), log('cifar10/nofrost_nfnet18_awp')
    with tarfile.open(cifar10_archive) as tar:
        names = sorted((m.name.removeprefix('train/') for m in tar if m.isfile() and m.name.startswith('train/')),
                       key=natural_key)
    classes = [n.split('/')[0] for n in names]
    count = round(trained['val_fraction'] * len(names))
    held = balanced_indices(np.unique(classes, return_inverse=True)[1], len(names), count, trained['seed'])
    content = json.dumps([len(names), [names[i] for i in sorted(held)]])
    assert named['val_images'] == f'1000 {hashlib.sha256(content.encode()).hexdigest()}'


@pytest.mark.parametrize('name', CIFAR10)
def test_they_were_measured_on_the_balanced_choice_of_images(name):
    # the classes of CIFAR-10 are equally large, and a folder of images is read class by class
    data, labels = measured(name).data, np.repeat(np.arange(10), 1000)
    assert list(data.indices) == balanced_indices(labels, 10000, data.num_examples, measured(name).settings.seed)
    assert list(data.labels) == labels[list(data.indices)].tolist()


@pytest.mark.parametrize('name', NAMES)
def test_they_classify_as_was_written_down(name, open_images):
    report = measured(name)
    dataset = open_images(name)
    assert len(dataset) == report.data.num_images
    size = report.model.input_size
    dataset.transform = create_transform(
        size, crop_pct=report.model.crop_pct, mean=(0.,) * size[0], std=(1.,) * size[0])
    pictures, labels = zip(*(dataset[i] for i in report.data.indices[:200]))
    model = NormalizedModel(timm.create_model(name, pretrained=True)).eval()
    with torch.no_grad():
        right = (model(torch.stack(pictures)).argmax(1) == torch.tensor(labels)).tolist()
    assert tuple(right) == report['clean'].correct[:200]
