"""Adversarial weight perturbation under every objective that crafts images."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import TinyNet, run_distributed

from timm_robust.attacks import PGD, InputSpace, Linf
from timm_robust.errors import InputError
from timm_robust.tasks import AWP, OBJECTIVES, TrainingAttack, create_task
from timm_robust.tasks.awp import worst_direction

SPACE = InputSpace((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
THREAT = Linf(8 / 255)
CRAFTING = tuple(name for name, objective in OBJECTIVES.items() if objective.crafts)
GAMMA = 0.05
ATTACK, PERTURBATION = TrainingAttack(steps=2), AWP(gamma=GAMMA)


def batch(n=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return SPACE.normalize(torch.rand(n, 3, 8, 8, dtype=dtype, generator=generator)), torch.arange(n) % 4


def make(objective='nofrost', norm=False, dtype=torch.float64, model=None, attack=ATTACK, awp=PERTURBATION, **settings):
    torch.manual_seed(1)
    objective = OBJECTIVES[objective](**settings)
    model = objective.prepare_model(model or TinyNet(norm=norm).to(dtype)).train()
    task = create_task(
        objective, model, nn.CrossEntropyLoss(), attack=attack, awp=awp, space=SPACE, steps_per_epoch=2, verbose=False)
    return task, model


def test_loss_and_gradient_are_those_at_the_moved_weights():
    task, model = make(weight=.3)
    twin = copy.deepcopy(model)
    x, y = batch()
    seen = []
    attack = task.run_attack
    task.run_attack = lambda *args, **kwargs: seen.append(attack(*args, **kwargs)) or seen[-1]
    result = task(x, y)
    result['loss'].backward()
    adv, = seen  # crafted once

    def loss():
        return .7 * F.cross_entropy(twin(x), y) + .3 * F.cross_entropy(twin(adv), y)

    loss().backward()
    unmoved = {n: p.grad.clone() for n, p in twin.named_parameters()}
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name.endswith('weight'):
                p += GAMMA * p.norm() * p.grad / p.grad.norm()
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(model.parameters(), twin.parameters()) if p.ndim > 1)
    twin.zero_grad()
    moved = loss()
    moved.backward()
    assert result['loss'].item() == pytest.approx(moved.item(), rel=1e-12)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)
        assert (p.grad - unmoved[name]).abs().max() > 1e-6


def test_the_loss_rises_as_far_as_the_size_allows():
    torch.manual_seed(0)
    w, g = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    move, = worst_direction([w], [g], .01)
    assert move.norm().item() == pytest.approx(.01 * w.norm().item(), rel=1e-12)
    assert (move * g).sum().item() == pytest.approx(.01 * (w.norm() * g.norm()).item(), rel=1e-12)
    for useless in (torch.zeros_like(g), g / 0, torch.full_like(g, float('nan'))):
        assert torch.equal(worst_direction([w], [useless], .01)[0], torch.zeros_like(w))


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('objective', CRAFTING)
def test_weights_modes_and_chance_are_left_as_they_were(objective, norm):
    if objective == 'mbnat' and not norm:
        pytest.skip('mbnat needs BatchNorm')
    task, model = make(objective, norm)
    model.fc.bias.requires_grad_(False)
    before, random = copy.deepcopy(model), torch.get_rng_state()
    result = task(*batch())
    assert torch.equal(random, torch.get_rng_state()) and task.step == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    result['loss'].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    plain, twin = make(objective, norm, awp=None)
    assert result['loss'] > plain(*batch())['loss']  # it went against the loss
    for (name, b), c in zip(model.named_buffers(), twin.buffers()):
        assert torch.equal(b, c) is name.endswith('num_batches_tracked')  # as many updates, at other weights


def test_it_begins_where_it_is_told():
    tasks = [make(awp=AWP(gamma=GAMMA, start_epoch=1))[0], make(awp=AWP())[0], make()[0]]
    losses = [[t(*batch())['loss'].item() for t in tasks] for _ in range(3)]
    for step, (late, never, always) in enumerate(losses):
        assert never != always and late == (never if step < 2 else always)


def test_optimizer_average_and_checkpoint_see_the_plain_weights():
    task, model = make()
    task.setup_ema(decay=.5)
    optimizer = torch.optim.SGD(model.parameters(), .1)
    before = copy.deepcopy(model)
    task(*batch())['loss'].backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    task.update_ema(step=1)
    for p, q, g in zip(model.parameters(), before.parameters(), grads):
        torch.testing.assert_close(p, q - .1 * g, rtol=1e-14, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(task.get_checkpoint_state()['state_dict'].values(),
                                                 model.state_dict().values()))


def test_mixed_precision_with_and_without_a_scaler():
    directions = []
    for low, scale in ((None, 1.), (torch.bfloat16, 1.), (torch.float16, 2.**12)):
        task, model = make(dtype=torch.float32)
        with torch.autocast('cpu', low, enabled=low is not None):
            loss = task(*batch(dtype=torch.float32))['loss']
        (loss * scale).backward()
        directions.append(torch.cat([p.grad.flatten() / scale for p in model.parameters()]))
    for low in directions[1:]:
        assert F.cosine_similarity(directions[0], low, dim=0) > .98


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compiled_network(backend):
    plain, model = make()
    expected = plain(*batch())['loss']
    expected.backward()
    task, twin = make()
    task.compile(backend=backend)
    for _ in range(2):
        twin.zero_grad()
        task.step = 0
        loss = task(*batch())['loss']
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_what_it_contradicts_is_refused():
    class Checkpointed(TinyNet):
        grad_checkpointing = True

    with pytest.raises(InputError, match='checkpointing'):
        make(model=Checkpointed().double())[0](*batch())
    for settings, message in ((dict(gamma=-.1), 'gamma=-0.1'), (dict(start_epoch=2), 'has no effect without'),
                              (dict(gamma=.1, start_epoch=-1), 'start_epoch=-1')):
        with pytest.raises(InputError, match=message):
            AWP(**settings)


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    out = run_distributed(f"""
import sys, torch, torch.distributed as dist
dist.init_process_group('gloo')
sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r})
from test_awp import make, batch
rank = dist.get_rank()
x, y = batch()
task, model = make()
task.run_attack = lambda x, y, **kwargs: x + .05 * torch.sin(37 * x)
task.prepare_distributed()
half = slice(4 * rank, 4 * rank + 4)
for step in range(2):
    model.zero_grad()
    with task.no_sync():
        task(x[half], y[half])['loss'].backward()
    model.zero_grad()
    task(x[half], y[half])['loss'].backward()
if rank == 0:
    found = [p.grad.clone() for p in model.parameters()]
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    whole, twin = make()
    whole.run_attack = task.run_attack
    whole(x, y)['loss'].backward()
    print(max((a - b.grad).abs().max().item() for a, b in zip(found, twin.parameters())) < 1e-10)
""", tmp_path)
    assert 'True' in out


def test_pgd_is_what_crafts():
    task, model = make(attack=TrainingAttack(steps=2, random_start=False), weight=1)
    x, y = batch()
    seen = []
    task.loss = lambda input, adv, target: seen.append(adv) or {'loss': model(adv).sum(), 'output': model(adv)}
    task(x, y)
    attack = PGD(steps=2, random_start=False, step_size=min(1.25 * 8, 12) / 255 / 2)
    expected = attack.craft(model, x, y, THREAT, space=SPACE)
    assert torch.equal(seen[0], expected)
