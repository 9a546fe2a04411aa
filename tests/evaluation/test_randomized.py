"""Networks with noise inside, whose error rate on each image, clean and under attack, is known."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from timm_robust.attacks import APGD, AutoAttack, Linf
from timm_robust.evaluation import EvaluationReport, Journal, evaluate, wilson_interval
from timm_robust.evaluation.journal import Measured
from timm_robust.evaluation.render import words

EPS, NOISE = .05, .05
STANDARD_ERROR = .05  # of a rate in 100 passes, at most
LEADS = torch.tensor([-.1, -.06, -.02, .03, .06, .09, .12, .15, .2, .25])  # of the true class over the other, clean


class Noisy(nn.Module):
    """Bright images are of class 1: its single output is the brightness above 1/2, and noise."""

    def forward(self, x):
        return x.mean((1, 2, 3), keepdim=True).flatten(1) - .5 + NOISE * torch.randn(len(x), 1)


class Rand(AutoAttack):
    """AutoAttack rand with fewer steps."""

    def members(self, num_classes=None, threat=None):
        return tuple(replace(member, steps=4) for member in AutoAttack(version='rand').members(num_classes))


def rate(lead):
    """Probability of an error."""
    return torch.special.ndtr(-lead / NOISE)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return Noisy().eval(), (LEADS + .5).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone(), torch.ones(10, dtype=torch.int64)


def test_an_image_is_broken_if_half_of_the_passes_are_fooled(problem):
    model, x, y = problem
    found = Rand(version='rand').run(model, x, y, Linf(EPS))
    wrong_when_clean = rate(LEADS) > .5
    expected = torch.where(wrong_when_clean, rate(LEADS), rate(LEADS - EPS))
    assert (found.error_rates - expected).abs().max() < 4 * STANDARD_ERROR
    clear = (expected - .5).abs() > 4 * STANDARD_ERROR
    assert torch.equal(found.fooled[clear], expected[clear] > .5)
    assert (~found.fooled & (found.error_rates > .02)).sum() >= 2, 'nothing that a single pass would have miscounted'
    alone = APGD(steps=4, eot_iter=20).run(model, x, y, Linf(EPS))
    assert (alone.error_rates - rate(LEADS - EPS)).abs().max() < 4 * STANDARD_ERROR
    assert torch.equal(alone.fooled, alone.error_rates >= .5) and (alone.error_rates[~alone.fooled] > 0).any()
    assert APGD().run(model, x, y, Linf(EPS)).error_rates is None


@pytest.mark.parametrize('worst_case', [False, True])
def test_an_evaluation_says_how_often(problem, worst_case, tmp_path):
    model, x, y = problem
    attacks = ['clean', APGD(steps=4), Rand(version='rand')] if worst_case else ['clean', Rand(version='rand')]
    report = evaluate(
        model, x, y, threat=Linf(EPS), attacks=attacks, worst_case=worst_case, progress=False, diagnose=False,
        save_images=0, allow_chance=True, output=str(tmp_path / 'out'))
    outcome = report['autoattack-rand']
    assert outcome.passes == report['clean'].passes == 100
    assert EvaluationReport.load(tmp_path / 'out') == report
    rates = torch.tensor([math.nan if r is None else r for r in report['clean'].error_rates])
    assert (rates - rate(LEADS)).abs().max() < 4 * STANDARD_ERROR
    if worst_case:
        assert None in outcome.error_rates and outcome.single_pass_accuracy is None
        return
    expected = torch.where(rate(LEADS) > .5, rate(LEADS), rate(LEADS - EPS))
    assert (torch.tensor(outcome.error_rates) - expected).abs().max() < 4 * STANDARD_ERROR
    assert outcome.correct == tuple(r < .5 for r in outcome.error_rates)
    mean = 100 - 10 * sum(outcome.error_rates)
    assert outcome.single_pass_accuracy == pytest.approx(mean)
    intervals = [wilson_interval(100 * r, 100) for r in outcome.error_rates]
    low, high = outcome.verdict_interval
    assert (low, high) == (10 * sum(b < 50 for _, b in intervals), 10 * sum(a <= 50 for a, _ in intervals))
    assert low < high and low <= outcome.accuracy <= high
    low, high = wilson_interval(mean / 10, 10)
    said = f'A single pass classifies {mean:.2f} % correctly (95 % interval {low:.1f} to {high:.1f})'
    assert said in ' '.join(str(report).split())


def test_rates_are_resumed_and_merged(tmp_path):
    contexts = {'a': {'passes': 100}}
    with Journal(tmp_path, contexts) as journal:
        journal.record('a', [3, 4], ['x', 'y'], [True, False], 1., [Measured(.25), Measured(.75)])
        journal.record('a', [5], ['z'], [True], 1.)
    again = Journal(tmp_path, contexts)
    again.take('a', [3, 4, 5], ['x', 'changed', 'z'])
    assert again.measured['a'] == {3: Measured(.25), 5: Measured()} and again.correct['a'] == {3: True, 5: True}
    other = Journal()
    other.merge([journal.state()])
    assert other.measured['a'] == {3: Measured(.25), 4: Measured(.75)}


def test_an_evaluation_by_single_passes_warns(problem):
    model, x, y = problem
    settings = dict(threat=Linf(EPS), allow_chance=True, progress=False, save_images=0, diagnose=False)
    report = evaluate(model, x, y, attacks='clean,pgd2', **settings)
    assert report.settings.randomized and 'WARNING: This network is randomized' in str(report)
    assert ('warning', words._RANDOMIZED) in words.warnings(report)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    calm = evaluate(mean, x, torch.zeros_like(y), attacks='clean', **settings)
    assert calm.settings.randomized is False and 'randomized' not in str(calm)
    assert torch.equal(torch.get_rng_state(), before)
    several = evaluate(model, x, y, attacks=[Rand(version='rand')], **settings)
    assert several.settings.randomized is None and 'WARNING' not in str(several)
