import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import TinyNet, run_distributed, state_equal
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask
from timm.utils import NativeScaler

from timm_robust.attacks import FGSMRS, PGD, InputSpace, Linf, nofrost_step_size
from timm_robust.errors import InputError
from timm_robust.layers import RobustNorm2d
from timm_robust.tasks import (
    SAT,
    Madry,
    MadryTask,
    NoFrost,
    NoFrostTask,
    SatTask,
    Standard,
    TrainingAttack,
    create_task,
    training_attacks,
)

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
THREAT, STEP = Linf(8 / 255), 3 / 255


def batch(n=6, dtype=torch.float64, classes=4):
    x = SPACE.normalize(torch.rand(n, 3, 8, 8, dtype=dtype))
    return x, torch.arange(n) % classes


def make_task(model, criterion=None, steps=2, random_start=True, **kwargs):
    attack = TrainingAttack(steps=steps, step_size=STEP, random_start=random_start)
    return SatTask(model, criterion or nn.CrossEntropyLoss(), attack=attack, space=SPACE, verbose=False, **kwargs)


def test_labels_are_of_any_integer_type_and_nothing_else():
    x, y = batch(dtype=torch.float32)
    task = make_task(TinyNet(), random_start=False)
    for labels, words in (
            (y.float(), 'whole numbers'), (y[:, None], 'have shape'), (y[:2], '2 for 6'), (-y, 'contain -3')):
        with pytest.raises(InputError, match=words):
            task(x, labels)
    assert torch.equal(task(x, y.int())['loss'], task(x, y)['loss'])


@pytest.mark.parametrize('norm', [False, True], ids=['nofrost', 'sat'])
@pytest.mark.parametrize('weight', [0., 0.3, 1.])
def test_loss_and_gradients_follow_the_equation(norm, weight):
    model = TinyNet(norm=norm).double().train()
    twin = copy.deepcopy(model)
    x, y = batch()
    task = make_task(model, weight=weight, random_start=False)
    result = task(x, y)
    result['loss'].backward()

    adv = PGD(steps=2, step_size=STEP, random_start=False).craft(twin, x, y, THREAT, space=SPACE)
    assert (adv - x).abs().max() > 0
    # BatchNorm sees clean and adversarial images apart, each with statistics of its own
    loss = 0
    if weight < 1:
        clean_logits = twin(x)
        loss = loss + (1 - weight) * F.cross_entropy(clean_logits, y)
    if weight > 0:
        loss = loss + weight * F.cross_entropy(twin(adv), y)
    loss.backward()
    torch.testing.assert_close(result['loss'].detach(), loss.detach(), rtol=1e-12, atol=1e-12)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    for a, b in zip(model.buffers(), twin.buffers()):
        torch.testing.assert_close(a, b)
    if weight < 1:
        torch.testing.assert_close(result['output'], clean_logits, rtol=1e-12, atol=1e-12)
    assert ('adv_loss' in result) is (weight > 0) and ('clean_loss' in result) is (weight < 1)
    assert not any(v.requires_grad for k, v in result.items() if k not in ('loss', 'output'))


@pytest.mark.parametrize('criterion,soft', [
    (LabelSmoothingCrossEntropy(0.1), False),
    (SoftTargetCrossEntropy(), True),
    (BinaryCrossEntropy(smoothing=0.), True),
    (BinaryCrossEntropy(smoothing=0.1), False),
])
def test_any_timm_criterion(criterion, soft):
    model = TinyNet().double().train()
    x, y = batch()
    if soft:
        y = 0.7 * F.one_hot(y, 4).double() + 0.3 * F.one_hot(y.roll(1), 4).double()
    task = make_task(model, criterion)
    result = task(x, y)
    adv = make_task(model, criterion).craft(x, y)
    expected = 0.5 * criterion(model(x), y) + 0.5 * criterion(model(adv), y)
    torch.testing.assert_close(result['loss'], expected, rtol=1e-10, atol=1e-12)
    labels = y.argmax(1) if soft else y
    assert result['adv_top1'] == 100 * (model(adv).argmax(1) == labels).float().mean()


def test_forward_leaves_the_world_alone():
    model = TinyNet(norm=True, drop=0.3).train()
    model.fc.bias.requires_grad_(False)
    before = copy.deepcopy(model)
    task = make_task(model, weight=1.)
    x, y = batch(dtype=torch.float32)
    generator_state = torch.get_rng_state()
    task.craft(x, y)
    assert state_equal(model, before) and torch.equal(generator_state, torch.get_rng_state())
    assert model.training and model.drop.training
    assert not model.fc.bias.requires_grad and model.conv.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    modes = []
    model.drop.register_forward_hook(lambda m, i, o: modes.append(m.training))
    task(x, y)
    assert modes == [False, False, True], 'dropout must rest while crafting and act in the training pass'


