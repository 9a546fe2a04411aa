"""Where memory ends: smaller batches if outcomes do not depend on them, otherwise one line with the batch size."""
import logging

import pytest
import torch
import torch.nn as nn
from helpers import TinyNet

from timm_robust import evaluate
from timm_robust.attacks import InputSpace, Linf
from timm_robust.devices import halving
from timm_robust.errors import InputError
from timm_robust.evaluation import Journal, diagnose
from timm_robust.evaluation.properties import measure_properties
from timm_robust.evaluation.shifts import evaluate_shift
from timm_robust.tasks import NoFrostStar, TrainingAttack, create_task


class Scarce(nn.Module):
    """A network on a device that holds a few images at once, and with gradients fewer still."""

    def __init__(self, model, limit, limit_with_gradients=None):
        super().__init__()
        self.model, self.limits = model, (limit, limit_with_gradients or limit)
        self.sizes = []

    def forward(self, x):
        if len(x) > self.limits[x.requires_grad]:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.50 GiB free.')
        self.sizes.append(len(x))
        return self.model(x)


def problem(norm=False):
    torch.manual_seed(3)
    model, x = TinyNet(norm=norm).eval(), torch.rand(24, 3, 8, 8)
    with torch.no_grad():
        model.fc.weight *= 20
        model.fc.bias -= model(x).mean(0)
        return model, x, model(x).argmax(1)


def batch_statistics(model):
    model.norm.track_running_stats, model.norm.running_mean, model.norm.running_var = False, None, None
    return model


def outcomes(report):
    return [a.correct for a in report.attacks]


HOW = dict(attacks='clean,fgsm-rs,pgd3,apgd-ce4', threat='Linf 0.01', device='cpu', save_images=2)


@pytest.mark.parametrize('exact', [False, True], ids=['copy', 'exact'])
@pytest.mark.parametrize('limits', [(3,), (24, 5)], ids=['forward', 'attack'])
def test_an_evaluation_goes_on_in_smaller_batches(limits, exact, caplog):
    model, x, y = problem()
    expected = evaluate(model, x, y, batch_size=16, exact=exact, **HOW)
    scarce = Scarce(model, *limits).eval()
    with caplog.at_level(logging.WARNING):
        report = evaluate(scarce, x, y, batch_size=16, exact=exact, **HOW)
    assert outcomes(report) == outcomes(expected) and 0 < sum(expected.worst_case) < 24
    assert len(report.examples) == len(expected.examples) > 0
    said = [r.message for r in caplog.records if 'Out of memory' in r.message]
    assert any(text.endswith(('batch size 2', 'batch size 4')) for text in said)
    assert len(said) <= 3 + 2 * (not exact), 'said again for each attack'


def test_a_surrogate_too():
    model, x, y = problem()
    torch.manual_seed(5)
    surrogate = TinyNet().eval()
    how = {**HOW, 'attacks': 'clean,pgd3', 'batch_size': 16}
    expected = evaluate(model, x, y, surrogate=surrogate, **how)
    report = evaluate(model, x, y, surrogate=Scarce(surrogate, 5).eval(), **how)
    assert outcomes(report) == outcomes(expected)


def test_batch_statistics_need_the_whole_batch():
    model, x, y = problem(norm=True)
    scarce = Scarce(batch_statistics(model), 5).eval()
    with pytest.raises(InputError, match=r'batch_size=8: does not fit into memory \(CUDA out of memory\); choose'):
        evaluate(scarce, x, y, batch_size=8, attacks='clean,pgd3', device='cpu')
    with pytest.raises(InputError, match='batch_size=8: does not fit'):
        evaluate(batch_statistics(TinyNet(norm=True)).eval(), x, y, batch_size=8, attacks='clean,pgd3', device='cpu',
                 surrogate=scarce)


def test_not_even_one_image():
    model, x, y = problem()
    with pytest.raises(InputError, match='batch_size=1: does not fit into memory'):
        evaluate(Scarce(model, 0).eval(), x, y, batch_size=8, attacks='clean', device='cpu', allow_chance=True)


def test_corrupted_images_in_smaller_batches():
    model, x, y = problem()
    scarce, journals = Scarce(model, 5).eval(), []
    for network in (model, scarce):
        journals.append(Journal())
        evaluate_shift(network, list(zip(x.split(12), y.split(12))), range(24), [''] * 24, 'c', journals[-1],
                torch.device('cpu'))
    assert journals[0].correct == journals[1].correct and max(scarce.sizes) == 3


@pytest.mark.parametrize('of', [
    lambda model, x, y: diagnose(model, x, y, Linf(.01), batch_size=8, steps=(1, 2, 3), black_box_queries=4),
    lambda model, x, y: measure_properties(model, x, y, Linf(.01), batch_size=8, steps=2)])
def test_measurements_name_the_batch_size(of):
    model, x, y = problem()
    with pytest.raises(InputError, match='batch_size=8: does not fit into memory'):
        of(Scarce(model, 5).eval(), x, y)


def test_nothing_is_made_on_the_default_device():
    """Where that is another, tensors would be mixed; on this one no value can be read."""
    model, x, y = problem()
    how = dict(HOW, batch_size=16, attacks='clean,pgd2,square8,fab2')
    expected = evaluate(model, x, y, **how)
    mixing = batch_statistics(TinyNet(norm=True)).eval()
    with torch.device('meta'):
        assert outcomes(evaluate(model, x, y, **how)) == outcomes(expected)
        for network in (model, mixing):
            diagnose(network, x, y, Linf(.01), batch_size=8, steps=(1, 2), black_box_queries=4)
        measure_properties(model, x, y, Linf(.01), batch_size=8, steps=2)
        task = create_task(NoFrostStar(noise2net=True, terms=3), model, nn.CrossEntropyLoss(), space=InputSpace(),
                           attack=TrainingAttack(steps=1), device=torch.device('cpu'), verbose=False)
        task(x[:8], y[:4].repeat(2))['loss'].backward()


def test_what_did_not_fit_is_let_go():
    """The traceback of an error keeps the tensors of all functions it went through."""
    gone = []

    class Tensors:
        def __del__(self):
            gone.append(True)

    def work(size):
        kept = Tensors()
        if size > 2:
            raise torch.OutOfMemoryError(str(kept))
        return list(gone), size

    assert halving(work, 8) == (([True, True], 2), 2)
