import tarfile

import pytest
from helpers import make_image_folder
from timm.data import create_dataset
from torchvision.datasets import FakeData

from timm_robust.data import check_images, check_labels, dataset_labels, image_channels, is_grey
from timm_robust.errors import InputError


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), per_class=3)


def test_folder(root):
    dataset = create_dataset('', root=str(root), split='train')
    assert dataset_labels(dataset).tolist() == [0, 0, 0, 1, 1, 1]
    assert image_channels(dataset) is None and not is_grey(dataset)
    check_images(dataset)
    check_labels(dataset, dataset, num_classes=2)


def test_archive_is_left_to_timm(root, tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as archive:
        archive.add(root / 'train', arcname='.')
    dataset = create_dataset('', root=str(tmp_path / 'train.tar'), split='train')
    assert len(dataset) == 6
    check_images(dataset)
    assert not is_grey(dataset) and dataset_labels(dataset) is None


def test_torch_data_set():
    dataset = FakeData(size=4, image_size=(1, 8, 8))
    dataset.targets = [0, 1, 2, 7]
    assert dataset_labels(dataset).tolist() == [0, 1, 2, 7]
    with pytest.raises(InputError, match='--num-classes 5: the training data has 8 classes, pass --num-classes 8'):
        check_labels(dataset, None, num_classes=5)


def test_only_the_images_that_count_are_read(root, tmp_path):
    broken = make_image_folder(tmp_path, per_class=3) / 'train' / 'b' / '2.png'
    broken.write_bytes(b'no image')
    dataset = create_dataset('', root=str(tmp_path), split='train')
    check_images(dataset, [0, 1, 2, 3])
    with pytest.raises(InputError, match='b/2.png'):
        check_images(dataset, [5])
