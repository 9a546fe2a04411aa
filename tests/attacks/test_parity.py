"""Against a public implementation, on a trained network and the same images."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from timm_robust.attacks import ThreatModel, bim, fgsm, mim, pgd
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
    for x, y in DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True):
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
