"""`timm-robust eval` as a whole: resume, processes, worst case, surrogates, subsets, refusals."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import make_image_folder, run_distributed
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from timm_robust.cli.main import main
from timm_robust.evaluation import EvaluationReport, Runner
from timm_robust.inputs import Peers
from timm_robust.layers import convert_aux_norm, plain_branch
from timm_robust.models import NormalizedModel

ARGUMENTS = ['--attacks', 'clean,pgd5,square30', '-b', '2', '-j', '0', '--device', 'cpu', '--eps', '8/255',
             '--save-images', '0', '--allow-chance']


def trained(folder, seed, **kwargs):
    """A network that classifies the images of a folder with small margins."""
    data = ImageFolder(folder / 'train', ToTensor())
    x, y = torch.stack([image for image, _ in data]), torch.tensor(data.targets)
    torch.manual_seed(seed)
    model = timm.create_model('robustnorm_resnet20_cifar', num_classes=4, **kwargs).train()
    on_pixels, optimizer = NormalizedModel(model), torch.optim.AdamW(model.parameters(), lr=.01)
    for _ in range(20):
        picked = torch.randperm(len(x))[:32]
        loss = F.cross_entropy(on_pixels(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A small data set and networks for it."""
    root = tmp_path_factory.mktemp('eval')
    folder = make_image_folder(root / 'images', classes=('a', 'b', 'c', 'd'), per_class=16)
    for name, seed in (('model', 0), ('other', 1)):
        torch.save(trained(folder, seed).state_dict(), root / f'{name}.pth')
    return root, folder


def command(world, output, *more, checkpoint='model'):
    root, folder = world
    return ['eval', '--model', 'robustnorm_resnet20_cifar', '--num-classes', '4', '--checkpoint',
            str(root / f'{checkpoint}.pth'), '--data-dir', str(folder), '--output', str(output), *ARGUMENTS, *more]


def outcome(folder):
    report = EvaluationReport.load(folder)
    return report, [a.correct for a in report.attacks]


@pytest.fixture(scope='module')
def uninterrupted(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'out'
    assert main(command(world, folder)) == 0
    return outcome(folder)


def test_both_columns_and_every_image(uninterrupted):
    report, _ = uninterrupted
    clean, pgd, square = report.attacks
    assert 0 < sum(pgd.correct) < sum(clean.correct) and sum(square.correct) < sum(clean.correct)
    assert pgd.attacked == square.attacked == sum(clean.correct)
    both = tuple(p and s for p, s in zip(pgd.correct, square.correct))
    assert report.standing('square30') == report.worst_case == both
    assert report.worst_case_accuracy == 100 * sum(both) / 64
    assert square.accuracy == 100 * sum(square.correct) / 64
    assert square.attack['query_limit'] == 30 and pgd.attack['steps'] == 5
    assert (square.effort, pgd.effort) == ('30 queries', '5')


def test_worst_case_runs_each_attack_on_what_is_left(world, uninterrupted, tmp_path, capsys, caplog):
    assert main(command(world, tmp_path / 'out', '--worst-case')) == 0
    assert 'ran only on images that withstood those above it' in capsys.readouterr().out
    assert '64 of 64 images: clean' in caplog.text
    report, _ = outcome(tmp_path / 'out')
    apart, _ = uninterrupted
    clean, pgd, square = report.attacks
    assert square.attacked == sum(pgd.correct) < pgd.attacked and square.accuracy is None
    assert report.worst_case_accuracy == apart.worst_case_accuracy
    skipped = [c and not p for c, p in zip(clean.correct, pgd.correct)]
    assert [c is None for c in square.correct] == skipped


def test_killed_and_resumed(world, uninterrupted, tmp_path):
    folder = tmp_path / 'out'
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_robust', *command(world, folder)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    progress = folder / 'progress-0.jsonl'
    deadline = time.time() + 120
    while not (progress.exists() and progress.read_text().count('"indices"') >= 4):
        assert time.time() < deadline and process.poll() is None, 'it ended before it could be killed'
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / 'results.json').exists()
    with open(progress, 'a') as file:
        file.write('\n{"attack": "pgd5", "indices": [1, 2')  # what a kill in the middle of a write leaves
    kept = progress.read_text()

    attacked = []
    original = Runner.craft
    with pytest.MonkeyPatch.context() as patch:
        def spy(self, attack, x, labels, indices, *threat):
            attacked.extend((str(attack), i) for i in indices)
            return original(self, attack, x, labels, indices, *threat)

        patch.setattr(Runner, 'craft', spy)
        assert main(command(world, folder)) == 2, 'an unfinished evaluation was not noticed'
        assert progress.read_text() == kept and not attacked
        assert main(command(world, folder, '--resume')) == 0
    lines = [json.loads(line) for line in kept.splitlines() if line.endswith('}')]
    done = {(e['attack'], i) for e in lines if 'indices' in e for i in e['indices']}
    assert done and not done & set(attacked), 'finished work was done again'
    assert outcome(folder)[1] == uninterrupted[1]
    assert not progress.exists()