def test_noise_repeats_and_moves_on_with_the_step():
    x, y = batch(dtype=torch.float32)
    model = TinyNet()
    first, second = make_task(model, seed=3), make_task(model, seed=3)
    assert torch.equal(first.craft(x, y), second.craft(x, y))
    assert not torch.equal(first.craft(x, y), make_task(model, seed=4).craft(x, y))
    first(x, y)
    assert not torch.equal(first.craft(x, y), second.craft(x, y))
    second.load_task_state(first.get_task_state())
    assert torch.equal(first.craft(x, y), second.craft(x, y))


def test_eps_warms_up_to_its_full_size():
    attack = TrainingAttack(steps=2, eps_warmup_epochs=1.5)
    task = SatTask(TinyNet(), attack=attack, space=SPACE, steps_per_epoch=2, verbose=False)
    x, y = batch(dtype=torch.float32)
    seen = []
    for _ in range(5):
        seen.append(task.current_threat().eps / THREAT.eps)
        task(x, y)
    assert seen == [0.25, 0.5, 0.75, 1., 1.]


def test_checkpoint_state_goes_through_timm():
    task = make_task(TinyNet())
    task.setup_ema(decay=0.9)
    task(*batch(dtype=torch.float32))
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert state['task_state'] == {'step': 1} and 'state_dict_ema' in state
    other = make_task(TinyNet())
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    assert other.step == 1 and state_equal(other.trainable_module, task.trainable_module)


def test_bfloat16_autocast_keeps_every_gradient():
    # a forward pass with frozen parameters inside autocast must not leave gradient-less casts in its cache
    model = TinyNet().train()
    task = make_task(model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*batch(dtype=torch.float32))
    result['loss'].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_accumulated_batches_equal_one_batch():
    model = TinyNet().double().train()
    whole = copy.deepcopy(model)
    x, y = batch(8)
    make_task(whole, random_start=False)(x, y)['loss'].backward()
    task = make_task(model, random_start=False)
    for part in (slice(0, 4), slice(4, 8)):
        loss = task(x[part], y[part])['loss']
        loss /= 2
        loss.backward()
    for a, b in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('name', ['nofrost_resnet11_mnist', 'robustnorm_resnet20_cifar', 'test_vit', 'test_convnext'])
def test_any_timm_model(name):
    kwargs = {'in_chans': 3} if 'mnist' in name else {}
    model = timm.create_model(name, num_classes=4, drop_path_rate=0.1, **kwargs).train()
    size = model.pretrained_cfg['input_size'][-1]
    x = torch.randn(4, 3, size, size).clamp(-1, 1)
    result = make_task(model)(x, torch.arange(4))
    result['loss'].backward()
    assert torch.isfinite(result['loss']) and all(p.grad is not None for p in model.parameters())


def test_an_attack_of_an_evaluation_trains_nothing():
    for attack in (PGD(steps=2), 'pgd2'):
        with pytest.raises(InputError, match='attack: is .*pass a `TrainingAttack`'):
            MadryTask(TinyNet(), attack=attack, space=SPACE)


def test_settings_build_the_tasks():
    model, attack = TinyNet(), TrainingAttack(eps='4/255', eps_warmup_epochs=1.5)
    assert type(create_task(Standard(), model, attack=attack, space=SPACE, steps_per_epoch=10)) is ClassificationTask
    for objective, kind in ((SAT(weight=.3), SatTask), (NoFrost(weight=.3), NoFrostTask), (Madry(), MadryTask)):
        task = create_task(objective, model, attack=attack, space=SPACE, steps_per_epoch=10, verbose=False)
        assert type(task) is kind and task.weight == getattr(objective, 'weight', 1)
        assert task.current_threat().eps == pytest.approx(4 / 255 / 16) and task.eps_warmup_steps == 15
        assert task.attack.threat == Linf(4 / 255)


def test_nofrost_on_batch_norm_is_called_by_its_name(caplog):
    create_task(NoFrost(), TinyNet())
    assert 'is the same as SAT' not in caplog.text
    create_task(NoFrost(), TinyNet(norm=True))
    assert 'is the same as SAT' in caplog.text


