"""Each attack against its equations, stated once more in plain float64 for one image at a time."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import linprog, minimize

from timm_robust.attacks import (
    APGD,
    CWL2,
    DDN,
    FAB,
    FABT,
    FMN,
    L1,
    L2,
    MALT,
    PGD,
    Batch,
    Linf,
    RayS,
    Square,
    dlr,
    dlr_targeted,
    gap_targeted,
    logit_gap,
    make_threat,
    noise,
    probability_margin,
    wrong_classes,
)
from timm_robust.attacks.fab import project_onto_hyperplane
from timm_robust.attacks.square import _two_pyramids

LINF, EUCLID, CITY = Linf(.05), L2(.4), L1(.8)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 5)).double().eval()
    x = torch.rand(4, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model[3].weight *= 4
        model[3].bias -= model(x).mean(0)
        y = model(x).argmax(1)
    return model, x, y


def jobs(x, y, target=None):
    index = torch.arange(len(x))
    return Batch(x, y, index, torch.zeros_like(index), target)


def test_dlr_losses():
    z, y = torch.tensor([[3., 1., 2., -1., 0.]], dtype=torch.float64), torch.tensor([0])
    assert dlr(z, y).item() == pytest.approx(-(3 - 2) / (3 - 1))
    assert dlr(z, torch.tensor([2])).item() == pytest.approx(-(2 - 3) / (3 - 1))
    assert dlr_targeted(z, y, torch.tensor([4])).item() == pytest.approx(-(3 - 0) / (3 - (1 + 0) / 2))
    assert logit_gap(z, torch.tensor([1])).item() == 2
    assert gap_targeted(z, torch.tensor([1]), torch.tensor([3])).item() == -2
    p = torch.tensor([3., 1., 2., -1., 0.], dtype=torch.float64).exp() / sum(map(math.exp, (3, 1, 2, -1, 0)))
    assert probability_margin(z, torch.tensor([2])).item() == pytest.approx((p[0] - p[2]).item())
    torch.testing.assert_close(dlr(z, y), dlr(7 * z + 5, y))


@pytest.mark.parametrize('threat', [LINF, EUCLID], ids=['linf', 'l2'])
@pytest.mark.parametrize('loss', ['ce', 'dlr', 'gap', 'pm'])
def test_apgd_is_algorithm_1(problem, threat, loss):
    """Croce & Hein 2020, algorithm 1 and conditions 1 and 2, iterate by iterate."""
    model, x, y = problem
    steps, eps = 40, threat.eps
    attack = APGD(loss=loss, steps=steps)
    state = attack.start(jobs(x, y), threat)
    start = state['point'].clone()
    path = []
    for _ in range(steps + 1):
        path.append(state['point'].clone())
        attack.step(model, state, threat)

    def project(p, x):
        if threat is EUCLID:
            d = p - x
            p = x + d * min(1, eps / d.norm().item())
        else:
            p = torch.min(torch.max(p, x - eps), x + eps)
        return p.clamp(0, 1)

    def value_and_gradient(p, label):
        p = p.clone().requires_grad_()
        z = model(p[None])
        shown = z[0].exp() / z.exp().sum() if loss == 'pm' else z[0]
        value = {'ce': F.cross_entropy, 'dlr': lambda z, y: dlr(z, y).sum()}.get(
            loss, lambda z, y: torch.cat([shown[:label], shown[label + 1:]]).max() - shown[label])(z, label[None])
        return value.item(), torch.autograd.grad(value, p)[0], z.argmax().item() != label.item()

    checks, checkpoints = 0, set()
    interval, since = max(int(.22 * steps), 1), 0
    for i in range(steps):
        since += 1
        if since == interval:
            checkpoints.add(i + 1)
            since, interval = 0, max(interval - max(int(.03 * steps), 1), max(int(.06 * steps), 1))
    for i in range(len(x)):
        point, previous, size = start[i], start[i], 2 * eps
        value, gradient, fooled = value_and_gradient(point, y[i])
        best, best_value, best_gradient = point, value, gradient
        ascents, best_then, halved_then, since = 0, -math.inf, True, 0
        for k in range(steps + 1):
            torch.testing.assert_close(path[k][i], point, rtol=0, atol=1e-9, msg=f'image {i} step {k}')
            if fooled:
                break  # from here on the attack keeps what it has
            if k in checkpoints:
                halve = ascents <= .75 * since or (not halved_then and best_then >= best_value)
                if halve:
                    size, point, gradient = size / 2, best, best_gradient
                halved_then, best_then, ascents, since = halve, best_value, 0, 0
            if k == steps:
                break
            move = gradient.sign() if threat is LINF else gradient / gradient.norm()
            ahead = project(point + size * move, x[i])
            share = 1. if k == 0 else .75
            point, previous = project(point + share * (ahead - point) + (1 - share) * (point - previous), x[i]), point
            last = value
            value, gradient, fooled = value_and_gradient(point, y[i])
            since += 1
            ascents += value > last
            if value > best_value:
                best, best_value, best_gradient = point, value, gradient
            checks += 1
    assert checks > 40, 'hardly a step was compared'


def project_l1(p, x, eps):
    """Onto the L1 ball around x and the box, the shift by bisection."""
    def shifted(s):
        return x + (d.sign() * (d.abs() - s).clamp_min(0)).clamp(-x, 1 - x)

    d, low, high = p - x, 0., (p - x).abs().max().item()
    if (shifted(0.) - x).abs().sum() <= eps:
        return shifted(0.)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (shifted(middle) - x).abs().sum() > eps else (low, middle)
    return shifted(high)


@pytest.mark.parametrize('steps', [40, 120])
@pytest.mark.parametrize('loss', ['ce', 'dlr'])
def test_apgd_under_l1_is_algorithm_1_of_mind_the_box(problem, loss, steps):
    """Croce & Hein 2021, iterate by iterate: sparse steps, their sparsity and size, and the parts of larger eps."""
    model, x, y = problem
    attack = APGD(loss=loss, steps=steps)
    state = attack.start(jobs(x, y), CITY)
    first = state['point'].clone()
    path = []
    for _ in range(steps + 1):
        path.append(state['point'].clone())
        attack.step(model, state, CITY)

    def value_and_gradient(p, label):
        p = p.clone().requires_grad_()
        z = model(p[None])
        value = F.cross_entropy(z, label[None]) if loss == 'ce' else dlr(z, label[None]).sum()
        return value.item(), torch.autograd.grad(value, p)[0], z.argmax().item() != label.item()

    part = math.ceil(.3 * steps)
    compared = sparser = longer = 0
    for i in range(len(x)):
        assert (first[i] - x[i]).abs().sum().item() == pytest.approx(3 * CITY.eps)
        point, k = first[i], 0
        for factor, length in ((3, part), (2, part), (1, steps - 2 * part + 1)):
            eps = factor * CITY.eps
            point = project_l1(point, x[i], eps)
            size, changed, best_value = eps, (point != x[i]).sum().item(), -math.inf
            for j in range(length):
                torch.testing.assert_close(path[k][i], point, rtol=0, atol=1e-9, msg=f'image {i} step {k}')
                compared, k = compared + 1, k + 1
                value, gradient, fooled = value_and_gradient(point, y[i])
                if value > best_value:
                    best, best_value, best_gradient = point, value, gradient
                if fooled and factor == 1:
                    break
                if j and j % max(int(.04 * (part if factor > 1 else steps - 2 * part)), 1) == 0:
                    now = (best != x[i]).sum().item()
                    if now < .95 * changed:
                        size, point, gradient = eps, best, best_gradient
                        sparser += 1
                    else:
                        size = max(size / 1.5, eps / 10)
                        longer += size > eps / 10
                    changed = now
                count = max(math.ceil(changed / 1.5), 1)
                mask = gradient.abs() >= gradient.abs().flatten().sort(descending=True).values[count - 1]
                point = project_l1(point + size * gradient.sign() * mask / mask.sum(), x[i], eps)
            point = best
        assert (state['best'][i] - x[i]).abs().sum() <= CITY.eps * (1 + 1e-9), 'returned from a larger ball'
    assert compared > 3 * steps and sparser > 3 and longer > 3, 'the comparison says little'


def shortest(p, w, b, norm):
    """Size of the shortest move of p onto the hyperplane within the box, by scipy's solvers."""
    dim = len(p)
    if norm == 'Linf':
        # min t, subject to -t <= d <= t, the hyperplane and the box
        upper = np.block([[np.eye(dim), -np.ones((dim, 1))], [-np.eye(dim), -np.ones((dim, 1))]])
        return linprog(np.r_[np.zeros(dim), 1], upper, np.zeros(2 * dim), np.r_[w, 0][None], [b - w @ p],
                       [(-v, 1 - v) for v in p] + [(0, None)]).fun
    if norm == 'L1':
        # min the sum of up and down, d = up - down
        return linprog(np.ones(2 * dim), A_eq=np.r_[w, -w][None], b_eq=[b - w @ p],
                       bounds=[(0, 1 - v) for v in p] + [(0, v) for v in p]).fun
    return minimize(lambda v: v @ v, np.zeros(dim), jac=lambda v: 2 * v, bounds=[(-v, 1 - v) for v in p],
                    constraints={'type': 'eq', 'fun': lambda v: w @ (p + v) - b, 'jac': lambda v: w},
                    options={'ftol': 1e-14, 'maxiter': 500}).fun


