"""Data that is not what it is taken for is refused before a network sees it."""
import io
import os
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
from helpers import make_image_folder
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import FakeData

from timm_robust.data import (
    check_classes,
    check_images,
    check_labels,
    check_split,
    class_names,
    dataset_labels,
    image_channels,
    is_grey,
    listed_indices,
)
from timm_robust.errors import InputError


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), per_class=3)


def folder(root, split='train', **kwargs):
    return create_dataset('', root=str(root), split=split, **kwargs)


def test_folder(root):
    dataset = folder(root)
    assert dataset_labels(dataset).tolist() == [0, 0, 0, 1, 1, 1] and class_names(dataset) == ['a', 'b']
    assert image_channels(dataset) is None and not is_grey(dataset)
    assert len(set(check_images(dataset))) == 6
    check_labels(dataset, folder(root, 'validation'), num_classes=2)


def test_archives_are_read_too(root, tmp_path):
    broken = shutil.copytree(root, tmp_path / 'copy') / 'train' / 'b' / '1.png'
    hashes = {}
    for name in ('whole', 'broken'):
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as archive:
            archive.add(tmp_path / 'copy' / 'train', arcname='.')
        broken.write_bytes(broken.read_bytes()[:200])
        dataset = create_dataset('', root=str(tmp_path / f'{name}.tar'), split='train')
        assert len(dataset) == 6 and class_names(dataset) == ['a', 'b']
        assert dataset_labels(dataset).tolist() == [0, 0, 0, 1, 1, 1] and not is_grey(dataset)
        hashes[name] = check_images(dataset, [0, 1, 2, 3])
    assert hashes['whole'] == hashes['broken'] == check_images(folder(root), [0, 1, 2, 3])
    with pytest.raises(InputError, match='unreadable image.*b/1.png'):
        check_images(dataset)


def test_torch_data_set():
    dataset = FakeData(size=4, image_size=(1, 8, 8))
    dataset.targets = [0, 1, 2, 7]
    assert dataset_labels(dataset).tolist() == [0, 1, 2, 7] and class_names(dataset) is None
    with pytest.raises(InputError, match='num_classes=5: the training data has 8 classes; pass `num_classes=8`'):
        check_labels(dataset, None, num_classes=5)
    with pytest.raises(InputError, match='num_classes=10: the training data has 8 classes; pass `num_classes=8`'):
        check_labels(dataset, None, num_classes=10)
    with pytest.raises(InputError, match='the data has no images of class 3 and 3 more'):
        check_labels(dataset, None, num_classes=8)
    assert len(set(check_images(dataset))) == 4


def test_only_the_images_that_count_are_read(root, tmp_path):
    broken = make_image_folder(tmp_path, per_class=3) / 'train' / 'b' / '2.png'
    broken.write_bytes(b'no image')
    dataset = folder(tmp_path)
    check_images(dataset, [0, 1, 2, 3])
    with pytest.raises(InputError, match='b/2.png'):
        check_images(dataset, [5])


