"""The images that are evaluated are those that were chosen, with their own labels."""
import dataclasses

import numpy as np
import pytest
import timm
import torch
from helpers import make_image_folder
from PIL import Image
from torchvision.transforms.functional import to_tensor

from timm_robust.errors import InputError
from timm_robust.inputs import ImagesConfig, NetworkConfig, build_network, open_dataset, open_images
from timm_robust.inputs.images import DatasetConfig

CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'x.pth'
    torch.save(timm.create_model('nofrost_resnet11_mnist', num_classes=4, in_chans=3).state_dict(), path)
    return build_network(NetworkConfig(
        model='nofrost_resnet11_mnist', num_classes=4, in_chans=3, img_size=32, checkpoint=str(path), device='cpu'))


@pytest.fixture
def root(tmp_path):
    return make_image_folder(tmp_path / 'data', splits=('test',), classes='abcd', per_class=5)


def config(root, **settings):
    return ImagesConfig(**{**dict(data_dir=str(root), split='test', workers=0, batch_size=3), **settings})


def test_pixels_and_labels_are_those_of_the_files(root, network):
    images = open_images(config(root, num_examples=10), network, seed=1)
    assert len(images) == 10 and images.class_names == list('abcd') and not images.mismatch
    x, y = images.first(10)
    for index, pixels, label in zip(images.indices, x, y):
        folder, number = divmod(index, 5)
        wanted = to_tensor(Image.open(root / 'test' / 'abcd'[folder] / f'{number}.png'))
        assert label == folder and torch.equal(pixels, wanted)
    some = torch.cat([y for _, y in images.loader([7, 2])])
    assert torch.equal(some, y[[7, 2]])
    assert open_images(config(root, num_examples=10), network, seed=1).indices == images.indices
    assert open_images(config(root, num_examples=10), network, seed=2).indices != images.indices
    assert len(open_images(config(root), network)) == 20
    assert len(open_images(config(root), network, usual_examples=7)) == 7
    assert len(open_images(config(root), network, usual_examples=70)) == 20


def test_truncated_images_are_found_among_those_that_count(root, network):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    chosen = open_images(config(root, num_examples=8), network).indices
    for index in range(20):
        path = root / 'test' / 'abcd'[index // 5] / f'{index % 5}.png'
        if index not in chosen:
            noise.save(path, 'JPEG')
            path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 3])
    assert open_images(config(root, num_examples=8), network).indices == chosen
    with pytest.raises(InputError, match='unreadable image'):
        open_images(config(root), network)


def test_a_file_that_breaks_later_is_not_replaced_by_its_neighbour(root, network):
    images = open_images(config(root), network)
    path = root / 'test' / 'b' / '4.png'  # whose neighbour is of another class
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RuntimeError, match='Failed to load 1 consecutive samples'):
        images.first(20)


def test_labels_that_the_loader_delivers_are_compared(root, network):
    images = open_images(config(root, subset='balanced'), network)
    images.dataset.target_transform = lambda label: (label + 1) % 4
    with pytest.raises(InputError, match='of the images 0 to 2 of this evaluation the loader delivers other labels'):
        images.first(20)


def test_grey_of_sixteen_bits_is_refused_by_name_not_as_grey(root, network):
    for path in (root / 'test').rglob('*.png'):
        Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path)
    with pytest.raises(InputError, match='is of mode I;16, not 8-bit RGB or grey'):
        open_images(config(root), network)
    for path in (root / 'test').rglob('*.png'):
        Image.new('L', (32, 32), 3).save(path)
    with pytest.raises(InputError, match='in_chans=3: the images of .* are grey; pass `in_chans=1`, or `input_img'):
        open_images(config(root), network)
    assert len(open_images(config(root, input_img_mode='RGB'), network)) == 20


def test_classes_are_compared_with_those_of_packaged_weights(tmp_path):
    network = build_network(NetworkConfig(model='nofrost_resnet20_cifar', device='cpu'))
    good = make_image_folder(tmp_path / 'good', splits=('test',), classes=CIFAR10, per_class=2)
    assert len(open_images(config(good), network)) == 20
    numbers = make_image_folder(tmp_path / 'n', splits=('test',), classes=[str(i) for i in range(1, 11)], per_class=2)
    with pytest.raises(InputError, match="class 0 of the data is '1', of the network 'airplane'"):
        open_images(config(numbers), network)
    images = open_images(config(numbers, allow_class_mismatch=True), network)
    assert images.mismatch == "class 0 of the data is '1', of the network 'airplane'"
    with pytest.raises(InputError, match='holds images itself'):
        open_images(config(good / 'test' / 'cat'), network)


def test_synsets_are_those_of_imagenet(tmp_path, network):
    wide = dataclasses.replace(network, model=timm.create_model('resnet10t'), checkpoint=None)
    few = make_image_folder(tmp_path, splits=('test',), classes=[f'n0{i}' + '0' * 6 for i in range(4)], per_class=2)
    with pytest.raises(InputError, match='the data has 4 classes, the network 1000'):
        open_images(config(few), wide)


@pytest.mark.parametrize('settings, words', [
    (dict(split='tset'), "split='tset': .* has no such folder; choose one of"),
    (dict(split='validation'), "split='validation': .* has no such folder; choose one of test"),
    (dict(dataset='torch/cifar10', split='trian'), "split='trian': torch/cifar10 has no such split; choose train or"),
    (dict(dataset='torch/no_such'), "no 'test' data"),
    (dict(data_dir='nowhere'), "data_dir='nowhere': no 'test' data"),
    (dict(batch_size=0), 'batch_size=0: must be'), (dict(workers=-3), 'workers=-3: must be'),
    (dict(num_examples=True), 'num_examples=True: must be a whole number'),
    (dict(num_examples=21), 'num_examples=21: must be between 1 and 20'),
    (dict(subset='nowhere.txt'), "subset='nowhere.txt': no such file"),
])
def test_data_that_is_not_there(root, network, settings, words):
    with pytest.raises(InputError, match=words):
        open_images(config(root, **settings), network)


def test_timm_puts_no_neighbour_in_the_place_of_a_broken_image(root):
    dataset = open_dataset(DatasetConfig(data_dir=str(root)), 'test', 3)
    (root / 'test' / 'a' / '4.png').write_bytes(b'')
    with pytest.raises(RuntimeError):
        dataset[4]
