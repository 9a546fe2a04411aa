"""Against public implementations, on a trained network and the same images."""
from itertools import chain

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from timm_robust.attacks import (
    ThreatModel,
    apgd_ce,
    apgd_dlr,
    apgd_t,
    autoattack,
    bim,
    cw_l2,
    fab_t,
    fgsm,
    mim,
    pgd,
    square,
)
from timm_robust.data.samples import load_digits
from timm_robust.models import NormalizedModel

torchattacks = pytest.importorskip('torchattacks')

EPS = 0.1
STEPS = 10


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load_digits(num_test=1000)
    model = NormalizedModel(timm.create_model('nofrost_resnet11_mnist')).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    for x, y in chain(batches, batches, batches):
        # a little adversarial training, so that attacks succeed on some images and fail on others
        adv = fgsm(model, x, y, ThreatModel('linf', EPS), keep='last')
        loss = F.cross_entropy(model(adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), test_images, test_labels


def robust_accuracy(model, adv, y):
    with torch.no_grad():
        return 100 * (model(adv).argmax(1) == y).double().mean().item()


@pytest.mark.parametrize('name', ['FGSM', 'PGD', 'PGDL2', 'BIM', 'MIFGSM'])
def test_at_least_as_successful(trained, name):
    model, x, y = trained
    linf, l2 = ThreatModel('linf', EPS), ThreatModel('l2', 0.8)
    step = 2.5 * EPS / STEPS
    theirs, ours = {
        'FGSM': (lambda: torchattacks.FGSM(model, eps=EPS), lambda: fgsm(model, x, y, linf)),
        'PGD': (lambda: torchattacks.PGD(model, eps=EPS, alpha=step, steps=STEPS, random_start=False),
                lambda: pgd(model, x, y, linf, steps=STEPS, step_size=step, random_start=False)),
        'PGDL2': (lambda: torchattacks.PGDL2(model, eps=0.8, alpha=0.2, steps=STEPS, random_start=False),
                  lambda: pgd(model, x, y, l2, steps=STEPS, step_size=0.2, random_start=False)),
        'BIM': (lambda: torchattacks.BIM(model, eps=EPS, alpha=EPS / STEPS, steps=STEPS),
                lambda: bim(model, x, y, linf, steps=STEPS)),
        'MIFGSM': (lambda: torchattacks.MIFGSM(model, eps=EPS, alpha=EPS / STEPS, steps=STEPS, decay=1.),
                   lambda: mim(model, x, y, linf, steps=STEPS)),
    }[name]
    clean = robust_accuracy(model, x, y)
    reference, own = robust_accuracy(model, theirs()(x, y), y), robust_accuracy(model, ours(), y)
    assert 10 < reference < clean - 5, f'the comparison says nothing: clean {clean}, under attack {reference}'
    # both start from the clean image: theirs keeps the last iterate, ours the best
    assert own <= reference, f'{name}: ours leaves {own} %, theirs {reference} %'


def check(name, trained, norm, theirs, ours):
    """On 1,000 images ours leaves at most 0.5 points more than theirs; every image is allowed, as float32 sees it."""
    model, x, y = trained
    eps = {'Linf': EPS, 'L2': 1.2}[norm]
    threat = ThreatModel(norm.lower(), eps)
    clean = robust_accuracy(model, x, y)
    reference, adv = robust_accuracy(model, theirs(model, eps, norm)(x, y), y), ours(model, x, y, threat)
    own = robust_accuracy(model, adv, y)
    assert 5 < reference < clean - 5, f'the comparison says nothing: clean {clean}, under attack {reference}'
    assert own <= reference + .5, f'{name}: ours leaves {own} %, theirs {reference} %'
    delta = (adv - x).flatten(1).double()
    size = delta.abs().amax(1) if norm == 'Linf' else delta.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-6) and adv.min() >= 0 and adv.max() <= 1


COMPONENTS = {
    'apgd_ce': (lambda m, e, n: torchattacks.APGD(m, norm=n, eps=e, steps=50, loss='ce'),
                lambda *a: apgd_ce(*a, steps=50)),
    'apgd_dlr': (lambda m, e, n: torchattacks.APGD(m, norm=n, eps=e, steps=50, loss='dlr'),
                 lambda *a: apgd_dlr(*a, steps=50)),
    'apgd_t': (lambda m, e, n: torchattacks.APGDT(m, norm=n, eps=e, steps=30, n_classes=10),
               lambda *a: apgd_t(*a, steps=30)),
    'fab_t': (lambda m, e, n: torchattacks.FAB(m, norm=n, eps=e, steps=20, multi_targeted=True, n_classes=10),
              lambda *a: fab_t(*a, steps=20)),
    'square': (lambda m, e, n: torchattacks.Square(m, norm=n, eps=e, n_queries=300),
               lambda *a: square(*a, query_limit=300)),
}


@pytest.mark.parity
@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('name', COMPONENTS)
def test_components_are_as_strong(trained, name, norm):
    check(name, trained, norm, *COMPONENTS[name])


@pytest.mark.parity
def test_cw_l2_is_as_strong(trained):
    """torchattacks searches no constant: with its one constant for all rounds the same budget is ours."""
    def theirs(model, eps, norm):
        attack = torchattacks.CW(model, c=10, kappa=0, steps=100, lr=.01)

        def within(x, y):
            adv = attack(x, y)
            return torch.where((adv - x).flatten(1).norm(dim=1).view(-1, 1, 1, 1) <= eps, adv, x)

        return within

    check('cw_l2', trained, 'L2', theirs, lambda *a: cw_l2(
        *a, steps=100, binary_search_steps=1, initial_const=10., abort_early=False))


REFERENCE = {
    'apgd_ce': ('autopgd_base', 'APGDAttack', {'loss': 'ce', 'n_iter': 100}, apgd_ce),
    'apgd_dlr': ('autopgd_base', 'APGDAttack', {'loss': 'dlr', 'n_iter': 100}, apgd_dlr),
    'apgd_t': ('autopgd_base', 'APGDAttack_targeted', {'n_iter': 100}, apgd_t),
    'fab_t': ('fab_pt', 'FABAttack_PT', {'n_iter': 100, 'targeted': True}, fab_t),
    'square': ('square', 'SquareAttack', {'n_queries': 5000, 'p_init': .8, 'resc_schedule': False}, square),
}


@pytest.mark.parity
@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('name', [*REFERENCE, 'autoattack'])
def test_as_strong_as_the_reference(trained, name, norm):
    """The authors' repository, which is on no package index: pip install git+https://github.com/fra31/auto-attack."""
    pytest.importorskip('autoattack')
    import importlib

    def theirs(model, eps, norm):
        if name == 'autoattack':
            from autoattack import AutoAttack
            return AutoAttack(model, norm=norm, eps=eps, seed=0, device='cpu', verbose=False).run_standard_evaluation
        module, cls, settings, _ = REFERENCE[name]
        attack = getattr(importlib.import_module(f'autoattack.{module}'), cls)
        return attack(model, norm=norm, eps=eps, seed=0, device='cpu', **settings).perturb

    check(name, trained, norm, theirs, autoattack if name == 'autoattack' else REFERENCE[name][3])
