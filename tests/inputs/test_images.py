"""The images that are evaluated are those that were chosen, with their own labels."""
import dataclasses
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import make_image_folder
from PIL import Image
from timm.data import create_transform
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


def test_a_file_that_a_link_shows_twice_is_not_counted_twice(root, network):
    (root / 'test' / 'b' / 'up').symlink_to('..')
    with pytest.raises(InputError, match='is the same file as another image; remove the link'):
        open_images(config(root), network)
    (root / 'test' / 'b' / 'up').unlink()
    (root / 'test' / 'b').rename(root / 'elsewhere')
    (root / 'test' / 'b').symlink_to(root / 'elsewhere')
    assert len(open_images(config(root), network)) == 20


def test_an_image_under_two_labels_is_recorded(root, network):
    shutil.copy(root / 'test' / 'c' / '1.png', root / 'test' / 'a' / '3.png')
    shutil.copy(root / 'test' / 'b' / '0.png', root / 'test' / 'b' / '1.png')
    images = open_images(config(root), network)
    pair = [str(root / 'test' / name) for name in ('a/3.png', 'c/1.png')]
    assert images.mismatch.startswith('1 images also occur under another label, ')
    assert all(path in images.mismatch for path in pair)
    assert not open_images(config(root, subset=str(listed(root, 'a/3.png'))), network).mismatch


def listed(root, *names):
    path = root / 'subset.txt'
    path.write_text('\n'.join(names))
    return path


@pytest.mark.parametrize('split', ['/', '../data/test', 'test/', '..', '.'])
def test_a_split_is_a_name(root, network, split):
    with pytest.raises(InputError, match='split=.*leads out of the data'):
        open_images(config(root, split=split), network)


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
    with pytest.raises(InputError, match='the loader delivers wrong labels for images 0 to 2'):
        images.first(20)


def test_grey_of_sixteen_bits_is_refused_by_name_not_as_grey(root, network):
    for path in (root / 'test').rglob('*.png'):
        Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path)
    with pytest.raises(InputError, match='has mode I;16, not 8-bit RGB or grey'):
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
    with pytest.raises(InputError, match="class 0 of the data is '1', but 'airplane' in the network"):
        open_images(config(numbers), network)
    images = open_images(config(numbers, allow_class_mismatch=True), network)
    assert images.mismatch == "class 0 of the data is '1', but 'airplane' in the network"
    with pytest.raises(InputError, match='holds images directly'):
        open_images(config(good / 'test' / 'cat'), network)


def test_synsets_are_those_of_imagenet(tmp_path, network):
    wide = dataclasses.replace(network, model=timm.create_model('resnet10t'), checkpoint=None)
    few = make_image_folder(tmp_path, splits=('test',), classes=[f'n0{i}' + '0' * 6 for i in range(4)], per_class=2)
    with pytest.raises(InputError, match='the data has 4 classes, but the network has 1000'):
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


@pytest.mark.parametrize('crop_pct, crop_mode, interpolation', [
    (.5, 'center', 'bilinear'), (.8, 'squash', 'bicubic'), (.8, 'border', 'nearest')])
def test_images_are_prepared_as_the_network_wants_them(tmp_path, network, crop_pct, crop_mode, interpolation):
    folder = tmp_path / 'test'
    for index, name in enumerate('abcd'):
        (folder / name).mkdir(parents=True)
        pixels = np.random.default_rng(index).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / '0.png')
    wanted = dict(input_size=(3, 24, 32), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    prepared = dataclasses.replace(network, preprocessing={**network.preprocessing, **wanted})
    images = open_images(config(tmp_path), prepared)
    x, y = images.first(4)
    transform = create_transform(**wanted, mean=(0.,) * 3, std=(1.,) * 3)
    for pixels, label in zip(x, y):
        torch.testing.assert_close(pixels, transform(Image.open(folder / 'abcd'[label] / '0.png')))
    assert len({len(b) for b, _ in images.loader()}) == 2  # batches of three, and the rest


def test_single_images_for_a_network_that_normalizes_by_the_batch(root, tmp_path):
    path = tmp_path / 'r.pth'
    torch.save(timm.create_model('robustnorm_resnet20_cifar', num_classes=4).state_dict(), path)
    batch = build_network(NetworkConfig(
        model='robustnorm_resnet20_cifar', num_classes=4, checkpoint=str(path), bn_mode='batch', device='cpu'))
    with pytest.raises(InputError, match="batch_size=1: .* use a larger batch or `bn_mode='population'`"):
        open_images(config(root, batch_size=1), batch)
    assert len(open_images(config(root, batch_size=2), batch)) == 20


def test_a_published_list_is_kept_in_its_order(root, network, tmp_path):
    (tmp_path / 'list.txt').write_text('c/4.png\na/2.png\nd/0.png\n')
    images = open_images(config(root, subset=str(tmp_path / 'list.txt'), num_examples=2), network)
    assert images.indices == [14, 2] and images.first(2)[1].tolist() == [2, 0]
