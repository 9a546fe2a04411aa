"""The weights that travel in the package."""
import json
import tarfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import create_dataset, create_transform

import timm_robust  # noqa: F401
from timm_robust.data import balanced_indices, dataset_labels
from timm_robust.evaluation import read_reports
from timm_robust.inputs import weights_sha256
from timm_robust.models import NormalizedModel
from timm_robust.models._build import WEIGHTS_DIR

CARDS = Path(__file__).parents[2] / 'hub_cards'
NAMES = sorted(p.stem for p in WEIGHTS_DIR.glob('*.safetensors'))


def facts(name):
    return json.loads((WEIGHTS_DIR / f'{name}.json').read_text())


def measured(name):
    return read_reports(WEIGHTS_DIR / f'{name}.json')[0][1]


@pytest.mark.parametrize('name', NAMES)
def test_they_are_those_that_were_measured(name, monkeypatch):
    monkeypatch.setattr('socket.socket.connect', lambda *args: pytest.fail('the network was asked'))
    assert (WEIGHTS_DIR / f'{name}.safetensors').stat().st_size <= 5 * 10 ** 6
    assert weights_sha256(timm.create_model(name, pretrained=True)) == facts(name)['weights_sha256']
    assert facts(name) == json.loads((CARDS / name / 'results.json').read_text())


@pytest.fixture
def open_images(request, tmp_path):
    """Opens the test images of the data that the tag of a model ends in."""
    def opened(name):
        if name.endswith('fashion_mnist'):
            folder = request.getfixturevalue('fashion_mnist_dir')
            return create_dataset('torch/fashion_mnist', root=str(folder), split='test')
        assert name.endswith('cifar10')
        with tarfile.open(request.getfixturevalue('cifar10_archive')) as tar:
            tar.extractall(tmp_path, [m for m in tar if m.name.startswith('test/')], filter='data')
        return create_dataset('', root=str(tmp_path), split='test')

    return opened


@pytest.mark.parametrize('name', [n for n in NAMES if n.startswith('nofrost_nfnet18_cifar.')])
def test_overlap_with_the_images_that_chose_the_epoch(name, open_images):
    logs = CARDS.parent / 'train_scripts' / 'reproduce' / 'logs'
    trained = yaml.safe_load((logs / name / 'args.yaml').read_text())
    labels = dataset_labels(open_images(name))
    chosen = balanced_indices(labels, len(labels), trained['robust_eval_samples'], trained['seed'])
    overlap = len({*chosen} & {*measured(name).data.indices})
    assert f'of which {overlap} are among the images above' in (CARDS / name / 'README.md').read_text()
    assert f'{overlap} of the 400 below are among those' in (CARDS.parent / 'README.md').read_text()


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
