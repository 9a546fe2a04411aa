"""Readers of shifted data, corruptions on the fly, and what is made of the errors."""
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import make_image_folder, run_distributed
from PIL import Image

from timm_robust.cli.main import main
from timm_robust.data.corruptions import COMMON_CORRUPTIONS, CORRUPTIONS, CorruptedDataset, corrupt
from timm_robust.data.shifts import CORRUPTIONS_3D, Part, cifar_10_1, cifar_c, imagenet_c, imagenet_shift, synsets
from timm_robust.errors import InputError
from timm_robust.evaluation import EvalConfig, EvaluationReport, Journal, benchmarks, evaluate
from timm_robust.evaluation.shifts import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    BenchmarkResult,
    PartResult,
    corruption_errors,
    summarize_shifts,
)
from timm_robust.inputs import export_model
from timm_robust.models._build import classes_of

CONFIG = {'input_size': (3, 32, 32), 'interpolation': 'bilinear', 'crop_pct': 1., 'crop_mode': 'center'}


def gradient(size=32, mode='RGB'):
    ramp = np.linspace(40, 215, size).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), np.full((size, size), 128)], -1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def class_folders(root, names, size=224):
    image = Image.new('RGB', (size, size), (90, 120, 150))
    first = None
    for name in names:
        (root / name).mkdir(parents=True)
        path = root / name / 'one.jpg'
        if first is None:
            image.save(path)
            first = path
        else:
            path.hardlink_to(first)
    return root


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_corruptions_repeat_and_grow(name):
    image, state = gradient(), np.random.get_state()[1].copy()
    images = {s: corrupt(image, name, s, seed=3) for s in (1, 5)}
    assert np.array_equal(np.random.get_state()[1], state)
    assert np.array_equal(np.asarray(corrupt(image, name, 5, seed=3)), np.asarray(images[5]))
    clean = np.asarray(image).astype(float)
    small, large = (np.abs(np.asarray(images[s]) - clean).mean() for s in (1, 5))
    assert small > 0 and not np.array_equal(np.asarray(images[1]), np.asarray(images[5]))
    assert small < large or name in ('elastic_transform', 'fog')  # constants that do not ascend; grey that nears grey
    assert all(i.size == (32, 32) and i.mode == 'RGB' for i in images.values())


def test_small_and_grey_images():
    found = corrupt(gradient(28, 'L'), 'gaussian_noise', 3, seed=0)
    assert (found.size, found.mode) == ((28, 28), 'L')
    # 28 pixels lie in the middle of 32
    wide = np.asarray(corrupt(Image.fromarray(np.pad(np.asarray(gradient(28)), ((2, 2), (2, 2), (0, 0)), mode='edge')),
                              'snow', 3, seed=1))
    assert np.array_equal(np.asarray(corrupt(gradient(28), 'snow', 3, seed=1)), wide[2:30, 2:30])


def test_noise_follows_from_index_and_seed():
    images = [(gradient(), 0)] * 3

    def pixels(seed, index, dataset=images):
        return np.asarray(CorruptedDataset(Listed(dataset), CONFIG, 'shot_noise', 2, seed)[index][0])

    assert not np.array_equal(pixels(0, 1), pixels(0, 2))
    assert not np.array_equal(pixels(0, 1), pixels(1, 1))
    assert np.array_equal(pixels(0, 1), pixels(0, 1, images[:2]))


class Listed(list):
    targets = [0, 0, 0]
    transform = None


def test_alexnet_has_an_mce_of_100():
    own = {c: dict.fromkeys(range(1, 6), e) for c, e in ALEXNET_ERRORS.items()}
    assert corruption_errors(own, ALEXNET_CLEAN_ERROR) == pytest.approx((100, 100))
    half = {c: {s: e / 2 + s - 3 for s in range(1, 6)} for c, e in ALEXNET_ERRORS.items()}
    wanted = [(e / 2 - 20) / (e - 43.478) for e in ALEXNET_ERRORS.values()]
    assert corruption_errors(half, 20.) == pytest.approx((50, 100 * sum(wanted) / 15))
    assert corruption_errors(half)[1] is None
    assert corruption_errors({'fog': half['fog']}, 20.) == (None, None)
    assert set(ALEXNET_ERRORS) == set(COMMON_CORRUPTIONS)