def test_batches_that_count_are_dealt_out_whole():
    second = Peers()
    second.rank, second.size = 1, 2
    assert second.positions(9, together=2) == [2, 3, 6, 7]
    assert second.positions(9) == [1, 3, 5, 7]


def test_two_processes_give_the_result_of_one(world, uninterrupted, tmp_path):
    argv = command(world, tmp_path / 'out', '-b', '48')
    run_distributed(f"""
from timm_robust.cli.main import main
from timm_robust.evaluation import Runner

attack = Runner.run

def half(self, batches, indices):
    assert len(indices) == 32, 'half of them'
    return attack(self, batches, indices)

Runner.run = half
assert main({argv!r}) == 0
""", tmp_path)
    assert outcome(tmp_path / 'out')[1] == uninterrupted[1]


def test_searching_on_the_network_itself_gives_the_same(world, uninterrupted, tmp_path):
    assert main(command(world, tmp_path / 'out', '--exact')) == 0
    assert outcome(tmp_path / 'out')[1] == uninterrupted[1]


def test_transfer_from_a_surrogate(world, uninterrupted, tmp_path, capsys):
    root, _ = world
    surrogate = ['--surrogate', 'robustnorm_resnet20_cifar', '--attacks', 'clean,pgd5']
    same = [*surrogate, '--surrogate-checkpoint', str(root / 'model.pth')]
    other = [*surrogate, '--surrogate-checkpoint', str(root / 'other.pth')]
    assert main(command(world, tmp_path / 'same', *same)) == 0
    assert main(command(world, tmp_path / 'other', *other)) == 0
    assert 'crafted on robustnorm_resnet20_cifar, not on this network' in capsys.readouterr().out
    white, transfer = (outcome(tmp_path / n)[0].accuracy('pgd5') for n in ('same', 'other'))
    assert abs(white - uninterrupted[0].accuracy('pgd5')) <= 5 and transfer > white + 5
    assert main(command(world, tmp_path / 'c', *same, '--attacks', 'apgd-ce')) == 2
    assert 'transfers poorly' in capsys.readouterr().err


def test_a_list_of_images(world, tmp_path, capsys):
    names = tmp_path / 'list.txt'
    names.write_text('c/3.png\nwherever/5.png\n')
    assert main(command(world, tmp_path / 'a', '--subset', str(names))) == 2
    assert 'more than one image' in capsys.readouterr().err
    root, folder = world
    unique = make_image_folder(tmp_path / 'unique', splits=('validation',), classes=('a', 'b', 'c', 'd'), per_class=3)
    for c in 'abcd':
        for path in (unique / 'validation' / c).iterdir():
            path.rename(path.with_name(f'{c}{path.name}'))
    names.write_text('c/c2.png\nwherever/a1.png\n')
    argv = command((root, unique), tmp_path / 'b', '--subset', str(names))
    assert main(argv) == 0
    assert outcome(tmp_path / 'b')[0].data.labels == (2, 0)
    names.write_text('c/c2.png\nd/nowhere.png\n')
    assert main(command((root, unique), tmp_path / 'c', '--subset', str(names))) == 2
    assert 'nowhere.png' in capsys.readouterr().err
    assert main(command((root, unique), tmp_path / 'c', '--subset', 'robustbench')) == 2
    assert 'robustbench package' in capsys.readouterr().err


