"""Every objective under every switch of the train loop that a CPU can try."""
import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from helpers import CountingBackend, TinyNet, run_distributed
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath, convert_sync_batchnorm
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model

from timm_robust.attacks import InputSpace
from timm_robust.errors import InputError
from timm_robust.tasks import AWP, OBJECTIVES, TrainingAttack, create_task

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
NAMES = tuple(name for name in OBJECTIVES if name != 'standard')
WITHOUT_NORM = tuple(name for name in NAMES if name not in ('mbnat', 'apart'))
CRAFTING = tuple(name for name in NAMES if OBJECTIVES[name].crafts)


def batch(n=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return SPACE.normalize(torch.rand(n, 3, 8, 8, dtype=dtype, generator=generator)), torch.arange(n) % 4


def make(objective, drop=0., dtype=torch.float32, norm=True, model=None, awp=None):
    torch.manual_seed(1)
    model = OBJECTIVES[objective]().prepare_model(model or TinyNet(norm=norm, drop=drop).to(dtype)).train()
    task = create_task(
        OBJECTIVES[objective](), model, nn.CrossEntropyLoss(), attack=TrainingAttack(steps=2), awp=awp,
        space=SPACE, steps_per_epoch=2, verbose=False)
    return task, model


def without_chance(task):
    """The same images whatever batch they come in, so that batches can be taken apart."""
    task.run_attack = lambda x, y, **kwargs: x + .05 * torch.sin(37 * x)
    return task


def half(objective, which):
    """Places of one half of a batch's images, with all of their views."""
    return [which * 2, which * 2 + 1, which * 2 + 4, which * 2 + 5] if objective == 'nofrost_star' else slice(
        which * 4, which * 4 + 4)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('objective', NAMES)
def test_a_step_leaves_the_world_as_it_was(objective):
    task, model = make(objective)
    model.fc.bias.requires_grad_(False)
    before, random = copy.deepcopy(model), torch.get_rng_state()
    task(*batch())
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and list(model.state_dict()) == list(before.state_dict())
    parameters = dict(before.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize('objective', NAMES)
def test_dropout_acts_in_the_training_passes_alone(objective):
    task, model = make(objective, drop=.5)
    seen = []
    model.drop.register_forward_hook(lambda module, args, output: seen.append(module.training))
    task(*batch())
    passes = {'fat': 1, 'madry': 1, 'nofrost_star': 3}.get(objective, 2)
    assert seen[-passes:] == [True] * passes and not any(seen[:-passes])
    assert (len(seen) > passes) is (objective != 'apart')


@pytest.mark.parametrize('objective', NAMES)
def test_bfloat16(objective):
    task, model = make(objective)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*batch())
    result['loss'].backward()
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients(model))


@pytest.mark.parametrize('objective', NAMES)
def test_float16_under_a_loss_scale(objective):
    (task, model), (plain, by_hand) = make(objective), make(objective)
    scaler, optimizer = NativeScaler(device='cpu'), torch.optim.SGD(model.parameters(), lr=.1)
    before = copy.deepcopy(model)
    with torch.autocast('cpu', dtype=torch.float16):
        loss = task(*batch())['loss']
    scaler(loss, optimizer, parameters=model.parameters(), need_update=True)
    plain(*batch())['loss'].backward()
    moved = torch.cat([(old - p).flatten() for p, old in zip(model.parameters(), before.parameters())])
    wanted = .1 * torch.cat([g.flatten() for g in gradients(by_hand)])
    assert (moved - wanted).norm() < .1 * wanted.norm()
    # a scale that overflows is noticed, whichever of two passes overflows, and the step is left out
    for _ in range(2):
        scaler._scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 40)
        before = copy.deepcopy(model)
        with torch.autocast('cpu', dtype=torch.float16):
            loss = task(*batch())['loss']
        optimizer.zero_grad()
        scaler(loss, optimizer, parameters=model.parameters(), need_update=True)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
        assert scaler._scaler.get_scale() == 2. ** 39