def test_masked_classes_are_those_of_the_benchmark(tmp_path):
    for name, count in (('r', 200), ('a', 200)):
        wanted = synsets(f'imagenet_{name}_synsets.txt')
        part, = imagenet_shift(name, class_folders(tmp_path / name, wanted, 32))
        assert len(part.classes) == count and [synsets()[i] for i in part.classes] == wanted
        assert [label for _, label in part.open()] == list(part.classes)
    (tmp_path / 'a' / wanted[5]).rename(tmp_path / 'a' / 'cat')
    problem = "benchmarks='a': .*a has 200 folders, but ImageNet-A .*: cat is not one of its"
    with pytest.raises(InputError, match=problem):
        imagenet_shift('a', tmp_path / 'a')
    (tmp_path / 'r' / synsets('imagenet_r_synsets.txt')[5] / 'one.jpg').unlink()
    (tmp_path / 'r' / synsets('imagenet_r_synsets.txt')[5]).rmdir()
    with pytest.raises(InputError, match=r'199 folders, but ImageNet-R .* is missing'):
        imagenet_shift('r', tmp_path / 'r')
    with pytest.raises(InputError, match="benchmarks='sketch': no folder .* ImageNet-Sketch with sketch=FOLDER"):
        imagenet_shift('sketch', tmp_path / 'none')


def test_imagenet_c_is_read_as_stored(tmp_path):
    class_folders(tmp_path / 'fog' / '2', synsets())
    part, = imagenet_c(tmp_path, ['fog'], [2])
    assert (part.key, part.stored_size, part.expected, part.classes) == ('c/fog/2', (224, 224), 50_000, None)
    dataset = part.open()
    assert len(dataset) == 1000 and dataset[999][1] == 999
    with pytest.raises(InputError, match='no folder .*fog/3; unpack all of ImageNet-C, or select'):
        imagenet_c(tmp_path, ['fog'], [2, 3])
    path = tmp_path / 'fog' / '2' / synsets()[0] / 'one.jpg'
    path.unlink()
    Image.new('RGB', (256, 256)).save(path)
    with pytest.raises(InputError, match='one.jpg has 256x256 pixels, but ImageNet-C has 224x224'):
        part.open()


def test_imagenet_v2_is_read_by_the_number_of_its_folders(tmp_path):
    part, = imagenet_shift('v2', class_folders(tmp_path / 'v2', map(str, range(1000)), 32))
    assert (part.key, part.expected, part.classes, part.stored_size) == ('v2', 10_000, None, None)
    dataset = part.open()
    labels = {int(Path(dataset.filename(i)).parent.name): dataset[i][1] for i in range(len(dataset))}
    assert labels == {i: i for i in range(1000)}  # as text 10 comes before 2
    (tmp_path / 'v2' / '7').rename(tmp_path / 'v2' / synsets()[7])
    with pytest.raises(InputError, match=r"benchmarks='v2': .* ImageNet-V2 has 1000, one for each class: n\d+ is"):
        imagenet_shift('v2', tmp_path / 'v2')


def test_imagenet_3dcc_is_not_cropped(tmp_path):
    class_folders(tmp_path / 'fog_3d' / '2', synsets(), 40)
    part, = imagenet_c(tmp_path, ['fog_3d'], [2], '3dcc')
    assert (part.key, part.stored_size, part.expected) == ('3dcc/fog_3d/2', (224, 224), 50_000)
    dataset = part.open()
    assert len(dataset) == 1000 and dataset[3][1] == 3
    with pytest.raises(InputError, match="benchmarks='3dcc': no folder .*flash/2; unpack all of ImageNet-3DCC"):
        imagenet_c(tmp_path, CORRUPTIONS_3D[4:5], [2], '3dcc')


def new_images(root, version='v6', count=2000):
    root.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count) % 10
    np.save(root / f'cifar10.1_{version}_data.npy', images)
    np.save(root / f'cifar10.1_{version}_labels.npy', labels)
    return images, labels