@pytest.mark.parametrize('more, message', [
    (['--attacks', 'apgd-ce', '--num-targets', '3'], '--num-targets 3: apgd-ce has no such setting; pgd-targeted'),
    (['--attacks', 'rays', '--num-targets', '3'], '--num-targets 3: rays has no such setting'),
    (['--attacks', 'apgd-t', '--num-targets', '4'], '--num-targets 4: must be between 1 and 3'),
    (['--eps', '0'], '--eps 0: allows no perturbation'),
    (['--attacks', 'clean,rays', '--norm', 'l2'], '--attacks rays: supports only Linf, not L2'),
    (['--attacks', 'cw-l2'], '--attacks cw-l2: supports only L2, not Linf'),
    (['--attacks', 'pgd5,pgd5'], 'names pgd5 more than once'),
    (['--attacks', 'clean,adaptive'], 'attacks whole batches, which is only for networks'),
    (['--surrogate', 'robustnorm_resnet20_cifar', '--surrogate-checkpoint', 'x.pth', '--attacks', 'pgd5', '--restarts',
      '2'], '--restarts 2: restarts are compared'),
    (['--attacks', 'fgsm5'], '--attacks fgsm5: takes no number'),
    (['--attacks', 'autoattack9'], '--attacks autoattack9: takes no number'),
    (['--attacks', 'square0'], '--attacks square0: the number of query_limit must be at least 1'),
    (['--bn-mode', 'batch', '--attacks', 'autoattack'], 'normalizes by the batch; choose adaptive'),
    (['--bn-mode', 'batch', '--attacks', 'pgd5', '--worst-case'], '--worst-case: is not defined'),
    (['--exact', '--fast-dtype', 'bfloat16'], 'with --exact attacks run in float32'),
    (['--fast-dtype', 'int8'], '--fast-dtype int8: unknown'),
    (['--surrogate-checkpoint', 'x.pth'], 'needs a model name; pass it as --surrogate'),
])
def test_bad_input_is_one_line_before_any_work(world, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr(Runner, 'craft', lambda *a, **k: pytest.fail('an attack was begun'))
    assert main(command(world, tmp_path / 'out', *more)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and '\n' not in error.split('timm-robust eval: error: ')[1]


def test_guessing_is_noticed_before_hours_are_spent(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Runner, 'craft', lambda *a, **k: pytest.fail('an attack was begun'))
    root, _ = world
    torch.save(timm.create_model('robustnorm_resnet20_cifar', num_classes=4).state_dict(), root / 'untrained.pth')
    argv = command(world, tmp_path / 'out', '-b', '64', checkpoint='untrained')
    argv.remove('--allow-chance')
    assert main(argv) == 2
    assert 'no better than guessing among 4 classes' in capsys.readouterr().err


@pytest.fixture(scope='module')
def two_norms(world):
    """A checkpoint with two BatchNorms: of the trained one the auxiliary is a spoilt copy."""
    root, folder = world
    model = convert_aux_norm(trained(folder, 0, norm_layer='batchnorm2d'))
    for name, tensor in model.state_dict().items():
        if name.endswith('aux.weight'):
            tensor.mul_(.5)
    torch.save(model.state_dict(), root / 'two.pth')
    return model.eval()


def test_the_trade_off_of_two_batchnorms(world, two_norms, tmp_path, capsys):
    kwargs = ['--model-kwargs', 'norm_layer=batchnorm2d', '--attacks', 'pgd2']
    argv = command(world, tmp_path / 'sweep', *kwargs, '--gamma-sweep', '--num-examples', '16',
                   checkpoint='two')
    assert main(argv) == 0
    report = outcome(tmp_path / 'sweep')[0]
    points = report.gamma_sweep
    assert [p.gamma for p in points] == [i / 10 for i in range(11)] and report.model.gamma == 0
    assert report.accuracy('pgd2') == points[0].robust
    folder = tmp_path / 'sweep'
    assert (folder / 'gamma_sweep.png').stat().st_size > 5000
    for page in ('report.md', 'report.html'):
        text = (folder / page).read_text()
        assert 'Accuracy over gamma' in text and 'clean accuracy (%)' in text
    # each point is what the plain network of that mixture gives
    for point in (points[3], points[10]):
        own = tmp_path / str(point.gamma)
        assert main(command(world, own, *kwargs, '--attacks', 'clean,pgd2', '--num-examples', '16', '--gamma',
                            str(point.gamma), checkpoint='two')) == 0
        clean, robust = (a.accuracy for a in outcome(own)[0].attacks)
        assert (point.clean, point.robust) == (clean, robust)
    plain = plain_branch(two_norms, 'aux')
    torch.save(plain.state_dict(), world[0] / 'aux.pth')
    assert main(command(world, tmp_path / 'aux', *kwargs, '--num-examples', '16', checkpoint='aux')) == 0
    assert outcome(tmp_path / 'aux')[1] == outcome(tmp_path / '1.0')[1][1:]
    assert len({(p.clean, p.robust) for p in points}) > 2, 'the comparison says nothing'
    capsys.readouterr()


@pytest.mark.parametrize('more, checkpoint, message', [
    ([], 'two', 'two.pth: has a second BatchNorm (objective mbnat); choose between the two with --gamma'),
    (['--gamma', '.5'], 'plain', 'has no second BatchNorm (objective mbnat); remove --gamma'),
    (['--gamma', '1.5'], 'two', '--gamma 1.5: must be a number in [0, 1]'),
    (['--gamma', '.5', '--bn-mode', 'batch'], 'two', '--bn-mode batch: is incompatible with --gamma'),
    (['--gamma-sweep'], 'plain', 'has no second BatchNorm (objective mbnat); remove --gamma'),
    (['--gamma-sweep', '--attacks', 'clean'], 'two', '--gamma-sweep: needs an attack'),
])
def test_bad_input_about_two_batchnorms(world, two_norms, tmp_path, capsys, more, checkpoint, message):
    torch.save(plain_branch(two_norms, 'main').state_dict(), world[0] / 'plain.pth')
    argv = command(world, tmp_path, '--model-kwargs', 'norm_layer=batchnorm2d', *more, checkpoint=checkpoint)
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and '\n' not in error.split('timm-robust eval: error: ')[1]


def test_gamma_needs_a_checkpoint_and_batchnorm(world, tmp_path, capsys):
    assert main(command(world, tmp_path, '--gamma', '1')) == 2
    assert 'ResNet has no BatchNorm to give an auxiliary twin' in capsys.readouterr().err
    assert main(['eval', '--model', 'resnet10t', '--gamma', '.5', '--data-dir', str(world[1])]) == 2
    assert '--gamma 0.5: mixes the two BatchNorms of a training checkpoint' in capsys.readouterr().err
    assert main(['eval', '--model', 'resnet10t', '--gamma-sweep', '--data-dir', str(world[1])]) == 2
    assert 'error: --gamma-sweep: mixes the two' in capsys.readouterr().err


def test_the_results_file_has_timms_columns_and_every_attack(world, tmp_path, capsys):
    path = tmp_path / 'results.csv'
    argv = command(world, tmp_path / 'out', '--num-examples', '8', '--results-file', str(path))
    assert main(argv) == 0
    row, = csv.DictReader(open(path))
    report = EvaluationReport.load(tmp_path / 'out')
    assert row == {
        'model': 'robustnorm_resnet20_cifar', 'top1': str(report.clean_accuracy),
        'top1_err': str(100 - report.clean_accuracy), 'pgd5': str(report.accuracy('pgd5')),
        'square30': str(report.accuracy('square30')), 'threat': str(report.threat), 'num_examples': '8', 'seed': '0',
        'img_size': '32', 'crop_pct': '1.0', 'interpolation': 'bicubic'}
    assert main([*argv[:-1], str(tmp_path / 'results.txt')]) == 2
    assert '--results-file' in capsys.readouterr().err