@pytest.mark.parametrize('attack', training_attacks())
@pytest.mark.parametrize('norm,eps', [('Linf', '8/255'), ('L2', '0.5'), ('L1', '4')])
def test_every_training_attack_of_the_flags(attack, norm, eps):
    steps = {'steps': 3} if 'steps' in training_attacks()[attack].__dataclass_fields__ else {}
    attack = TrainingAttack(attack=attack, norm=norm, eps=eps, **steps)
    task = SatTask(TinyNet(), attack=attack, space=SPACE, verbose=False)
    x, y = batch(dtype=torch.float32)
    delta = SPACE.to_pixels(task.craft(x, y)) - SPACE.to_pixels(x)
    size = attack.threat.size(delta).max()
    reach = attack.built(attack.threat).reach(attack.threat).eps  # n-fgsm goes beyond eps
    assert 0.2 * attack.threat.eps < size <= reach * (1 + 1e-4)


def test_single_step_takes_the_step_size_of_the_flag():
    x, y = batch(dtype=torch.float32)
    model, threat = TinyNet().eval(), Linf('8/255')
    made = {
        size: TrainingAttack(attack='fgsm_rs', step_size=size).craft(model, x, y, threat, space=SPACE, seed=0)
        for size in (None, '2/255')}
    for size, step_size in ((None, 10 / 255), ('2/255', 2 / 255)):
        expected = FGSMRS(step_size=step_size).craft(model, x, y, threat, space=SPACE, seed=0)
        torch.testing.assert_close(made[size], expected)
    assert not torch.equal(made[None], made['2/255'])


def test_default_step_is_nofrosts_and_follows_the_warmup():
    attack, model = TrainingAttack(steps=1, random_start=False), TinyNet().double()
    x, y = SPACE.normalize(torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)), torch.tensor([0, 1])
    for eps in (2 / 255, 8 / 255):
        threat = Linf(eps)
        adv = attack.craft(model, x, y, threat, space=SPACE, seed=0)
        moved = (SPACE.to_pixels(adv) - SPACE.to_pixels(x)).abs().max().item()
        assert moved == pytest.approx(min(nofrost_step_size(threat, 1), eps), rel=1e-9)


def test_a_step_size_given_by_hand_keeps_its_ratio_to_eps():
    attack, model = TrainingAttack(steps=1, step_size='2/255', random_start=False), TinyNet().double()
    x, y = SPACE.normalize(torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)), torch.tensor([0, 1])
    for share in (.25, 1.):
        adv = attack.craft(model, x, y, attack.threat.scaled(share), space=SPACE, seed=0)
        moved = (SPACE.to_pixels(adv) - SPACE.to_pixels(x)).abs().max().item()
        assert moved == pytest.approx(share * 2 / 255, rel=1e-9)


def test_batch_norm_while_crafting():
    x, y = batch()
    model = TinyNet(norm=True).double().train()
    adv = {}
    for mode in ('eval', 'train'):
        attack = TrainingAttack(steps=2, step_size=STEP, random_start=False, bn_mode=mode)
        adv[mode] = SatTask(model, attack=attack, space=SPACE, verbose=False).craft(x, y)
        attack = PGD(steps=2, step_size=STEP, random_start=False)
        expected = attack.craft(model, x, y, THREAT, space=SPACE, bn_mode=mode)
        assert torch.equal(adv[mode], expected)
    assert not torch.equal(adv['eval'], adv['train'])


@pytest.mark.parametrize('kwargs,message', [
    (dict(attack='pdg'), "attack='pdg': unknown"),
    (dict(norm='l7'), "norm='l7': unknown"),
    (dict(eps='8'), "eps='8': .*8/255"),
    (dict(eps='x'), "eps='x'"),
    (dict(eps=True), 'eps=True: must be'),
    (dict(steps=0), 'steps=0'),
    (dict(steps=-1), 'steps=-1'),
    (dict(steps='many'), "steps='many': must be a whole number"),
    (dict(step_size='0'), 'step_size=0.0: must be a number above 0'),
    (dict(attack='fgsm', step_size='2/255'), "step_size='2/255': fixed by `attack='fgsm'`"),
    (dict(eps_warmup_epochs=-1), 'eps_warmup_epochs=-1'),
    (dict(eps_warmup_epochs=float('nan')), 'eps_warmup_epochs=nan'),
    (dict(bn_mode='test'), "bn_mode='test'"),
    (dict(attack='fgsm', steps=3), "steps=3: fixed by `attack='fgsm'`; leave it out, or set it to 1"),
    (dict(attack='fgsm', random_start=True), "random_start=True: fixed by `attack='fgsm'`"),
])
def test_bad_attacks(kwargs, message):
    with pytest.raises(InputError, match=message):
        TrainingAttack(**kwargs)


