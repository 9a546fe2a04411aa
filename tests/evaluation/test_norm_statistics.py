"""Statistics of clean and adversarial batches beside the tracked ones."""
import json
import math

import pytest
import timm
import torch
import torch.nn as nn
from helpers import TinyNet, make_image_folder

from timm_robust.cli import diagnose
from timm_robust.cli.main import main
from timm_robust.cli.measuring import open_measurement
from timm_robust.errors import InputError
from timm_robust.evaluation.norm_statistics import LayerStatistics, layer_statistics, shift_rows
from timm_robust.layers import RobustNorm2d


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, RobustNorm2d])
def test_statistics_are_those_of_the_input_of_each_layer(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU()).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(1, 2)
    x = torch.rand(7, 3, 5, 5)
    found = layer_statistics(model, x, batch_size=3)['1']
    parts = [model[0](batch).double() for batch in (x[:3], x[3:6])]  # the last is not whole
    means = [z.mean((0, 2, 3)) for z in parts]
    spreads = [
        z.var((0, 2, 3), unbiased=False) if norm is nn.BatchNorm2d else z.amax((0, 2, 3)) - z.amin((0, 2, 3))
        for z in parts]
    torch.testing.assert_close(torch.tensor(found.batch_mean, dtype=torch.float64), sum(means) / 2)
    torch.testing.assert_close(torch.tensor(found.batch_spread, dtype=torch.float64), sum(spreads) / 2)
    torch.testing.assert_close(torch.tensor(found.tracked_mean), model[1].running_mean)
    assert not model[1]._forward_pre_hooks and not model.training
    assert layer_statistics(model.train(), x, batch_size=3)['1'] == found
    assert model.training and model[1].training
    assert model[1].running_mean.tolist() == pytest.approx(found.tracked_mean)


def test_shifts():
    clean = {'a': LayerStatistics(
        tracked_mean=(0., 1.), tracked_spread=(4., 4.), batch_mean=(1., 1.), batch_spread=(4., 4. * math.e))}
    (name, mean, spread, *_), = shift_rows(clean, clean, root=True)
    assert (name, mean, spread) == ('a', pytest.approx(.25), pytest.approx(.5))
    assert shift_rows(clean, clean, root=False)[0][1] == pytest.approx(.125)
    with pytest.raises(InputError, match='TinyNet.*has no BatchNorm'):
        layer_statistics(TinyNet(), torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize('norm', ['robustnorm', 'batchnorm2d'])
def test_the_command(tmp_path, capsys, norm):
    folder = make_image_folder(tmp_path / 'data', splits=('test',), classes=tuple('abcd'), per_class=4)
    kwargs = {} if norm == 'robustnorm' else {'norm_layer': norm}
    model = timm.create_model('robustnorm_resnet20_cifar', num_classes=4, **kwargs)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    argv = ['statistics', '--model', 'robustnorm_resnet20_cifar', '--checkpoint', str(tmp_path / 'w.pth'),
            '--num-classes', '4', '--data-dir', str(folder), '--split', 'test', '-j', '0', '-b', '8', '--device', 'cpu',
            '--num-examples', '16', '--attacks', 'clean,pgd2', '--output', str(tmp_path / 'out')]
    argv += ['--model-kwargs', f'norm_layer={norm}'] if kwargs else []
    assert main(argv) == 0
    found = json.loads((tmp_path / 'out' / 'statistics.json').read_text())
    assert list(found['accuracy']) == (['population', 'batch'] if kwargs else ['population', 'mean', 'batch'])
    assert set(found['layers']['clean']) == set(found['layers']['adversarial']) and 'bn1' in found['layers']['clean']
    assert found['settings']['batch_dependent'] is False
    assert (tmp_path / 'out' / 'statistics.png').stat().st_size > 5000
    assert 'Layers whose mean shifts most under attack' in capsys.readouterr().out
    usual = [a for a in argv[1:] if a not in ('--num-examples', '16')]  # fewer images than the usual 1,000
    usual.remove('--attacks')
    usual.remove('clean,pgd2')
    (tmp_path / 'c.yaml').write_text('attacks: [clean]\n')
    assert main(['statistics', *usual, '-c', str(tmp_path / 'c.yaml'), '--output', str(tmp_path / 'usual')]) == 0
    assert len(json.loads((tmp_path / 'usual' / 'statistics.json').read_text())['data']['indices']) == 16
    capsys.readouterr()
    for more, message in (
            (argv[1:], 'already holds'), ([*argv[1:], '--bn-mode', 'batch'], 'unrecognized arguments: --bn-mode'),
            ([*argv[1:], '--output', str(tmp_path / 'one'), '-b', '1'],
             '--batch-size 1: is too small for batch statistics')):
        assert main(['statistics', *more]) == 2 and message in capsys.readouterr().err


def test_a_measurement_records_that_predictions_depend_on_the_batch(tmp_path):
    folder = make_image_folder(tmp_path / 'data', splits=('test',), classes=tuple('abcd'), per_class=4)
    torch.save(timm.create_model('robustnorm_resnet20_cifar', num_classes=4).state_dict(), tmp_path / 'w.pth')
    argv = ['--model', 'robustnorm_resnet20_cifar', '--checkpoint', str(tmp_path / 'w.pth'), '--num-classes', '4',
            '--data-dir', str(folder), '--split', 'test', '-j', '0', '-b', '8', '--device', 'cpu',
            '--output', str(tmp_path / 'out')]
    for mode in ('batch', 'population'):
        _, found = open_measurement(diagnose.build_parser(), diagnose.DiagnoseConfig, [*argv, '--bn-mode', mode])
        assert found.facts['settings']['batch_dependent'] == (mode == 'batch')