def test_cifar_10_1_rows(tmp_path):
    images, labels = new_images(tmp_path, 'v4', 30)
    part, = cifar_10_1(tmp_path)
    assert (part.key, part.expected, part.stored_size) == ('cifar10.1', 2021, (32, 32))
    images, labels = new_images(tmp_path, 'v6', 20)
    part, = cifar_10_1(tmp_path)
    assert part.expected == 2000, 'v6 comes first'
    dataset = part.open()
    assert len(dataset) == 20 and np.array_equal(np.asarray(dataset[13][0]), images[13]) and dataset[13][1] == 3
    np.save(tmp_path / 'cifar10.1_v6_labels.npy', labels + 1)
    with pytest.raises(InputError, match="benchmarks='cifar10.1': v6 has labels other than 0 to 9"):
        cifar_10_1(tmp_path)
    np.save(tmp_path / 'cifar10.1_v6_labels.npy', labels[1:])
    with pytest.raises(InputError, match=r'labels of shape \(19,\)'):
        cifar_10_1(tmp_path)
    (tmp_path / 'cifar10.1_v6_labels.npy').unlink()
    with pytest.raises(InputError, match='no arrays of v6'):
        cifar_10_1(tmp_path)
    with pytest.raises(InputError, match='give the folder of CIFAR-10.1 with cifar10.1=FOLDER'):
        cifar_10_1(tmp_path / 'none')


def test_the_command_on_new_images(tmp_path, network, capsys):
    images, labels = new_images(tmp_path / 'CIFAR-10.1')
    argv = ['eval', *network(10), '--data-dir', str(tmp_path), '--benchmarks', 'cifar10.1']
    assert main([*argv, '--num-examples', '40', '--output', str(tmp_path / 'out')]) == 0
    found, = outcome(tmp_path / 'out')
    assert (found.name, found.available, found.expected, found.num_images) == ('cifar10.1', 2000, 2000, 40)
    new_images(tmp_path / 'CIFAR-10.1', count=1990)
    assert main(argv) == 2
    assert 'has 1,990 images, but 2,000 were published' in capsys.readouterr().err
    assert main([*argv[:-1], 'v2']) == 2
    assert '--benchmarks v2: has 1000 classes, but nofrost_resnet20_cifar has 10' in capsys.readouterr().err


def test_each_benchmark_takes_its_own_corruptions():
    def chosen(*names, of=('c', '3dcc')):
        return benchmarks._read_corruptions(EvalConfig(benchmarks=','.join(of), corruptions=names or None), of)

    assert chosen() == {'c': list(COMMON_CORRUPTIONS), '3dcc': list(CORRUPTIONS_3D)}
    assert chosen('flash', 'fog') == {'c': ['fog'], '3dcc': ['flash']}
    assert chosen('all', of=('clean', 'cifar10-c')) == {'cifar10-c': list(CORRUPTIONS)}
    problem = "corruptions='near_focus flash': names no corruption of c; choose from gaussian_noise, "
    with pytest.raises(InputError, match=problem):
        chosen('near_focus', 'flash')
    with pytest.raises(InputError, match="corruptions='flash': is not a corruption of any requested benchmark"):
        chosen('fog', 'flash', of=('c',))


