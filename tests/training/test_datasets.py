"""Validation images held out of the training data, and the padded crop of small images."""
import numpy as np
import pytest
import torch
from helpers import make_image_folder
from PIL import Image

from timm_robust.cli.main import main
from timm_robust.cli.train import read_config
from timm_robust.errors import InputError
from timm_robust.inputs import Process
from timm_robust.training.data import create_loaders, open_training_data

TINY = ['--model', 'nofrost_resnet11_mnist', '--in-chans', '3', '--img-size', '32', '--num-classes', '3', '-b', '4',
        '--warmup-epochs', '0', '-j', '0', '--device', 'cpu']
CONFIG = dict(input_size=(3, 32, 32), mean=(0.,) * 3, std=(1.,) * 3, interpolation='bicubic', crop_pct=1.,
              crop_mode='center')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), classes=('a', 'b', 'c'), per_class=20)


PROCESS = Process(torch.device('cpu'))


def opened(folder, *extra):
    return open_training_data(read_config([*TINY, str(folder), *extra]), 3, 3, PROCESS)


def loaders(folder, *extra):
    config = read_config([*TINY, str(folder), *extra])
    return create_loaders(config, open_training_data(config, 3, 3, PROCESS), CONFIG, PROCESS, 3)


def files(part):
    return {part.filename(i) for i in range(len(part))}


def test_training_never_sees_a_held_out_image(folder):
    data = opened(folder, '--val-fraction', '0.2')
    train, validation = data.train, data.validation
    assert (len(train), len(validation)) == (48, 12)
    assert not files(train) & files(validation) and len(files(train) | files(validation)) == 60
    assert np.bincount(validation.targets).tolist() == [4, 4, 4]
    for part in (train, validation):
        for i in range(len(part)):
            assert part[i][1] == part.targets[i] == 'abc'.index(part.filename(i).split('/')[0])
    again = opened(folder, '--val-fraction', '0.2')
    assert files(again.validation) == files(validation) and again.fingerprint == data.fingerprint
    other = opened(folder, '--val-fraction', '0.2', '--seed', '7')
    assert files(other.validation) != files(validation) and other.fingerprint != data.fingerprint
    assert data.class_names == ['a', 'b', 'c']


def test_held_out_images_are_not_augmented(folder):
    made = loaders(
        folder, '--val-fraction', '0.2', '--val-split', '', '--crop-padding', '4', '--robust-eval-steps', '1',
        '--robust-eval-samples', '6')
    loader, robust = made.validation, made.robust
    dataset = loader.dataset
    for i in range(3):
        pixels = np.asarray(Image.open(dataset.filename(i, absolute=True))).transpose(2, 0, 1)
        assert np.array_equal(np.asarray(dataset[i][0]), pixels)
    seen = torch.cat([x for x, _ in loader]), torch.cat([x for x, _ in robust])
    assert len(seen[1]) == 6 and all(any(torch.equal(x, y) for y in seen[0]) for x in seen[1])


def test_a_run_goes_on_with_the_images_it_held_out_alone(folder, tmp_path, capsys):
    run = ['train', *TINY, '--data-dir', str(folder), '--output', str(tmp_path), '--experiment', 'run',
           '--val-fraction', '0.2', '--crop-padding', '4']
    assert main([*run, '--epochs', '1']) == 0
    last = str(tmp_path / 'run' / 'last.pth.tar')
    for other in (['--seed', '3'], ['--val-fraction', '0.3'], ['--val-fraction', '0']):
        assert main([*run, '--epochs', '2', '--resume', last, *other]) == 2
        assert 'the resumed run had other training data' in capsys.readouterr().err
    assert main([*run, '--epochs', '2', '--resume', last]) == 0
    assert main(['train', '-c', str(tmp_path / 'run' / 'args.yaml'), '--resume', '', '--output',
                 str(tmp_path / 'again')]) == 0


def test_padded_crop_shifts_by_whole_pixels_over_black(folder):
    loader = loaders(folder, '--crop-padding', '4', '--hflip', '0', '--color-jitter', '0').train
    dataset, shifts = loader.dataset, set()
    torch.manual_seed(0)
    for _ in range(60):
        padded = np.pad(np.asarray(Image.open(dataset.filename(5, absolute=True))), ((4, 4), (4, 4), (0, 0)))
        image = np.asarray(dataset[5][0]).transpose(1, 2, 0)
        found = [(i, j) for i in range(9) for j in range(9) if np.array_equal(padded[i:i + 32, j:j + 32], image)]
        assert len(found) == 1
        shifts.update(found)
    assert {i for i, _ in shifts} == set(range(9)) and {j for _, j in shifts} == set(range(9))


@pytest.mark.parametrize('flags,named', [
    (['--val-fraction', '0.2', '--val-split', 'test'], 'val_fraction'),
    (['--val-fraction', '0.7'], 'val_fraction'),
    (['--val-fraction', '0.01'], 'val_fraction'),
    (['--epoch-repeats', '2'], 'epoch_repeats'),
    (['--train-num-samples', '2'], 'train_num_samples'),
    (['--crop-padding', '-1'], 'crop_padding'),
    (['--crop-padding', '4', '--scale', '0.5', '1'], 'crop_padding'),
    (['--crop-padding', '4', '--train-crop-mode', 'rkrc'], 'crop_padding'),
    (['--crop-padding', '4', '--no-aug'], 'crop_padding'),
    (['--crop-padding', '4', '--objective', 'nofrost_star'], 'crop_padding'),
])
def test_contradictions_are_refused(folder, flags, named):
    with pytest.raises(InputError) as caught:
        loaders(folder, *flags)
    assert caught.value.argument == named


def test_padded_crop_is_for_images_of_the_networks_size(folder, tmp_path):
    larger = make_image_folder(tmp_path, classes=('a', 'b', 'c'), per_class=4, size=40)
    with pytest.raises(InputError, match='40x40'):
        loaders(larger, '--crop-padding', '4')