@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
def test_projection_onto_the_boundary_against_a_solver(norm):
    generator = np.random.default_rng(0)
    reached = 0
    dim = 6
    for _ in range(40):
        p, w = generator.random(dim), generator.normal(size=dim)
        w[generator.random(dim) < .2] = 0
        low, high = np.minimum(w, 0).sum(), np.maximum(w, 0).sum()
        b = generator.uniform(low * 1.3 - .1, high * 1.3 + .1)
        d = project_onto_hyperplane(*(torch.tensor(v)[None] for v in (p, w)), torch.tensor([b]), norm)[0].numpy()
        assert ((p + d) > -1e-12).all() and ((p + d) < 1 + 1e-12).all()
        if not low < b < high:
            # out of reach: the corner that comes nearest
            side = b > high
            np.testing.assert_allclose(w @ (p + d), high if side else low, atol=1e-6)
            continue
        reached += 1
        np.testing.assert_allclose(w @ (p + d), b, atol=1e-6)
        size = {'Linf': np.abs(d).max(), 'L2': d @ d, 'L1': np.abs(d).sum()}[norm]
        assert size == pytest.approx(shortest(p, w, b, norm), abs=1e-5)
    assert reached > 15


def test_fab_finds_the_boundary_of_a_linear_network():
    """The nearest point of a half-space is known: FAB reaches it in a step, and fools just where eps allows."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.rand(30, 3, 2, 2, dtype=torch.float64) * .2 + .4
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        z = model(x)
    y = z.argmax(1)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    for norm, dual in (('Linf', w.abs().sum()), ('L2', w.norm()), ('L1', w.abs().max())):
        distance = (z[:, 0] - z[:, 1]).abs() / dual
        eps = distance.median().item()
        target = (1 - y)[:, None]
        # the last step goes 5 % beyond the boundary
        found = FAB(steps=20).run(model, x, y, make_threat(norm, eps), targets=target)
        clear = ((distance / eps - 1).abs() > .06)
        assert (found.fooled == (distance < eps))[clear].all() and 5 < found.fooled.sum() < 25


@pytest.mark.parametrize('attack, share', [
    (APGD(), .99), (PGD(steps=100, random_start=False), .97), (FAB(steps=20), 1.)], ids=str)
def test_l1_attacks_on_a_linear_network_reach_the_known_optimum(attack, share):
    """All of eps goes to the pixels of the largest weights, each as far as black and white allow."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).double()
    x = torch.rand(24, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        z = model(x)
    y = z.argmax(1)
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    order = w.abs().argsort(descending=True)
    towards = w * (1 - 2 * y.double())[:, None]  # what raises the wrong class
    room = torch.where(towards > 0, 1 - x.flatten(1), x.flatten(1))[:, order]
    spent = torch.minimum(room.cumsum(1), torch.tensor(1.5)).diff(dim=1, prepend=torch.zeros(24, 1))
    gain, lead = (spent * w.abs()[order]).sum(1), (z[:, 0] - z[:, 1]).abs()
    adv = attack(model, x, y, L1(1.5), **({'targets': 1 - y} if isinstance(attack, FAB) else {}))
    with torch.no_grad():
        after = model(adv)
    fooled = after.argmax(1) != y
    assert not (fooled & (gain < lead * (1 - 1e-6))).any(), 'an image that is safe was fooled'
    assert fooled[share * gain > lead * 1.06].all() and 3 < fooled.sum() < 21
    if not isinstance(attack, FAB):
        left = (lead - (after.gather(1, y[:, None]) - after.gather(1, 1 - y[:, None])).squeeze(1))[~fooled]
        assert (left >= share * gain[~fooled]).all(), left / gain[~fooled]


def shortest_move(p, w, b, norm):
    """Of point p onto <w, .> = b within [0, 1], its length by bisection."""
    missing = b - w @ p
    side = w * missing.sign()
    room = torch.where(side > 0, 1 - p, p)
    if norm == 'L1':
        move, left = torch.zeros_like(p), missing.abs()
        for k in w.abs().argsort(descending=True).tolist():
            move[k] = torch.minimum(room[k], left / w[k].abs())
            left = left - move[k] * w[k].abs()
        return side.sign() * move
    pace = torch.ones_like(w) if norm == 'Linf' else w.abs()
    low, high = 0., 1e6
    for _ in range(200):
        middle = (low + high) / 2
        enough = (w.abs() * torch.minimum(middle * pace, room)).sum() >= missing.abs()
        low, high = (low, middle) if enough else (middle, high)
    return side.sign() * torch.minimum(high * pace, room)


def reference_fab(model, x, y, target, threat, steps):
    """Algorithm 1 for one image and one target, with one evaluation an iteration."""
    def size(d):
        return {'Linf': d.abs().max(), 'L2': d.norm(), 'L1': d.abs().sum()}[threat.norm]

    point, image, back = x.clone(), x.flatten(), 0
    for _ in range(steps + 1):
        leaf = point.clone().requires_grad_(True)
        z = model(leaf[None])[0]
        lead = z[target] - z[y]
        w = torch.autograd.grad(lead, leaf)[0].flatten()
        here, fools = point.flatten(), z.argmax() != y
        if fools and size(here - image) <= threat.eps:
            return point, back
        b = w @ here - lead.detach()
        if fools:
            here, back = image + .9 * (here - image), back + 1
        moves = [shortest_move(p, w, b, threat.norm) for p in (here, image)]
        near, far = (size(d).clamp_min(1e-8) for d in moves)
        alpha = (near / (near + far)).clamp(max=.1)
        moved = (1 - alpha) * (here + 1.05 * moves[0]) + alpha * (image + 1.05 * moves[1])
        point = moved.clamp(0, 1).view_as(x)
    return x, back


@pytest.mark.parametrize('threat', [Linf(.012), L2(.08), L1(.25)], ids=['linf', 'l2', 'l1'])
def test_fab_is_algorithm_1(problem, threat):
    model, x, y = problem
    targets = wrong_classes(model(x), y, 4)
    fooled = back = 0
    for k in range(4):
        found = FAB(steps=8).run(model, x, y, threat, targets=targets[:, k])
        for i in range(len(x)):
            expected, went_back = reference_fab(model, x[i], y[i], targets[i, k], threat, 8)
            torch.testing.assert_close(found.adversarial[i], expected, rtol=0, atol=1e-5)
            fooled, back = fooled + bool(found.fooled[i]), back + went_back
    assert 2 < fooled < 14 and back > 10, 'the comparison says nothing'


def test_fab_starts_over_half_an_eps_away(problem):
    _, x, y = problem
    x = x * .5 + .25
    again = Batch(x, y, torch.arange(4), torch.tensor([0, 1, 2, 0]))
    for threat in (LINF, EUCLID, CITY):
        delta = (FABT().start(again, threat)['point'] - x).flatten(1)
        size = {'Linf': delta.abs().amax(1), 'L2': delta.norm(dim=1), 'L1': delta.abs().sum(1)}[threat.norm]
        expected = torch.tensor([0, threat.eps / 2, threat.eps / 2, 0], dtype=size.dtype)
        torch.testing.assert_close(size, expected, rtol=0, atol=1e-6)


def test_apgd_averages_gradient_and_loss_of_a_network_with_noise(problem):
    model, x, y = problem
    draws = [x.new_tensor(d) for d in (1., -.5)]
    calls = []

    def noisy(point):
        calls.append(len(point))
        return model((point * draws[len(calls) % 2]).tanh())

    def mean_loss(point):
        return sum(F.cross_entropy(model((point * d).tanh()), y, reduction='none') for d in draws) / 2

    attack = APGD(steps=1, eot_iter=2)
    adv = attack(noisy, x, y, LINF, seed=list(range(4)))
    assert sum(calls) == 4 * (2 * 2 + 100), 'two passes for the start, two for the step, a hundred for the verdict'
    start = attack.start(jobs(x, y), LINF)['point'].requires_grad_(True)
    gradient, = torch.autograd.grad(mean_loss(start).sum(), start)
    start = start.detach()
    stepped = torch.clamp(start + 2 * LINF.eps * gradient.sign(), x - LINF.eps, x + LINF.eps).clamp(0, 1)
    better = (mean_loss(stepped) > mean_loss(start)).view(-1, 1, 1, 1)
    torch.testing.assert_close(adv, torch.where(better, stepped, start), rtol=0, atol=1e-9)


def test_square_follows_its_schedule_and_stays_in_its_patch(problem):
    model, x, y = problem
    attack = Square()
    # the reference's p_selection at 32x32: iterations 0..10 with .8, then halved at 11, 51, 201, 501, 1001, 2001, 4001
    at = torch.tensor([0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001]) + 1
    share = [.8, .8, .4, .4, .2, .2, .1, .1, .05, .05, .025, .025, .0125, .0125, .00625]
    assert attack.patch_sizes(at, 32, 32, 'Linf').tolist() == [max(round(math.sqrt(p * 1024)), 1) for p in share]
    assert Square(query_limit=100, rescale_schedule=True).patch_sizes(
        torch.tensor([1, 2, 41]), 32, 32, 'Linf').tolist() == [
        max(round(math.sqrt(p * 1024)), 1) for p in (.8, .2, .0125)], 'iterations 0, 100 and 4,000 of 10,000'
    state = attack.start(jobs(x, y), LINF)
    stripes = state['point'] - x
    assert (stripes[:, :, 0] - stripes[:, :, 1]).abs()[(x[:, :, 0] > .05) & (x[:, :, 0] < .95) & (
        x[:, :, 1] > .05) & (x[:, :, 1] < .95)].max() < 1e-12, 'the start is made of vertical stripes'
    for k in range(1, 40):
        attack.step(model, state, LINF)
        size = attack.patch_sizes(torch.tensor([k]), 6, 6, 'Linf').item()
        changed = (state['point'] != state['best']).any(1)
        for i in range(len(x)):
            rows, columns = changed[i].any(1).nonzero(), changed[i].any(0).nonzero()
            for line in (rows, columns):
                assert not len(line) or line.max() - line.min() < size
        edge = torch.stack([x - LINF.eps, x + LINF.eps]).clamp(0, 1)
        distance = (state['point'][None] - edge).abs().amin(0)
        assert distance.max() < 1e-12, 'every pixel of the perturbation is at an end of its range'


def test_square_l2_spends_the_whole_budget_and_no_more(problem):
    model, x, y = problem
    x = x * .2 + .4  # away from black and white, where clamping shortens the perturbation
    attack = Square()
    state = attack.start(jobs(x, y), L2(.3))
    for _ in range(30):
        size = (state['point'] - x).flatten(1).norm(dim=1)
        torch.testing.assert_close(size, torch.full_like(size, .3), rtol=0, atol=1e-6)
        attack.step(model, state, L2(.3))
    # what the perturbation lacks of eps goes into the first window, and no pixel outside of the two changes
    state['best'], state['step'] = x + (state['point'] - x) * .5, torch.full_like(y, 9000)
    moved = attack._propose_windows(state, L2(.3))
    side = int(attack.patch_sizes(state['step'][:1], *x.shape[2:], 'L2'))
    changed = ((moved - state['best']).abs() > 1e-9).any(1).sum((1, 2))
    assert (changed <= 2 * side ** 2).all() and 2 * side ** 2 < x[0, 0].numel() and (changed > 0).all()
    window = _two_pyramids(5)
    assert window.norm().item() == pytest.approx(1, abs=1e-6) and (window[:2] > 0).all() and (window[2:] < 0).all()


def test_square_under_l1_moves_the_budget_of_two_windows_into_one(problem):
    """Croce & Hein 2021, section 4: a pyramid on what the window holds, with the budget of both, then projected."""
    model, x, y = problem
    eta = _two_pyramids(3, 'L1')
    assert eta.abs().sum().item() == pytest.approx(1, abs=1e-6) and (eta[:1] > 0).all() and (eta[1:] < 0).all()
    torch.testing.assert_close(eta[1:] / eta[2, 1], torch.tensor([[1 / 17, 1 / 17, 1 / 17], [1 / 17, 1, 1 / 17]]))
    attack, accepted = Square(), 0
    state = attack.start(jobs(x, y), CITY)
    for k in range(1, 20):
        held = state['best'].clone()
        attack.step(model, state, CITY)
        accepted += int((state['best'] != held).any())
        size = attack.patch_sizes(torch.tensor([k]), 6, 6, 'L1').item()
        assert size >= 3 and (size % 2 or size == 6)
        draws = noise.uniform(state['seed'], state['step'], 7).double()
        for i in range(len(x)):
            delta, r = state['best'][i] - x[i], draws[i]
            corners = (r[:4] * (7 - size)).long().tolist()
            target, source = (
                (slice(None), slice(top, top + size), slice(left, left + size))
                for top, left in (corners[:2], corners[2:]))
            union = torch.zeros_like(delta)
            union[target] = union[source] = 1
            budget = (CITY.eps - delta.abs().sum()).clamp_min(0) + 2 * (delta * union).abs().sum((1, 2), keepdim=True)
            shape = _two_pyramids(size, 'L1').double()
            held = delta[target] / delta[target].abs().sum((1, 2), keepdim=True).clamp_min(1e-12)
            fresh = (shape if r[4] < .5 else shape.T) * torch.where(r[5:] < .5, -1., 1.).view(2, 1, 1) + held
            delta[source] = 0
            delta[target] = fresh / fresh.abs().sum((1, 2), keepdim=True) * budget
            torch.testing.assert_close(state['point'][i], project_l1(x[i] + delta, x[i], CITY.eps), rtol=0, atol=1e-6)
    assert accepted > 3, 'hardly a window was kept'


def reference_rays(model, x, label, limit):
    """Chen & Gu 2020, algorithms 2 and 3, for one image; yields every image shown to the network."""
    size = x.numel()

    def fools(signs, radius):
        shown.append((x + signs.view(x.shape) * radius).clamp(0, 1))
        return model(shown[-1][None]).argmax().item() != label

    shown, best, radius = [], torch.ones(size, dtype=x.dtype), math.inf
    trial, level, block = best.clone(), 0, -1
    while len(shown) < limit:
        if fools(trial, min(radius, 1.)):
            low, high = 0., min(radius, 1.)
            while high - low > 1e-3 / size ** .5 and len(shown) < limit:
                middle = (low + high) / 2
                low, high = (low, middle) if fools(trial, middle) else (middle, high)
            if high < radius and high - low <= 1e-3 / size ** .5:
                best, radius = trial, high
        block += 1
        length = -(-size // 2 ** level)
        if block >= 2 ** level or block * length >= size:
            level, block = (level + 1 if length > 1 else 0), 0
            length = -(-size // 2 ** level)
        trial = best.clone()
        trial[block * length:(block + 1) * length] *= -1
    return shown[:limit]


def test_rays_is_algorithms_2_and_3(problem):
    model, x, y = problem
    threat = Linf(1e-6)  # nothing is near enough, so the search goes on
    shown = []

    def spy(images):
        shown.append(images.clone())
        return model(images)

    RayS(query_limit=150)(spy, x, y, threat, all_correct=True)
    for i in range(len(x)):
        expected = reference_rays(model, x[i], y[i].item(), 150)
        torch.testing.assert_close(torch.stack([s[i] for s in shown]), torch.stack(expected), rtol=0, atol=1e-12)


def test_cw_l2_is_adam_on_its_loss(problem):
    """Against torch's Adam and the search for the constant as Carlini & Wagner wrote it."""
    model, x, y = problem
    steps, rounds, rate = 30, 4, .02
    nearest = []
    for image, label in zip(x, y):
        low, high, const, best = 0., 1e10, .05, math.inf
        for _ in range(rounds):
            w = torch.atanh((2 * image - 1) * (1 - 1e-6)).requires_grad_()
            optimizer, fooled = torch.optim.Adam([w], lr=rate), False
            for _ in range(steps):
                adv = (w.tanh() + 1) / 2
                z = model(adv[None])
                gap = logit_gap(z, label[None])
                distance = (adv - image).square().sum()
                if gap.item() > 0:
                    fooled, best = True, min(best, distance.sqrt().item())
                loss = distance + const * F.relu(-gap).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            low, high = (low, min(high, const)) if fooled else (max(low, const), high)
            const = (low + high) / 2 if high < 1e10 else const * 10
        nearest.append(best)
    assert any(math.isfinite(n) for n in nearest)
    attack = CWL2(
        steps=steps, binary_search_steps=rounds, learning_rate=rate, initial_const=.05, abort_early=False)
    for factor, expected in ((1 + 1e-6, True), (1 - 1e-6, False)):
        for i, distance in enumerate(nearest):
            if math.isfinite(distance):
                adv = attack(model, x[i:i + 1], y[i:i + 1], L2(distance * factor))
                assert bool((model(adv).argmax(1) != y[i]).item()) is expected


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_malt_steers_to_the_nearest_hyperplanes_of_a_linear_network(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).double()
    with torch.no_grad():
        model[1].weight *= torch.linspace(.3, 3, 7, dtype=torch.float64)[:, None]
    x = torch.rand(9, 3, 2, 2, dtype=torch.float64)
    z, w = model(x).detach().numpy(), model[1].weight.detach().numpy()
    y = z.argmax(1)
    chosen = MALT(num_targets=3).choose_targets(model, x, torch.tensor(y), make_threat(norm, .1), 4)
    differs = 0
    for i in range(9):
        distance = {c: (z[i, y[i]] - z[i, c]) / np.linalg.norm(w[y[i]] - w[c], 1 if norm == 'Linf' else 2)
                    for c in range(7) if c != y[i]}
        assert chosen[i].tolist() == sorted(distance, key=distance.get)[:3]
        differs += chosen[i].tolist() != wrong_classes(model(x), torch.tensor(y), 3)[i].tolist()
    assert differs > 3, 'the likeliest classes are the nearest'


def reference_fmn(model, x, y, norm, steps):
    """Pintor et al. 2021, algorithm 1, for one image; all points. The first radii reach .1 % further."""
    def size(d, p):
        return d.abs().max() if p == math.inf else d.abs().sum() if p == 1 else d.norm()

    p, dual = (math.inf, 1) if norm == 'Linf' else (2, 2)
    farthest = size(torch.maximum(x, 1 - x), p)
    delta, radius, best, found, points = torch.zeros_like(x), math.inf, farthest, False, []
    for k in range(steps + 1):
        cosine = (1 + math.cos(math.pi * k / steps)) / 2
        alpha, gamma = .01 + .99 * cosine, .001 + .049 * cosine
        leaf = (x + delta).requires_grad_(True)
        points.append(leaf.detach())
        z = model(leaf[None])[0]
        gap = torch.cat([z[:y], z[y + 1:]]).max() - z[y]
        gradient, = torch.autograd.grad(gap, leaf)
        if gap > 0:
            found, best = True, min(best, size(delta, p))
            radius = min(radius * (1 - gamma), best)
        elif found:
            radius = radius * (1 + gamma)
        else:
            radius = (size(delta, p) + gap.detach().abs() / size(gradient, dual)) * 1.001
        radius = min(radius, farthest)
        delta = delta + alpha * gradient / gradient.norm()
        if norm == 'Linf':
            delta = delta.clamp(-radius, radius)
        else:
            delta = delta * radius / delta.norm()
        delta = (x + delta).clamp(0, 1) - x
    return points


def reference_ddn(model, x, y, norm, steps):
    """Rony et al. 2019, algorithm 1, for one image; all points."""
    delta, radius, points = torch.zeros_like(x), 1., []
    for k in range(steps + 1):
        leaf = (x + delta).requires_grad_(True)
        points.append(leaf.detach())
        z = model(leaf[None])
        gradient, = torch.autograd.grad(F.cross_entropy(z, y[None]), leaf)
        radius = radius * (.95 if z.argmax() != y else 1.05)
        radius = min(radius, torch.maximum(x, 1 - x).norm())
        delta = delta + (.01 + .99 * (1 + math.cos(math.pi * k / steps)) / 2) * gradient / gradient.norm()
        delta = (x + delta * radius / delta.norm()).clamp(0, 1) - x
    return points


@pytest.mark.parametrize('attack, norm, reference', [
    (FMN(steps=25), 'Linf', reference_fmn), (FMN(steps=25), 'L2', reference_fmn), (DDN(steps=25), 'L2', reference_ddn)])
def test_minimum_norm_attacks_are_their_algorithms(problem, attack, norm, reference):
    model, x, y = problem
    threat = make_threat(norm, .1).unbounded(x.shape[1:])
    state, path = attack.start(jobs(x, y), threat), []
    for _ in range(26):
        path.append(state['point'])
        attack.step(model, state, threat)
    found = attack.run(model, x, y, threat)
    for i in range(len(x)):
        points = reference(model, x[i], y[i], norm, 25)
        for k, point in enumerate(points):
            torch.testing.assert_close(path[k][i], point, rtol=0, atol=1e-8, msg=f'image {i} step {k}')
        fooling = [p for p in points if model(p[None]).argmax() != y[i]]
        nearest = min(fooling, key=lambda p: threat.size((p - x[i])[None]).item())
        torch.testing.assert_close(found.adversarial[i], nearest, rtol=0, atol=1e-8)
    assert found.fooled.all()


@pytest.mark.parametrize('attack, norm, above', [
    (FMN(), 'Linf', .005), (FMN(), 'L2', .005), (DDN(steps=200), 'L2', .06)])
def test_minimum_norm_of_a_linear_network_is_the_distance_to_its_boundary(attack, norm, above):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.rand(30, 3, 2, 2, dtype=torch.float64) * .2 + .4
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        z = model(x)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    exact = (z[:, 0] - z[:, 1]).abs() / (w.abs().sum() if norm == 'Linf' else w.norm())
    threat = make_threat(norm, .5)
    size = threat.size(attack(model, x, z.argmax(1), threat) - x)
    assert (size >= exact).all() and (size <= exact * (1 + above)).all()
    # a run at any eps finds what is within that eps, and nothing else
    near = make_threat(norm, size.median().item() * 1.0001)
    within = attack.run(model, x, z.argmax(1), near)
    assert torch.equal(within.fooled, size <= near.eps)
    assert torch.equal(within.adversarial[~within.fooled], x[~within.fooled])