def bomb(path):
    """A PNG whose header promises 50,000 x 50,000 pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 50_000, 50_000, 8, 2, 0, 0, 0))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', b'') + chunk(b'IEND', b''))


def truncated_jpeg(path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    whole = io.BytesIO()
    image.save(whole, 'JPEG')
    path.write_bytes(whole.getvalue()[:len(whole.getvalue()) // 3])


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def grey16(path):
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path)


def floats(path):
    Image.fromarray(np.zeros((32, 32), np.float32)).save(path, 'TIFF')


@pytest.mark.timeout(60)
@pytest.mark.parametrize('spoil, words', [
    (truncated_jpeg, 'unreadable image {}'), (bomb, 'unreadable image {}'), (pipe, 'unreadable image {}'),
    (grey16, 'image {} has mode I;16, not 8-bit RGB or grey'), (floats, 'image {} has mode F, not 8-bit'),
    (lambda path: path.write_bytes(b''), 'unreadable image {}')])
def test_images_that_timm_would_replace_or_bleach(tmp_path, spoil, words):
    path = make_image_folder(tmp_path, per_class=3) / 'train' / 'a' / '1.png'
    spoil(path)
    with pytest.raises(InputError) as caught:
        check_images(folder(tmp_path))
    assert words.format(path) in str(caught.value)
    assert not is_grey(folder(tmp_path))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_images_of_eight_bits_are_welcome(tmp_path, mode):
    path = make_image_folder(tmp_path, per_class=3) / 'train' / 'a' / '1.png'
    Image.new('RGB', (8, 8), 'red').convert(mode if mode != 'LA' else 'L').convert(mode).save(
        path, 'JPEG' if mode == 'CMYK' else 'PNG')
    assert len(check_images(folder(tmp_path))) == 6


def test_hashes_are_of_content(root, tmp_path):
    own = shutil.copytree(root, tmp_path / 'own')
    before = check_images(folder(own))
    os.rename(own / 'train' / 'a' / '0.png', own / 'train' / 'a' / 'swap.png')
    os.rename(own / 'train' / 'a' / '1.png', own / 'train' / 'a' / '0.png')
    os.rename(own / 'train' / 'a' / 'swap.png', own / 'train' / 'a' / '1.png')
    after = check_images(folder(own))
    assert after == [before[1], before[0], *before[2:]]


@pytest.fixture
def ten(tmp_path):
    return make_image_folder(tmp_path / 'ten', splits=('test',), classes=CLASSES, per_class=2)


CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


def emptied(root, name):
    for path in (root / name).iterdir():
        path.unlink()


def only_webp(root):
    for path in (root / 'cat').iterdir():
        path.rename(path.with_suffix('.webp'))


@pytest.mark.parametrize('spoil, words', [
    (lambda root: shutil.rmtree(root / 'cat'), 'the data has 9 classes, but the network has 10'),
    (lambda root: emptied(root, 'cat'), 'cat has no readable images (.png, .jpg, .jpeg)'),
    (lambda root: only_webp(root), 'cat has no readable images'),
    (lambda root: (root / 'extra').mkdir(), 'extra has no readable images'),
    (lambda root: (root / 'airplane').rename(root / 'plane'), "class 0 of the data is 'automobile', but 'airplane'"),
    (lambda root: [p.rename(p.with_name(str(i + 1))) for i, p in enumerate(sorted(root.iterdir()))],
     "class 0 of the data is '1', but 'airplane' in the network"),
])
def test_classes_that_are_not_those_of_the_network(ten, spoil, words):
    assert check_classes(folder(ten, 'test'), 10, CLASSES, allow_mismatch=False) == ''
    spoil(ten / 'test')
    dataset = folder(ten, 'test')
    with pytest.raises(InputError) as caught:
        check_classes(dataset, 10, CLASSES, allow_mismatch=False)
    assert words in str(caught.value) and '`allow_class_mismatch`' in str(caught.value)
    assert words in check_classes(dataset, 10, CLASSES, allow_mismatch=True)
    with pytest.raises(InputError) as caught:
        check_classes(dataset, 10, CLASSES)
    assert words in str(caught.value) and 'allow' not in str(caught.value)


def test_a_class_folder_is_no_data_set(ten):
    with pytest.raises(InputError, match='holds images directly; give its parent'):
        check_classes(folder(ten / 'test' / 'cat', 'test'), 10)
    (ten / 'test' / 'cat' / '0.png').rename(ten / 'test' / '0.png')
    with pytest.raises(InputError, match='holds images directly; give its parent'):
        check_classes(folder(ten, 'test'), 10, allow_mismatch=True)


def test_more_classes_than_the_network_has_are_never_allowed(ten):
    with pytest.raises(InputError, match='the data has 10 classes, but the network has 9'):
        check_classes(folder(ten, 'test'), 9, allow_mismatch=True)


def test_a_class_map_gives_classes_their_index(ten, tmp_path):
    shutil.rmtree(ten / 'test' / 'cat')
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES))
    dataset = folder(ten, 'test', class_map=str(tmp_path / 'map.txt'))
    assert class_names(dataset) == list(CLASSES) and dataset_labels(dataset)[6] == 4
    with pytest.raises(InputError, match="the data has no images of class 'cat'"):
        check_classes(dataset, 10, CLASSES)
    assert check_classes(dataset, 10, CLASSES, allow_mismatch=True) == "the data has no images of class 'cat'"


def test_empty_folders_that_are_no_classes(ten):
    (ten / 'test' / '.thumbnails').mkdir()
    (ten / 'test' / 'cat' / 'old').mkdir()
    assert check_classes(folder(ten, 'test'), 10, CLASSES) == ''


def test_a_split_that_does_not_exist(root, tmp_path):
    for split in ('test', 'tarin', 'validaton'):
        with pytest.raises(InputError, match=f'{split}.*has no such folder; choose one of train, validation'):
            check_split(folder(root, split), split)
    for split in ('train', 'training', 'val', 'validation'):
        check_split(folder(root, split), split)  # timm's synonyms
    check_split(folder(root / 'train', 'validation'), 'validation')  # the classes themselves
    folds = make_image_folder(tmp_path, splits=('fold1', 'fold2'), per_class=2)
    with pytest.raises(InputError, match='choose one of fold1, fold2'):
        check_split(folder(folds, 'validation'), 'validation')


def test_training_on_other_classes_than_the_network_has(root, tmp_path):
    with pytest.raises(InputError, match='num_classes=10: the training data has 2 classes; pass `num_classes=2`'):
        check_labels(folder(root), None, num_classes=10)
    own = make_image_folder(tmp_path, per_class=2)
    with pytest.raises(InputError, match='would be both training and validation data'):
        check_labels(folder(own / 'train', 'train'), folder(own / 'train', 'validation'), num_classes=2)
    (own / 'validation' / 'b').rename(own / 'validation' / 'A')
    with pytest.raises(InputError, match="val_split: validation lacks class 'b'"):
        check_labels(folder(own), folder(own, 'validation'), num_classes=2)


@pytest.mark.parametrize('names, words', [
    ('a/0.png\nb/1.png\na/0.png', 'names the image a/0.png twice'),
    ('a/0.png\n0.png', '0.png names more than one image'),
    ('a/9.png', 'a/9.png is not in the data set'),
    ('\n', 'names no image')])
def test_lists_of_images(root, tmp_path, names, words):
    (tmp_path / 'list.txt').write_text('b/2.png\na/1.png\n')
    assert listed_indices(folder(root), str(tmp_path / 'list.txt'), None) == [5, 1]
    (tmp_path / 'list.txt').write_text(names)
    with pytest.raises(InputError) as caught:
        listed_indices(folder(root), str(tmp_path / 'list.txt'), None)
    assert words in str(caught.value)
    (tmp_path / 'list.txt').write_bytes(b'\xff\xfe\xfd')
    with pytest.raises(InputError, match='cannot be read as a list of image names'):
        listed_indices(folder(root), str(tmp_path / 'list.txt'), None)
