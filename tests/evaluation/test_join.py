"""Joining reports of parts of a data set."""
from dataclasses import replace

import pytest

from timm_robust.errors import InputError
from timm_robust.evaluation import (
    AttackOutcome,
    DataFacts,
    EvaluationReport,
    Finding,
    LossSurface,
    ModelFacts,
    RunFacts,
    ThreatFacts,
    join_reports,
)
from timm_robust.evaluation.outcome import EpsPoint

THREAT = ThreatFacts('Linf', 8 / 255, 'Linf 8/255')
SURFACE = LossSurface('Linf', 8 / 255, 4, 100, (-1., 0., 1.), ((0., 1., 2.), (0., 1., 3.), (0., 1., 2.)))


def part(indices, clean, pgd, **settings):
    return EvaluationReport(
        model=ModelFacts(name='net', weights_sha256='c0ffee'),
        data=DataFacts(dataset='ImageFolder', split='test', subset=f'{indices}.txt', num_images=10, indices=indices,
                       labels=[i % 3 for i in indices], sha256='of these'),
        threat=THREAT,
        settings=RunFacts(**{'worst_case': True, 'command': f'eval {indices}', **settings}),
        attacks=[
            AttackOutcome('clean', {'attack': 'clean'}, None, '', clean, 0, .1),
            AttackOutcome('pgd2', {'attack': 'pgd', 'steps': 2}, THREAT, '2', pgd, sum(clean), 1.)])


def parts():
    return (part([7, 2, 5], [True, True, False], [True, False, None]), part([0, 9], [False, True], [None, True]))


def test_outcomes_of_all_images_in_their_order():
    first, second = parts()
    first = replace(first, findings=(Finding('noise', 'ok', 'Fine.', {}),), surface=SURFACE)
    whole = join_reports([first, second])
    assert whole.data.indices == (7, 2, 5, 0, 9) and whole.data.labels == (1, 2, 2, 0, 0)
    assert whole['clean'].correct == (True, True, False, False, True)
    assert whole['pgd2'].correct == (True, False, None, None, True)
    assert whole['pgd2'].attacked == 3 and whole['pgd2'].seconds == 2.
    assert whole.accuracy('clean') == 60. and whole.accuracy('pgd2') == whole.worst_case_accuracy == 40.
    assert whole.data.sha256 == '' and whole.findings == first.findings and whole.surface == SURFACE
    assert whole.settings == first.settings
    assert EvaluationReport.from_json(whole.to_json()) == whole
    assert join_reports([first]) == first


@pytest.mark.parametrize('of_parts, joined', [
    ((False, False), False), ((False, None), None), ((True, None), True), ((False, True), True)])
def test_one_randomized_part_is_enough_and_one_unknown_part_leaves_it_open(of_parts, joined):
    reports = [replace(r, settings=replace(r.settings, randomized=known)) for r, known in zip(parts(), of_parts)]
    assert join_reports(reports).settings.randomized is joined


@pytest.mark.parametrize('changed,words', [
    (lambda r: replace(r, model=replace(r.model, weights_sha256='tea')), ('model', 'weights_sha256')),
    (lambda r: replace(r, data=replace(r.data, split='train')), ('data', 'split')),
    (lambda r: replace(r, settings=replace(r.settings, seed=1)), ('settings', 'seed')),
    (lambda r: replace(r, attacks=r.attacks[:1]), ('attacks', 'pgd2')),
    (lambda r: replace(r, attacks=r.attacks[::-1]), ('attacks', 'order')),
    (lambda r: replace(r, attacks=[r.attacks[0], replace(r.attacks[1], attack={'attack': 'pgd', 'steps': 3})]),
     ('attacks', 'pgd2')),
    (lambda r: replace(r, attacks=[r.attacks[0], replace(r.attacks[1], threat=ThreatFacts('Linf', .1, 'Linf 0.1'))]),
     ('attacks', 'pgd2')),
    (lambda r: replace(r, versions={**r.versions, 'torch': '1'}), ('versions', 'torch')),
    (lambda r: replace(r, data=replace(r.data, indices=(0, 7))), ('images in common',)),
    (lambda r: replace(r, eps_sweep=[EpsPoint(.1, 1, 2)]), ('sweeps',))])
def test_parts_of_different_evaluations_are_refused(changed, words):
    first, second = parts()
    with pytest.raises(InputError) as error:
        join_reports([first, changed(second)])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_has_no_joint_outcome_is_refused():
    with pytest.raises(InputError, match='is empty'):
        join_reports([])
    by_batch = [replace(r, settings=replace(r.settings, batch_dependent=True)) for r in parts()]
    with pytest.raises(InputError, match='their batches only'):
        join_reports(by_batch)
    assert join_reports(by_batch[:1]) == by_batch[0]