def test_one_step_may_be_said_of_an_attack_without_steps():
    """For a recipe that sets the steps of another attack: a command line cannot leave them out."""
    assert TrainingAttack(attack='n-fgsm', steps=1).built(Linf(.1)) == TrainingAttack(attack='n-fgsm').built(Linf(.1))


def test_an_attack_is_the_same_however_it_is_written():
    assert TrainingAttack(eps='8/255', step_size='2/255') == TrainingAttack(eps=8 / 255, step_size=2 / 255)
    assert TrainingAttack(attack='CW_Linf', norm='linf') == TrainingAttack(attack='cw-linf', norm='Linf')


def test_images_of_another_space_are_noticed():
    pixels, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    with pytest.raises(InputError, match='are pixels in'):
        make_task(TinyNet())(pixels, y)
    with pytest.raises(InputError, match='`space` says that they are pixels'):
        SatTask(TinyNet(), verbose=False)(SPACE.normalize(pixels), y)
    for wrong in (255 * pixels, pixels * float('nan')):
        with pytest.raises(InputError, match='as pixels, without the normalization of the network'):
            make_task(TinyNet())(wrong, y)
    noisy = pixels.clone()
    noisy[:, :, :4, :4] = 5.  # random erasing
    SatTask(TinyNet(), verbose=False)(noisy, y)
    make_task(TinyNet())(SPACE.normalize(noisy), y)


@pytest.mark.parametrize('weight', [1.5, -.1, float('nan')])
def test_weight_out_of_range_is_refused_by_settings_and_task(weight):
    for make in (lambda: SAT(weight=weight), lambda: make_task(TinyNet(), weight=weight)):
        with pytest.raises(InputError, match=rf'weight={weight}: must be a number in \[0, 1\]; 0.5 is NoFrost'):
            make()


def test_float16_scaler_path_is_timms():
    # without a GPU the scaler is disabled; the call itself must fit
    model = TinyNet().train()
    task, optimizer = make_task(model), torch.optim.SGD(model.parameters(), lr=0.1)
    NativeScaler(device='cpu')(task(*batch(dtype=torch.float32))['loss'], optimizer, need_update=True)


def test_robust_norm_statistics_come_from_training_passes_only():
    model = timm.create_model('robustnorm_resnet20_cifar').train()
    x = torch.randn(4, 3, 32, 32)
    seen = []
    norm = next(m for m in model.modules() if isinstance(m, RobustNorm2d))
    norm.register_forward_hook(lambda m, i, o: seen.append((m.training, m.running_mean.clone())))
    make_task(model, steps=2)(x, torch.arange(4))
    assert [t for t, _ in seen] == [False, False, True, True]
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][1], seen[3][1])


DDP_SCRIPT = """
import copy, gc, torch, torch.distributed as dist
from helpers import TinyNet
from timm_robust.attacks import InputSpace
from timm_robust.tasks import SatTask, TrainingAttack
dist.init_process_group('gloo')
rank = dist.get_rank()
calls = []
original = dist.all_reduce
space = InputSpace((0.5,) * 3, (0.25,) * 3)
def task_for(model):
    return SatTask(model, torch.nn.CrossEntropyLoss(), attack=TrainingAttack(steps=2, random_start=False), space=space,
        verbose=False)
for norm in (False, True):
    torch.manual_seed(0)
    model = TinyNet(norm=norm).double().train()
    whole = copy.deepcopy(model)
    x, y = space.normalize(torch.rand(8, 3, 8, 8, dtype=torch.float64)), torch.arange(8) % 4
    task = task_for(model)
    task.prepare_distributed(device_ids=None, broadcast_buffers=True)
    own = slice(rank * 4, rank * 4 + 4)
    for step in range(2):
        model.zero_grad()
        task(x[own], y[own])['loss'].backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for g in grads:
        other = [torch.empty_like(g) for _ in range(2)]
        dist.all_gather(other, g)
        assert torch.equal(other[0], other[1]), 'gradients were not reduced'
    if not norm:
        task_for(whole)(x, y)['loss'].backward()
        for a, b in zip(grads, whole.parameters()):
            torch.testing.assert_close(a, b.grad, rtol=1e-10, atol=1e-12)
    with task.no_sync():
        model.zero_grad()
        task(x[own], y[own])['loss'].backward()
del task
gc.collect()
dist.barrier()
dist.destroy_process_group()
print('fine', rank)
"""


def test_two_processes_equal_one(tmp_path):
    assert run_distributed(DDP_SCRIPT, tmp_path).count('fine') == 2
