"""Options of MIM for images that fool other networks too, in float64 against their equations written out."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyNet

from timm_robust import InputError, Linf
from timm_robust.attacks import MIM, InputSpace, image_seeds
from timm_robust.attacks.views import diverse, smoothed

LINF = Linf(.05)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return TinyNet().double().eval(), torch.rand(6, 3, 12, 12).double(), torch.tensor([0, 1, 2, 3, 0, 1])


def gradient(model, x, y, view=lambda x: x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(view(x)), y, reduction='sum'), x)[0]


def kernel(size):
    """gkern of the authors' code: a normal density between -3 and 3, as an outer product that sums to 1."""
    line = torch.distributions.Normal(0, 1).log_prob(torch.linspace(-3, 3, size).double()).exp()
    square = torch.outer(line, line)
    return square / square.sum()


def convolved(g, size):
    out, half, weights = torch.zeros_like(g), size // 2, kernel(size)
    padded = F.pad(g, [half] * 4)
    for i, j in itertools.product(range(size), repeat=2):
        out += weights[i, j] * padded[:, :, i:i + g.shape[2], j:j + g.shape[3]]
    return out


@pytest.mark.parametrize('size', [3, 7])
def test_translation_invariant_gradients_equation_7(size):
    g = torch.randn(2, 3, 9, 11).double()
    torch.testing.assert_close(smoothed(g, size), convolved(g, size), rtol=0, atol=1e-7)  # linspace in float32


def test_copies_of_lower_brightness_equation_8(problem):
    model, x, y = problem
    point, velocity = x, 0
    for _ in range(3):
        g = sum(gradient(model, point, y, lambda x, i=i: x / 2 ** i) for i in range(4)) / 4
        g = smoothed(g, 5)
        velocity = .9 * velocity + g / g.abs().sum((1, 2, 3), keepdim=True)
        point = (x + (point + LINF.eps / 3 * velocity.sign() - x).clamp(-LINF.eps, LINF.eps)).clamp(0, 1)
    attack = MIM(steps=3, decay=.9, copies=4, kernel_size=5)
    torch.testing.assert_close(attack.craft(model, x, y, LINF), point, rtol=0, atol=1e-12)


def test_input_diversity_shrinks_and_pads_each_image():
    x, seeds = torch.rand(40, 2, 20, 30).double(), image_seeds(0, 40, torch.device('cpu'))
    stream = torch.zeros(40, dtype=torch.int64)
    seen = diverse(x, seeds, stream, .5)
    found = []
    for image, view in zip(x, seen):
        matches = []
        for height, width in itertools.product(range(18, 21), range(27, 31)):
            small = F.interpolate(image[None], (height, width), mode='bilinear', align_corners=False)
            for top, left in itertools.product(range(21 - height), range(31 - width)):
                padded = F.pad(small, [left, 30 - width - left, top, 20 - height - top])[0]
                if torch.allclose(padded, view, rtol=0, atol=1e-6):  # positions come from float32 noise
                    matches.append((height, width, top, left))
        assert len(matches) == 1, matches
        found += matches
    changed = [m for m in found if m[:2] != (20, 30)]
    assert 10 <= len(changed) <= 30  # half of 40, by three standard deviations
    assert {m[0] for m in changed} == {18, 19} and {m[1] for m in changed} == {27, 28, 29}
    assert len({m[2:] for m in changed}) >= 4
    torch.testing.assert_close(diverse(x, seeds, stream, 0.), x, rtol=0, atol=1e-12)
    assert not torch.equal(diverse(x, seeds, stream + 1, .5), seen)


def test_normalized_images_give_the_same_pixels(problem):
    model, x, y = problem
    space = InputSpace((.4, .5, .6), (.2, .3, .4))
    attack = MIM(steps=3, copies=3, diversity=.5, kernel_size=3)

    class OnNormalized(torch.nn.Module):
        def forward(self, z):
            return model(space.to_pixels(z))

    pixels = space.to_pixels(attack.craft(OnNormalized(), space.normalize(x), y, LINF, space=space))
    torch.testing.assert_close(pixels, attack.craft(model, x, y, LINF), rtol=0, atol=1e-9)


def test_single_images_depend_on_no_neighbour(problem):
    model, x, y = problem
    attack = MIM(steps=4, copies=2, diversity=.5)
    whole, parts = (attack.run(model, x, y, LINF, batch_size=size) for size in (6, 4))
    torch.testing.assert_close(whole.adversarial, parts.adversarial, rtol=0, atol=1e-12)
    assert torch.equal(model(whole.adversarial).argmax(1) != y, whole.fooled)
    assert set(whole.queries.tolist()) <= {3, 6, 9, 12, 15}  # two views and the image itself


@pytest.mark.parametrize('keep', ['last', 'most_fooled', None])
def test_each_step_and_copy_has_another_view(problem, monkeypatch, keep):
    model, x, y = problem
    streams = []

    def recorded(pixels, seeds, stream, prob):
        streams.append(stream.unique().tolist())
        return diverse(pixels, seeds, stream, prob)

    monkeypatch.setattr('timm_robust.attacks.pgd.diverse', recorded)
    attack = MIM(steps=3, copies=2, diversity=.5)
    if keep is None:
        attack.run(model, x, model(x).argmax(1), Linf(1e-6))  # so close that none is fooled and leaves
    else:
        attack.craft(model, x, y, LINF, keep=keep)
    assert streams == [[1], [2], [3], [4], [5], [6]]


@pytest.mark.parametrize('how', [dict(diversity=1.5), dict(kernel_size=4), dict(kernel_size=0), dict(copies=0)])
def test_bad_options_are_named(how):
    with pytest.raises(InputError, match=f'{next(iter(how))}='):
        MIM(**how)