@pytest.mark.parametrize('objective', NAMES)
def test_channels_last(objective):
    plain, task = make(objective)[0], make(objective)[0]
    task.trainable_module.to(memory_format=torch.channels_last)
    x, y = batch()
    expected = plain(x, y)['loss']
    loss = task(x.contiguous(memory_format=torch.channels_last), y)['loss']
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('objective', WITHOUT_NORM)
def test_accumulated_batches_equal_one(objective):
    (whole, one), (task, model) = (make(objective, dtype=torch.float64, norm=False) for _ in range(2))
    x, y = batch(dtype=torch.float64)
    without_chance(whole)(x, y)['loss'].backward()
    for part in (half(objective, 0), half(objective, 1)):
        (without_chance(task)(x[part], y[part])['loss'] / 2).backward()
    for a, b in zip(gradients(model), gradients(one)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('objective', NAMES)
@pytest.mark.parametrize('clip_mode', ['norm', 'value', 'agc'])
def test_scaler_clipping_and_average(objective, clip_mode):
    (task, model), (other, by_hand) = make(objective), make(objective)
    task.setup_ema(decay=.5)
    before = copy.deepcopy(model)
    NativeScaler(device='cpu')(
        task(*batch())['loss'], torch.optim.SGD(model.parameters(), lr=.1), clip_grad=.01,
        clip_mode=clip_mode, parameters=model.parameters(), need_update=True)
    task.update_ema(step=2)  # timm copies in the first
    other(*batch())['loss'].backward()
    raw = gradients(by_hand)
    dispatch_clip_grad(by_hand.parameters(), .01, mode=clip_mode)
    assert any(not torch.equal(g, r) for g, r in zip(gradients(by_hand), raw)), 'nothing was clipped'
    average = unwrap_model(task.get_trainable_module(ema=True))
    for p, mean, old, q in zip(*(m.parameters() for m in (model, average, before, by_hand))):
        torch.testing.assert_close(p, q - .1 * q.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mean, (old + p) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('objective', NAMES)
def test_timms_mixup_and_random_erasing(objective):
    task, model = make(objective)
    task.criterion = nn.CrossEntropyLoss(label_smoothing=.1)
    x, y = batch()
    if not OBJECTIVES[objective].compares_labels:
        x, y = Mixup(mixup_alpha=.8, cutmix_alpha=1., num_classes=4)(x, y)
        assert y.shape == (8, 4)
    x = RandomErasing(probability=1., min_area=.2, mode='pixel', device='cpu')(x)  # as in timm's loader: normalized
    low, high = (SPACE.normalize(torch.full((1, 3, 1, 1), v)) for v in (0., 1.))
    assert ((x < low) | (x > high)).any(), 'nothing lies outside of valid pixels'
    crafted = []
    if objective != 'apart':
        attack = task.run_attack
        task.run_attack = lambda *args, **kwargs: crafted.append(attack(*args, **kwargs)) or crafted[0]
    task(x, y)['loss'].backward()
    assert all(torch.isfinite(g).all() for g in gradients(model))
    for adv in crafted:
        moved = ((adv - x[:len(adv)]).abs() * torch.tensor(SPACE.std).view(3, 1, 1)).amax()
        assert 0 < moved <= 8 / 255 * (1 + 1e-5)


@pytest.mark.parametrize('objective', NAMES)
@pytest.mark.parametrize('name', ['nofrost_resnet26', 'test_resnet', 'test_efficientnet', 'test_convnext', 'test_vit'])
def test_any_timm_model(objective, name):
    kwargs = {'drop_path_rate': .5} if name != 'test_efficientnet' else {}
    model = timm.create_model(name, num_classes=4, **kwargs)
    if objective not in WITHOUT_NORM and name not in ('test_resnet', 'test_efficientnet'):
        with pytest.raises(InputError, match=f"objective='{objective}': .* has no BatchNorm"):
            make(objective, model=model)
        return
    task, _ = make(objective, model=model)
    modes = []
    for module in model.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(lambda module, args, output: modes.append(module.training))
    result = task(SPACE.normalize(torch.rand(4, 3, 160, 160)), torch.arange(4))
    result['loss'].backward()
    assert torch.isfinite(result['loss'])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    if kwargs:
        assert modes[-1] and (objective == 'apart' or not all(modes)), 'drop path rests while crafting alone'


@pytest.mark.parametrize('objective', WITHOUT_NORM)
def test_gradient_checkpointing_changes_nothing(objective):
    network = timm.create_model('test_vit', num_classes=4, img_size=32).double()
    (task, model), (other, checkpointed) = (make(objective, model=copy.deepcopy(network)) for _ in range(2))
    checkpointed.set_grad_checkpointing(True)
    x = SPACE.normalize(torch.rand(4, 3, 32, 32, dtype=torch.float64))
    for t in (task, other):
        t(x, torch.arange(4))['loss'].backward()
    for a, b in zip(gradients(checkpointed), gradients(model)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('objective', ['mbnat', 'apart'])
def test_gradient_checkpointing_is_refused(objective):
    task, model = make(objective, model=timm.create_model('test_resnet', num_classes=4))
    model.set_grad_checkpointing(True)
    with pytest.raises(InputError, match='gradient checkpointing would recompute a pass'):
        task(SPACE.normalize(torch.rand(4, 3, 32, 32)), torch.arange(4))


@pytest.mark.parametrize('objective', NAMES)
def test_synchronized_batchnorm_of_one_process(objective):
    plain, model = make(objective)
    synchronized = convert_sync_batchnorm(TinyNet(norm=True))
    task, synchronized = make(objective, model=synchronized)
    synchronized.load_state_dict(model.state_dict())
    assert isinstance(synchronized.norm, nn.SyncBatchNorm)
    x, y = batch()
    torch.testing.assert_close(task(x, y)['loss'], plain(x, y)['loss'])


def compiled_steps(objective, awp):
    """Graphs after each step of a compiled task, which must run all passes of a task that is not, with its losses."""
    (plain, model), (task, twin) = (make(objective, awp=awp) for _ in range(2))
    passes = []
    model.conv.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    backend, graphs = CountingBackend(), []
    task.compile(backend=backend)
    x, y = batch()
    for _ in range(3):
        passes.clear()
        before = backend.runs
        expected, result = plain(x, y), task(x, y)
        for loss in (expected['loss'], result['loss']):
            loss.backward()
        torch.testing.assert_close(result['loss'], expected['loss'], rtol=1e-4, atol=1e-5)
        graphs.append(backend.graphs)
        assert backend.runs - before == len(passes), 'passes that are not compiled'
    for p, q in zip(twin.parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    return graphs


@pytest.mark.parametrize('awp', [AWP(), AWP(gamma=.01)], ids=['', 'awp'])
@pytest.mark.parametrize('objective', CRAFTING)
def test_compiled(objective, awp):
    """The attack's passes are compiled too: one graph, and none in later steps."""
    graphs = compiled_steps(objective, awp)
    # one that learns, by two norms in mbnat and by other weights in AWP; the attack's, and that of the target in TRADES
    learn = (2 if objective == 'mbnat' else 1) * (2 if awp.gamma else 1)
    assert graphs == [learn + 1 + ('trades' in objective)] * 3


@pytest.mark.parametrize('objective', ['fat', 'trades_fat'])
def test_a_compiled_friendly_attack_has_few_shapes(objective):
    """Batches shrink by many images at once: for one graph more, of any size."""
    task, model = make(objective, norm=False)
    with torch.no_grad():
        model.fc.weight *= 50  # of 96 images each step fools some
    backend, shapes = CountingBackend(), set()
    task.compile(backend=backend)
    task.eval_model.register_forward_pre_hook(lambda module, args: shapes.add(len(args[0])))
    plain = make(objective, norm=False)[0]
    plain.trainable_module.load_state_dict(model.state_dict())
    for _ in range(3):
        loss = task(*batch(96))['loss']
        torch.testing.assert_close(loss, plain(*batch(96))['loss'], rtol=1e-4, atol=1e-5)
    assert {96} < shapes - {192} <= {32, 64, 96}
    assert backend.graphs == 3 + ('trades' in objective)


@pytest.mark.parametrize('network', ['nofrost_resnet11_mnist', 'test_resnet'])
def test_a_network_is_one_graph_to_its_attack(network):
    """Neither the cache of standardized weights nor what an attack freezes makes the compiler begin again."""
    torch.manual_seed(1)
    model = timm.create_model(network, num_classes=4, in_chans=3).train()
    task = create_task(
        OBJECTIVES['sat'](), model, nn.CrossEntropyLoss(), attack=TrainingAttack(steps=2), space=SPACE, verbose=False)
    backend = CountingBackend()
    task.compile(backend=backend)
    for _ in range(2):
        task(torch.randn(4, 3, 28, 28).clamp(-1, 1), torch.arange(4))
    # with batch statistics two passes learn
    assert (backend.graphs, backend.runs) == (2, 2 * (2 + 1 + task.mixes_batch))


def test_compiled_without_an_attack():
    (plain, _), (task, model) = make('apart'), make('apart')
    task.compile(backend=CountingBackend())
    expected, result = plain(*batch()), task(*batch())
    result['loss'].backward()
    torch.testing.assert_close(result['loss'], expected['loss'], rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in gradients(model))


@pytest.mark.parametrize('objective', NAMES)
def test_a_resumed_task_goes_on_as_the_first_would(objective):
    task, resumed = make(objective)[0], make(objective)[0]
    x, y = batch()
    task(x, y)
    state = copy.deepcopy(task.get_checkpoint_state())
    expected = task(x, y)['loss']
    resumed.load_checkpoint_state(state['state_dict'], state.get('task_state'))
    assert torch.equal(resumed(x, y)['loss'], expected)


DDP_SCRIPT = """
import gc, torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
import test_matrix as matrix
dist.init_process_group('gloo')
rank = dist.get_rank()
x, y = matrix.batch(dtype=torch.float64)
for objective in matrix.NAMES:
    own = matrix.half(objective, rank)
    for flag in ('find_unused_parameters', 'static_graph'):
        if (objective, flag) == ('apart', 'static_graph'):
            continue
        one, model = matrix.make(objective, dtype=torch.float64)
        if flag == 'find_unused_parameters' and objective != 'mbnat':  # which leaves the flag out
            model.unused = torch.nn.Linear(2, 2)
        one.prepare_distributed(device_ids=None, **{flag: True})
        for step in range(2):
            model.zero_grad()
            one(x[own], y[own])['loss'].backward()
        for g in [p.grad for p in model.parameters() if p.grad is not None]:
            other = [torch.empty_like(g) for _ in range(2)]
            dist.all_gather(other, g)
            assert torch.equal(other[0], other[1]), f'{objective}, {flag}: gradients were not reduced'
        del one
    norm = objective not in matrix.WITHOUT_NORM
    task, model = matrix.make(objective, dtype=torch.float64, norm=norm)
    whole, one = matrix.make(objective, dtype=torch.float64, norm=norm)
    if objective != 'apart':
        matrix.without_chance(task), matrix.without_chance(whole)
    task.prepare_distributed(device_ids=None, broadcast_buffers=True)
    for step in range(2):
        model.zero_grad()
        task(x[own], y[own])['loss'].backward()
    mine = matrix.gradients(model)
    for g in mine:
        other = [torch.empty_like(g) for _ in range(2)]
        dist.all_gather(other, g)
        assert torch.equal(other[0], other[1]), f'{objective}: gradients were not reduced'
    if not norm:
        whole(x, y)['loss'].backward()
        for a, b in zip(mine, matrix.gradients(one)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    task, model = matrix.make(objective, dtype=torch.float64)
    task.prepare_distributed(device_ids=None)
    reduced, seen = [], []
    task.trainable_module.register_comm_hook(
        None, lambda state, bucket: reduced.append(1) or default_hooks.allreduce_hook(None, bucket))
    if objective != 'apart':
        attack = task.run_attack
        task.run_attack = lambda *args, **kwargs: (attack(*args, **kwargs), seen.append(len(reduced)))[0]
    loss = task(x[own], y[own])['loss']
    assert not reduced and seen == ([] if objective == 'apart' else [0]), f'{objective}: reduced while crafting'
    loss.backward()
    assert reduced
    del task
    gc.collect()  # no wrapper with a hook may outlive the process group
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_the_whole_batch(tmp_path):
    folder = str(Path(__file__).parent)
    run_distributed(f'import sys\nsys.path.insert(0, {folder!r})\n' + DDP_SCRIPT, tmp_path)


@pytest.mark.parametrize('objective', NAMES)
def test_batches_that_are_none_are_refused_in_one_line(objective):
    task, _ = make(objective)
    x, y = batch()
    for given, target, words in (
            (x[:0], y[:0], 'input: contains no image'), ((x, x), y, 'input: have type tuple'),
            (x[0], y, 'input: have shape'),
            ((x * 20).to(torch.uint8), y, 'input: are torch.uint8'), (x, y.float(), 'labels: are torch.float32'),
            (x, y > 1, 'labels: are torch.bool'), (x, y[:, None], r'labels: have shape \(8, 1\)'),
            (x, y[:4], 'labels: 4 for 8 images'), (x, y + 1, 'labels: contain class 4, but the model has 4 classes'),
            (x, y - 1, 'labels: contain -1'),
            (x, torch.ones(8, 5) / 5, 'soft targets of 5 classes, but the model has 4'),
            (x, None, 'labels: are not class indices')):
        with pytest.raises(InputError, match=words) as caught:
            task(given, target)
        assert '\n' not in str(caught.value)
    result = task(x, y.int())
    assert torch.isfinite(result['loss'])
    if objective != 'apart':
        assert task.step == 1, 'a batch that was refused counts as a step'