def cifar_arrays(root, count=4):
    root.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (5 * count, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(np.array([9, 0, 4, 2])[:count], 5)
    np.save(root / 'fog.npy', images)
    np.save(root / 'labels.npy', labels)
    return images, labels


def test_cifar_c_rows(tmp_path):
    images, labels = cifar_arrays(tmp_path / 'c')
    parts = cifar_c('cifar10-c', tmp_path / 'c', ['fog'], [1, 4])
    assert [p.key for p in parts] == ['cifar10-c/fog/1', 'cifar10-c/fog/4']
    dataset = parts[1].open()
    assert len(dataset) == 4
    for i in range(4):
        assert np.array_equal(np.asarray(dataset[i][0]), images[12 + i]) and dataset[i][1] == labels[12 + i]
    with pytest.raises(InputError, match=r"benchmarks='cifar10-c': no array .*snow.npy"):
        cifar_c('cifar10-c', tmp_path / 'c', ['snow'], [1])
    with pytest.raises(InputError, match='labels from 0 to 9, not those of 100 classes'):
        cifar_c('cifar100-c', tmp_path / 'c', ['fog'], [1])
    np.save(tmp_path / 'c' / 'fog.npy', images[:, :16])
    with pytest.raises(InputError, match=r'fog.npy holds uint8 of shape \(20, 16, 32, 3\)'):
        cifar_c('cifar10-c', tmp_path / 'c', ['fog'], [1])


@pytest.fixture
def network(tmp_path):
    def save(num_classes):
        torch.manual_seed(0)
        model = timm.create_model('nofrost_resnet20_cifar', num_classes=num_classes)
        path = tmp_path / f'{num_classes}.pth'
        torch.save(model.state_dict(), path)
        return ['--model', 'nofrost_resnet20_cifar', '--num-classes', str(num_classes), '--checkpoint', str(path),
                '-b', '16', '-j', '0', '--device', 'cpu']
    return save


def outcome(folder):
    return EvaluationReport.load(folder).benchmarks


def test_the_command_resumes_and_repeats(tmp_path, network, capsys, monkeypatch):
    make_image_folder(tmp_path / 'data', splits=('validation',), classes='abcdefghij', per_class=4)
    cifar_arrays(tmp_path / 'c')
    flags = ['eval', *network(10), '-b', '1', '--data-dir', str(tmp_path / 'data'), '--benchmarks',
             f"clean,corruptions,cifar10-c={tmp_path / 'c'}", '--corruptions', 'fog', '--severities', '1', '5',
             '--num-examples', '4']
    assert main([*flags, '--output', str(tmp_path / 'whole')]) == 0
    shown = capsys.readouterr().out
    clean, corruptions, cifar = outcome(tmp_path / 'whole')
    assert (clean.name, corruptions.name, cifar.name) == ('clean', 'corruptions', 'cifar10-c')
    assert [b.num_images for b in (clean, corruptions, cifar)] == [4, 8, 8] and 'of 20,000 published images' in shown
    assert [b.available for b in (clean, corruptions, cifar)] == [40, 80, 8]
    assert corruptions.mean_error == pytest.approx(sum(corruptions.errors['fog'].values()) / 2)
    assert clean.resized_to is corruptions.resized_to is cifar.resized_to is None and 'resized to' not in shown
    assert main([*flags, '--input-size', '3', '32', '64', '--output', str(tmp_path / 'wide')]) == 0
    assert [b.resized_to for b in outcome(tmp_path / 'wide')] == [None, None, (32, 64)]
    assert 'resized to 32x64' in capsys.readouterr().out

    real, calls = benchmarks.evaluate_shift, []

    def cut_off(*args, **kwargs):
        calls.append(args[4])
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(benchmarks, 'evaluate_shift', cut_off)
    cut = tmp_path / 'cut'
    assert main([*flags, '--output', str(cut)]) == 130
    calls.clear()
    for name in ('seeded', 'changed'):
        shutil.copytree(cut, tmp_path / name)
    monkeypatch.setattr(benchmarks, 'evaluate_shift', lambda *a, **k: (calls.append(a[4]), real(*a, **k)))
    assert main([*flags, '--output', str(cut), '--resume']) == 0
    assert calls == ['corruptions/fog/5', 'cifar10-c/fog/1', 'cifar10-c/fog/5']
    assert outcome(cut) == outcome(tmp_path / 'whole') and not list(cut.glob('progress*'))

    # what is of other noise or of other images is done again, and said
    capsys.readouterr()
    assert main([*flags, '--output', str(tmp_path / 'seeded'), '--seed', '1', '--resume']) == 0
    assert 'outcomes of corruptions/fog/1 are not used' in (said := capsys.readouterr().err) and 'seed=0, now 1' in said
    assert main([*flags, '--output', str(tmp_path / 'fresh'), '--seed', '1']) == 0
    assert outcome(tmp_path / 'seeded') == outcome(tmp_path / 'fresh')
    for path in (tmp_path / 'data').rglob('*.png'):
        gradient().save(path)
    calls.clear()
    assert main([*flags, '--output', str(tmp_path / 'changed'), '--resume']) == 0
    assert calls[:2] == ['clean', 'corruptions/fog/1']
    assert '4 outcomes of clean are not used: the images have changed since' in capsys.readouterr().err
    make_image_folder(tmp_path / 'data', splits=('validation',), classes='abcdefghij', per_class=4)

    two = [*flags, '--output', str(tmp_path / 'two')]
    done = run_distributed(f'from timm_robust.cli.main import main\nassert main({two}) == 0', tmp_path)
    assert done.count('Written') == 1 and outcome(tmp_path / 'two') == outcome(tmp_path / 'whole')


def test_classes_outside_the_mask_do_not_count(tmp_path, network, capsys, monkeypatch):
    class_folders(tmp_path / 'imagenet-a', synsets('imagenet_a_synsets.txt'), 32)
    flags = network(1000)
    weights = torch.load(flags[5])
    inside = synsets().index(synsets('imagenet_a_synsets.txt')[7])
    outside = synsets().index('n01440764')
    assert 'n01440764' not in synsets('imagenet_a_synsets.txt')
    weights['head.fc.weight'].zero_()
    weights['head.fc.bias'].zero_()
    weights['head.fc.bias'][[inside, outside]] = torch.tensor([1., 2.])
    torch.save(weights, flags[5])
    flags = ['eval', *flags, '--data-dir', str(tmp_path), '--benchmarks', 'a', '--output', str(tmp_path / 'o')]
    assert main(flags) == 2
    assert 'a: has 200 images, but 7,500 were published; add the missing ones' in capsys.readouterr().err
    assert main([*flags, '--num-examples', '200']) == 0
    found, = outcome(tmp_path / 'o')
    assert (found.num_classes, found.accuracy, found.accuracy_all_classes) == (200, .5, 0.)
    assert 'among its 200 classes; 0.0 among all classes, of 7,500 published images' in capsys.readouterr().out


def test_stored_images_reach_the_network_as_they_are(tmp_path, network, monkeypatch):
    images, _ = cifar_arrays(tmp_path / 'c')
    make_image_folder(tmp_path / 'data', splits=('validation',), classes='abcdefghij', per_class=2, size=64)
    seen = {}
    monkeypatch.setattr(benchmarks, 'evaluate_shift', lambda model, loader, indices, hashes, key, *args: seen.update(
        {key: dict(zip(indices, torch.cat([x for x, _ in loader])))}))
    monkeypatch.setattr(benchmarks, 'summarize_shifts', lambda *args: [
        BenchmarkResult('clean', (PartResult(1, 2),), 2)])
    assert main(['eval', *network(10), '--data-dir', str(tmp_path / 'data'), '--benchmarks',
                 f"corruptions,cifar10-c={tmp_path / 'c'}", '--corruptions', 'fog', '--severities', '1', '5',
                 '--num-examples', '4', '--crop-pct', '0.5', '--output', str(tmp_path / 'o')]) == 0
    for severity in (1, 5):
        for index, pixels in seen[f'cifar10-c/fog/{severity}'].items():
            stored = images[(severity - 1) * 4 + index]
            assert np.array_equal((pixels * 255).round().byte().permute(1, 2, 0).numpy(), stored)
        for index, pixels in seen[f'corruptions/fog/{severity}'].items():
            path = tmp_path / 'data' / 'validation' / 'abcdefghij'[index // 2] / f'{index % 2}.png'
            middle = Image.open(path).crop((16, 16, 48, 48))  # what is left at half of the size resized to
            wanted = np.asarray(corrupt(middle, 'fog', severity, index))
            assert np.array_equal((pixels * 255).round().byte().permute(1, 2, 0).numpy(), wanted)


def test_what_is_made_of_imagenet_c():
    parts = [Part('clean', None, size=2)] + [
        Part(f'c/{c}/{s}', None, expected=2, size=2) for c in CORRUPTIONS for s in range(1, 6)]
    journal = Journal(None, {})
    chosen = {part.key: [0, 1] for part in parts}
    for part in parts:  # half of what is clean and of noise is right, nothing else
        right = part.key == 'clean' or 'noise' in part.key
        journal.record(part.key, [0, 1], ['', ''], [right, False], 0.)
    clean, found = summarize_shifts(parts, chosen, journal)
    noises = ('gaussian_noise', 'shot_noise', 'impulse_noise')
    errors = {c: 50 if c in noises else 100 for c in COMMON_CORRUPTIONS}
    assert clean.accuracy == 50 and found.mean_error == pytest.approx(sum(errors.values()) / 15)
    assert found.mce == pytest.approx(sum(100 * errors[c] / ALEXNET_ERRORS[c] for c in errors) / 15)
    assert found.relative_mce(clean.accuracy) == pytest.approx(
        sum(100 * (errors[c] - 50) / (ALEXNET_ERRORS[c] - 43.478) for c in errors) / 15)
    assert found.relative_mce(None) is None
    other = dataclasses.replace(found, name='corruptions')
    assert other.mce is None and other.relative_mce(50.) is None, 'AlexNet was measured on other files'
    assert (found.num_images, found.available, found.expected) == (190, 190, 190)


def test_noise_on_grey_images_is_that_of_one_channel():
    grey = Image.new('L', (64, 64), 128)
    for name in ('gaussian_noise', 'shot_noise', 'speckle_noise'):
        one, three = (np.asarray(corrupt(i, name, 3, seed=0)).std() for i in (grey, grey.convert('RGB')))
        assert .9 < one / three < 1.1


def test_a_folder_of_benchmarks_is_no_clean_data(tmp_path, network, capsys):
    class_folders(tmp_path / 'imagenet-a', synsets('imagenet_a_synsets.txt'), 32)
    assert main(['eval', *network(1000), '--data-dir', str(tmp_path), '--benchmarks', 'clean,a', '--num-examples', '9',
                 '--output', str(tmp_path / 'o')]) == 2
    assert 'has no such folder, and' in capsys.readouterr().err


def test_broken_images_are_found_before_they_are_corrupted(tmp_path, network, capsys):
    make_image_folder(tmp_path / 'data', splits=('validation',), classes='abcdefghij', per_class=4)
    path = tmp_path / 'data' / 'validation' / 'a' / '1.png'
    path.write_bytes(path.read_bytes()[:300])
    assert main(['eval', *network(10), '--data-dir', str(tmp_path / 'data'), '--benchmarks', 'corruptions',
                 '--corruptions', 'fog', '--severities', '1', '--output', str(tmp_path / 'o')]) == 2
    assert 'unreadable image' in capsys.readouterr().err


def test_flags_of_attacks_in_a_file_are_refused_too(tmp_path, network, capsys):
    (tmp_path / 'c.yaml').write_text('eps: 4/255\n')
    assert main(['eval', '-c', str(tmp_path / 'c.yaml'), *network(10), '--data-dir', str(tmp_path), '--benchmarks',
                 'clean']) == 2
    assert '--eps 4/255: has no effect with --benchmarks and no attack' in capsys.readouterr().err


@pytest.mark.parametrize('flags, text', [
    (['--benchmarks', 'x'], '--benchmarks x: unknown; choose from clean, corruptions, c, r'),
    (['--benchmarks', 'r,r'], '--benchmarks r,r: names r twice'),
    (['--benchmarks', 'clean=x'], '--benchmarks clean=x: is computed from the data set; pass its folder as'),
    (['--benchmarks', 'clean', '--exact'], '--exact: has no effect with --benchmarks and no attack'),
    (['--benchmarks', 'corruptions', '--corruptions', 'rain'], '--corruptions rain: unknown'),
    (['--benchmarks', 'corruptions', '--severities', '6'], '--severities 6: must be from 1 to 5'),
    (['--benchmarks', 'corruptions', '--severities', '2', '2'], '--severities 2 2: has duplicates'),
    (['--benchmarks', 'r'], '--benchmarks r: has 1000 classes, but nofrost_resnet20_cifar has 10'),
    (['--benchmarks', 'cifar10-c'], '--benchmarks cifar10-c: no array'),
    (['--benchmarks', 'clean', '--num-examples', '0'], '--num-examples 0: must be a whole number of at least 1'),
])
def test_bad_input(tmp_path, network, capsys, flags, text):
    make_image_folder(tmp_path / 'data', splits=('validation',), per_class=2)
    assert main(['eval', *network(10), '--data-dir', str(tmp_path / 'data'), *flags]) == 2
    error, = capsys.readouterr().err.strip().splitlines()
    assert text in error


def test_networks_side_by_side(tmp_path, network, capsys):
    make_image_folder(tmp_path / 'data', splits=('validation',), classes='abcdefghij', per_class=4)
    flags = ['eval', *network(10), '--data-dir', str(tmp_path / 'data')]
    for name, own in (('a', []), ('b', ['--num-examples', '20']), ('c', ['--seed', '1'])):
        assert main([*flags, *own, '--benchmarks', 'clean,corruptions', '--corruptions', 'fog', 'snow', '--severities',
                     '1', '--output', str(tmp_path / name)]) == 0
    assert main([*flags, '--attacks', 'clean,fgsm', '--allow-chance', '--save-images', '0', '--output',
                 str(tmp_path / 'attacks')]) == 0
    capsys.readouterr()
    both = f"{tmp_path / 'a'},{tmp_path / 'attacks'}"
    for kind in ('bars', 'radar'):
        figure = tmp_path / f'{kind}.png'
        assert main(['compare', f'One={both}', f'Two={both}', '--kind', kind, '-o', str(figure)]) == 0
        assert figure.read_bytes().startswith(b'\x89PNG')
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ['top-1', '%', 'One', 'Two']
    assert [row.split('  ')[0] for row in table[2:5]] == [
        'clean (40 images, seed 0)', 'corruptions (80 images, seed 0)', 'fgsm Linf 8/255 (40 images, seed 0)']
    entries = {b.name: b.accuracy for b in outcome(tmp_path / 'a')}
    assert [float(v) for v in table[3].split()[-2:]] == [round(entries['corruptions'], 1)] * 2
    report = EvaluationReport.load(tmp_path / 'b')
    other = dataclasses.replace(report.model, weights_sha256='0' * 64)
    dataclasses.replace(report, model=other).save(tmp_path / 'b')
    assert main(['compare', f"One={tmp_path / 'a'},{tmp_path / 'b'}", '-o', str(tmp_path / 'no.png')]) == 2
    assert 'holds results for other weights than' in capsys.readouterr().err
    assert main(['compare', f"One={tmp_path / 'a'}", '-o', str(tmp_path / 'no.pdf')]) == 2
    assert 'no.pdf: must end in .png' in capsys.readouterr().err
    for argv, text in (
            ([f"One={tmp_path / 'a'}", f"Two={tmp_path / 'b'}"], 'Two: clean was measured on other images'),
            ([f"One={tmp_path / 'a'}", f"Two={tmp_path / 'attacks'}", '--kind', 'radar'], 'at least three benchmarks'),
            ([f'One={tmp_path}'], 'cannot be read as JSON'),
            ([f"One={tmp_path / 'a'}", f"Two={tmp_path / 'c'}"], 'Two: clean was measured on other images'),
            (['One'], 'One: is not NAME=FOLDER')):
        assert main(['compare', *argv, '-o', str(tmp_path / 'no.png')]) == 2
        error, = capsys.readouterr().err.strip().splitlines()
        assert text in error and not (tmp_path / 'no.png').exists()


def test_a_network_with_the_classes_of_cifar_10_in_another_order_is_refused(tmp_path):
    cifar_arrays(tmp_path / 'c')
    model = timm.create_model('nofrost_resnet20_cifar').eval()
    names = list(classes_of('cifar10'))
    how = dict(benchmarks=f"cifar10-c={tmp_path / 'c'}", corruptions=('fog',), severities=(1,), num_examples=4,
               progress=False, workers=0)
    for name, order in (('right', names), ('reversed', names[::-1])):
        export_model(model, tmp_path / name, class_names=order, preprocessing={
            **CONFIG, 'mean': (.5,) * 3, 'std': (.25,) * 3})
    assert evaluate(str(tmp_path / 'right'), attacks=None, **how).benchmarks[0].num_images == 4
    with pytest.raises(InputError, match=r'has the classes airplane, .*, in this order, but .* has truck, ship'):
        evaluate(str(tmp_path / 'reversed'), attacks=None, **how)
    with pytest.raises(InputError, match="subset='list.txt': applies to attacks only, not to benchmarks"):
        evaluate(str(tmp_path / 'right'), attacks=None, subset='list.txt', **how)
