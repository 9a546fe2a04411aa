"""The transfer matrix: each pair is what `evaluate` says with the one as the other's surrogate."""
import pytest
import timm
import torch
from helpers import TinyNet, make_image_folder

from timm_robust import InputError, TransferReport, evaluate, transfer
from timm_robust.attacks import MIM
from timm_robust.cli.main import main

ATTACK = MIM(steps=3, diversity=.5)


@pytest.fixture
def case():
    """Two networks with classes near each other, and images that the first classifies correctly, most of them."""
    torch.manual_seed(0)
    x, models = torch.rand(20, 3, 8, 8), [TinyNet().eval() for _ in range(2)]
    with torch.no_grad():
        models[1].load_state_dict({
            k: v + .1 * torch.randn_like(v) for k, v in models[0].state_dict().items()})
        for model in models:
            model.fc.bias -= model(x).mean(0)
        y = models[0](x).argmax(1)
    y[0] = (y[0] + 1) % 4
    return dict(zip('AB', models)), x, y


def test_each_pair_is_an_evaluation_from_a_surrogate(case, tmp_path):
    models, x, y = case
    report = transfer(models, (x, y), attack=ATTACK, threat='Linf 4/255', seed=3, batch_size=8)
    accuracies = set()
    for source in models:
        for target in models:
            alone = evaluate(
                models[target], (x, y), attacks=['clean', ATTACK], threat='Linf 4/255', seed=3, batch_size=8,
                surrogate=models[source], allow_chance=True, save_images=0, diagnose=False)
            assert report.outcomes(source, target) == alone['mim3'].correct
            assert report.accuracy(source, target) == alone.accuracy('mim3')
            assert report.interval(source, target) == alone.interval('mim3')
            assert report.clean_accuracy(target) == alone.clean_accuracy
            assert report.data.sha256 == alone.data.sha256
            accuracies.add(report.accuracy(source, target))
    assert len(accuracies) > 2, 'the networks are not told apart'
    assert report.clean_accuracy('A') == 95.
    written = report.save(tmp_path)
    assert [path.name for path in written] == ['transfer.json', 'transfer.png']
    assert TransferReport.load(tmp_path) == report
    assert f"{report.accuracy('A', 'B'):.2f}" in str(report) and 'mim3, Linf 4/255, 20 images, seed 3' in str(report)


def test_refusals(case):
    models, x, y = case
    for given, argument in (
            ([models['A']], 'models'), (['a', 'a'], 'models'),
            ({**models, 'C': TinyNet(num_classes=5).eval()}, "models='C': has 5 classes, but A has 4")):
        with pytest.raises(InputError, match=argument):
            transfer(given, (x, y), attack=ATTACK)
    for attack in ('autoattack', 'apgd-ce', 'clean', 'no-attack'):
        with pytest.raises(InputError, match='^attack='):
            transfer(models, (x, y), attack=attack)
    ten, other = (timm.create_model('nofrost_resnet20_cifar', num_classes=n) for n in (10, 4))
    with pytest.raises(InputError, match='has 4 classes, but the model has 10'):
        transfer([ten, other], (torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)))


def test_the_command(tmp_path, capsys):
    names = ['robustnorm_resnet20_cifar.robustnorm_cifar10', 'resnet20_cifar.standard_cifar10']
    classes = timm.get_pretrained_cfg(names[0]).label_names
    data = make_image_folder(tmp_path / 'data', splits=('test',), classes=classes, per_class=1)
    argv = ['transfer', *names, '--data-dir', str(data), '--split', 'test', '--attack', 'mim2', '--copies', '2',
            '-j', '0', '--eps', '1/255', '--output', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(argv) == 0
    printed = capsys.readouterr().out
    report = TransferReport.load(tmp_path / 'out')
    assert report.names == tuple(names) and report.attack['copies'] == report.attack['steps'] == 2
    assert f'{report.accuracy(*names):.2f}' in printed and report.settings.command.startswith('timm-robust transfer')
    assert (tmp_path / 'out' / 'transfer.png').read_bytes().startswith(b'\x89PNG')
    assert main(argv) == 2 and 'already holds transfer.json' in capsys.readouterr().err
    assert main([*argv[:2], *argv[3:]]) == 2


def test_all_networks_get_the_images_of_the_first_one_and_the_report_says_so(tmp_path, caplog):
    data = make_image_folder(tmp_path / 'data', splits=('validation',), per_class=4, size=40)
    models = {name: timm.create_model('nofrost_resnet20_cifar', num_classes=2, pretrained_cfg_overlay={
        'crop_pct': crop_pct, 'interpolation': interpolation}).eval()
        for name, crop_pct, interpolation in (('A', 1., 'bicubic'), ('B', .5, 'nearest'))}
    report = transfer(models, str(data), attack=ATTACK, batch_size=8, workers=0)
    assert [(m.crop_pct, m.interpolation) for m in report.models] == [(1., 'bicubic')] * 2
    assert 'B gets images resized and cropped for A' in caplog.text
    caplog.clear()
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4) % 2
    report = transfer(models, (x, y), attack=ATTACK)  # as they are
    assert [m.crop_pct for m in report.models] == [1., .5] and not caplog.text
