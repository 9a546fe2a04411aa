"""Robust distillation against its equations in float64, and as flags of training."""
import copy
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TinyNet, make_image_folder
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

from timm_robust import NormalizedModel
from timm_robust.attacks import InputSpace
from timm_robust.cli.main import main
from timm_robust.errors import InputError
from timm_robust.inputs import weights_sha256
from timm_robust.tasks import AWP, SAT, TRADES, Madry, NoFrost, Teacher, TrainingAttack, create_task
from timm_robust.tasks.nofrost_star import NoFrostStar
from timm_robust.training import TrainConfig

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
ATTACK = dict(attack='fgsm', eps='8/255')


def networks():
    """A student that takes images in SPACE, and a teacher that takes pixels and normalizes them otherwise."""
    torch.manual_seed(0)
    student, teacher = TinyNet(norm=False).double(), TinyNet(norm=True, drop=.5).double()
    with torch.no_grad():
        teacher.fc.weight.mul_(9)
    return student, NormalizedModel(teacher, (0.2, 0.3, 0.1), (0.5, 0.3, 0.9)).train()


def batch(n=6):
    pixels = torch.rand(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return pixels, SPACE.normalize(pixels), torch.arange(n) % 4


def cross_entropy(logits, soft):
    return -(soft * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize('weight, smoothing', [(1., 0.), (.7, 0.), (.7, .2)])
def test_loss_and_attack_are_those_of_the_paper(weight, smoothing):
    student, teacher = networks()
    pixels, x, labels = batch()
    criterion = LabelSmoothingCrossEntropy(smoothing) if smoothing else None
    task = create_task(SAT(weight=5 / 6), student, criterion, attack=TrainingAttack(**ATTACK), space=SPACE,
                       teacher=Teacher(teacher, weight), verbose=False)
    result = task(x, labels)

    told = teacher.eval()(pixels).softmax(1).detach()
    soft = weight * told + (1 - weight) * ((1 - smoothing) * F.one_hot(labels, 4) + smoothing / 4)
    moving = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(cross_entropy(student(moving), soft), moving)
    adv = SPACE.normalize((pixels + 8 / 255 * gradient.sign()).clamp(0, 1))
    expected = cross_entropy(student(x), soft) / 6 + 5 / 6 * cross_entropy(student(adv), soft)
    assert result['loss'].item() == pytest.approx(expected.item(), rel=1e-6)
    # of one hot labels the loss is another
    assert abs(expected - F.cross_entropy(student(x), labels) / 6 - 5 / 6 * F.cross_entropy(student(adv), labels)) > .01


def test_accuracies_are_those_of_the_labels():
    student, teacher = networks()
    _, x, _ = batch()
    with torch.no_grad():
        labels = student(x).argmax(1)
        assert (teacher.eval()(SPACE.to_pixels(x)).argmax(1) != labels).any()
    task = create_task(TRADES(), student, attack=TrainingAttack(steps=1), space=SPACE, teacher=Teacher(teacher),
                       verbose=False)
    assert task(x, labels)['clean_top1'] == 100


@pytest.mark.parametrize('objective', [SAT(), NoFrost(), Madry(), TRADES(), NoFrostStar()])
@pytest.mark.parametrize('awp', [None, AWP(gamma=.01)])
def test_the_teacher_stays_as_it_is(objective, awp):
    student, teacher = networks()
    before = copy.deepcopy(teacher.state_dict())
    task = create_task(objective, student, attack=TrainingAttack(steps=1), awp=awp, space=SPACE,
                       teacher=Teacher(teacher), verbose=False)
    _, x, labels = batch()
    views = 3 if objective.name == 'nofrost_star' else 1
    task(x.repeat(views, 1, 1, 1), labels.repeat(views))['loss'].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(m.training for m in teacher.modules())
    assert not {*map(id, teacher.parameters())} & {*map(id, task.parameters())}


@pytest.mark.parametrize('settings, problem', [
    (dict(objective='fat', robust_teacher='x'), 'which fat cannot use'),
    (dict(objective='standard', robust_teacher='x'), 'which standard cannot use'),
    (dict(objective='madry', robust_teacher_weight=.5), 'robust_teacher_weight=0.5: needs a teacher'),
    (dict(objective='madry', robust_teacher='x', robust_teacher_weight=0.), 'robust_teacher_weight=0')])
def test_settings_that_do_not_fit(settings, problem):
    with pytest.raises(InputError, match=problem):
        TrainConfig.from_flat(settings)


def test_a_teacher_of_one_size_and_a_student_of_several(tmp_path, capsys):
    data = make_image_folder(tmp_path / 'data', classes='abcd', size=32)
    argv = ['train', str(data), '--epochs', '1', '--warmup-epochs', '0', '-b', '4', '-j', '0', '--device', 'cpu',
            '--output', str(tmp_path)]
    assert main([*argv, '--model', 'test_vit', '--img-size', '32', '--model-kwargs', 'img_size=32',
                 'dynamic_img_size=False', '--experiment', 'teacher']) == 0
    told = str(tmp_path / 'teacher' / 'export')
    capsys.readouterr()
    assert main([*argv, '--model', 'nofrost_resnet20_cifar', '--objective', 'madry', '--attack-steps', '1',
                 '--robust-teacher', told, '--train-img-sizes', '32', '48', '--experiment', 'student']) == 2
    assert f'--train-img-sizes 48: {told} does not accept it' in capsys.readouterr().err


def test_training_with_a_teacher(tmp_path, capsys):
    data = make_image_folder(tmp_path / 'data', classes='abcd', size=8)
    small = ['--model', 'nofrost_resnet20_cifar', '--input-size', '3', '8', '8', '--epochs', '1', '--warmup-epochs',
             '0', '-b', '4', '-j', '0', '--output', str(tmp_path), '--device', 'cpu', '--seed', '3']
    argv = ['train', str(data), *small]
    assert main([*argv, '--objective', 'madry', '--attack-steps', '1', '--experiment', 'teacher']) == 0
    told = str(tmp_path / 'teacher' / 'export')
    distil = [*argv, '--objective', 'nofrost', '--attack-steps', '1', '--robust-teacher', told]
    assert main([*distil, '--experiment', 'student']) == 0
    assert main([*argv, '--objective', 'nofrost', '--attack-steps', '1', '--experiment', 'untaught']) == 0
    hashes = [weights_sha256(timm.create_model(f'local-dir:{tmp_path / run / "export"}', pretrained=True))
              for run in ('student', 'untaught')]
    assert hashes[0] != hashes[1]
    capsys.readouterr()
    assert main([*distil, '--input-size', '3', '16', '16', '--experiment', 'large']) == 2
    error = capsys.readouterr().err
    assert f'--robust-teacher {told}: takes (3, 8, 8) images, but the model takes (3, 16, 16)' in error
    other = make_image_folder(tmp_path / 'other', classes='abc', size=8)
    assert main(['train', str(other), *distil[2:], '--experiment', 'other']) == 2
    assert '--robust-teacher: the data has 3 classes, but the network has 4' in capsys.readouterr().err
    assert main([*distil[:-1], 'resnet18', '--experiment', 'unknown']) == 2
    # other weights at the same path
    shutil.rmtree(told)
    shutil.copytree(tmp_path / 'untaught' / 'export', told)
    capsys.readouterr()
    resumed = ['--epochs', '2', '--experiment', 'student', '--resume', str(tmp_path / 'student' / 'last.pth.tar')]
    assert main([*distil, *resumed]) == 2
    assert 'the held-out images or the teacher have changed' in capsys.readouterr().err


@pytest.mark.parametrize('settings, steps', [
    (dict(objective='madry', attack='n_fgsm'), '1 attack step '),
    (dict(objective='trades', attack_steps=2), '2 attack steps '), (dict(objective='trades', attack_steps=3), ''),
    (dict(objective='apart'), ''), (dict(objective='standard'), ''),
    (dict(objective='apart', attack_steps=3), 'have no effect, since apart crafts no'),
    (dict(objective='standard', attack_eps='4/255'), 'have no effect, since standard'),
    (dict(objective='standard', attack_eps='4/255', robust_eval_steps=5), ''),
    (dict(objective='madry', attack='fgsm', robust_eval_steps=5), '')])
def test_few_attack_steps_and_unused_attacks_are_warned_about(settings, steps):
    warning = TrainConfig.from_flat(settings).warning
    assert steps in warning and bool(warning) is bool(steps)


def test_labels_are_smoothed_for_binary_cross_entropy_too():
    student, teacher = networks()
    _, x, labels = batch()
    criterion = BinaryCrossEntropy(smoothing=.4)
    task = create_task(SAT(weight=5 / 6), student, criterion, attack=TrainingAttack(**ATTACK), space=SPACE,
                       teacher=Teacher(teacher, 1e-6), verbose=False)
    seen = []
    task.criterion.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    task(x, labels)
    expected = .6 * F.one_hot(labels, 4) + .1
    assert seen and all((target - expected).abs().max() < 1e-5 for target in seen)
