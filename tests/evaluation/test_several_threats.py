"""Several threat models at once: a column for each, and the worst case over all."""
import re
from dataclasses import replace

import pytest
import torch
from helpers import TinyNet

from timm_robust.attacks import L1, L2, PGD, Linf, parse_threats
from timm_robust.cli import compare, models
from timm_robust.cli import eval as eval_command
from timm_robust.errors import InputError
from timm_robust.evaluation import EvaluationReport, evaluate
from timm_robust.evaluation.comparison import collect
from timm_robust.evaluation.render import html_table, words
from timm_robust.hub.card import result_rows
from timm_robust.inputs import write_json

THREATS = (Linf('1/255'), L2(.1), L1(1))
TEXT = 'Linf 1/255, L2 0.1, L1 1'


def measured(threat, **kwargs):
    torch.manual_seed(5)
    model, x = TinyNet().eval(), torch.rand(24, 3, 8, 8)
    with torch.no_grad():
        model.fc.weight *= 20
        model.fc.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    return evaluate(model, x, y, **{
        'attacks': 'clean,fgsm,pgd3', 'threat': threat, 'batch_size': 8, 'progress': False, 'save_images': 0,
        **kwargs})


@pytest.fixture(scope='module')
def together():
    return measured(TEXT)


@pytest.fixture(scope='module')
def apart():
    return [measured(threat) for threat in THREATS]


def test_every_threat_model_has_the_outcomes_it_has_alone(together, apart):
    names = ['clean', *(f'{attack} {threat}' for threat in THREATS for attack in ('fgsm', 'pgd3'))]
    assert [a.name for a in together.attacks] == names
    assert [str(t) for t in together.threats] == TEXT.split(', ') and str(together.threat) == TEXT
    for threat, own in zip(THREATS, apart):
        for attack in ('fgsm', 'pgd3'):
            found = together[f'{attack} {threat}']
            assert found.correct == own[attack].correct and found.threat == own[attack].threat
            assert together.accuracy(found.name) == own.accuracy(attack)
            assert together.standing(found.name) == own.standing(attack), 'cumulative over another threat model too'
    worst = tuple(map(all, zip(*(own.worst_case for own in apart))))
    assert together.worst_case == worst and sum(worst) < min(sum(own.worst_case) for own in apart)
    assert together.robust_accuracy.accuracy == together.worst_case_accuracy == 100 * sum(worst) / 24
    assert together.robust_accuracy.attacks == ('fgsm', 'pgd3')


def test_a_sequence_of_attacks_begins_anew_with_each_threat_model(together, apart):
    turn, alone = measured(THREATS, worst_case=True), [measured(t, worst_case=True) for t in THREATS]
    assert turn.worst_case == together.worst_case
    for threat, own in zip(THREATS, alone):
        assert turn[f'pgd3 {threat}'].correct == own['pgd3'].correct
        assert turn.accuracy(f'pgd3 {threat}') == own.accuracy('pgd3')
    assert [row[1:] for row in words.threat_rows(turn)[1:]] == [row[1:] for row in words.threat_rows(together)[2:]] * 2


def test_the_table_of_all_threat_models(together, apart, tmp_path):
    rows = words.threat_rows(together)
    assert words.threat_header(together)[1:] == (*TEXT.split(', '), 'worst case over all')
    assert [row[0] for row in rows] == ['fgsm', 'pgd3', 'all attacks']
    for attack, row in zip(('fgsm', 'pgd3'), rows):
        over_all = tuple(map(all, zip(*(own[attack].correct for own in apart))))
        assert row[1:] == (*(f'{own.accuracy(attack):.2f}' for own in apart), f'{100 * sum(over_all) / 24:.2f}')
    assert rows[-1][1:] == (
        *(f'{own.worst_case_accuracy:.2f}' for own in apart), f'{together.worst_case_accuracy:.2f}')
    assert words.threat_rows(apart[0]) == []
    together.save(tmp_path)
    assert EvaluationReport.load(tmp_path) == together
    page, markdown = (tmp_path / 'report.html').read_text(), (tmp_path / 'report.md').read_text()
    for text in (page, markdown, str(together)):
        assert 'worst case over all' in text and f'{together.worst_case_accuracy:.2f}' in text
    assert re.search(r'\| all attacks \|', markdown) and '<td>pgd3</td>' in html_table(together)
    worst = f'{together.worst_case_accuracy:.2f} % in the worst case of fgsm and pgd3 ({TEXT}, 24 images'
    assert f'robust accuracy at most {worst}' in words.headline(together)


def test_networks_are_compared_by_threat_model_and_by_the_worst_case(together, apart, tmp_path):
    for name, report in (('all', together), ('again', measured(list(THREATS))), ('l2', apart[1])):
        report.save(tmp_path / name)
    found = collect({'a': [tmp_path / 'all'], 'b': [tmp_path / 'again']})['a']
    named = {key.partition(' (')[0]: value for key, value in found.items()}
    assert list(named) == [*(a.name for a in together.attacks), f'worst case of {TEXT}']
    assert named[f'worst case of {TEXT}'] == together.worst_case_accuracy
    with_one = collect({'a': [tmp_path / 'all'], 'b': [tmp_path / 'l2']})
    assert [key.partition(' (')[0] for key in with_one['b']] == ['clean', 'fgsm L2 0.1', 'pgd3 L2 0.1']
    compare.run([f'a={tmp_path / "all"}', f'b={tmp_path / "again"}', '-o', str(tmp_path / 'figure.png')])


def test_cumulative_accuracies_are_compared_if_the_attacks_before_are_the_same(tmp_path):
    made = {'a': 'clean,fgsm,pgd3', 'b': 'clean,fgsm,pgd3', 'other': 'clean,pgd2,pgd3', 'alone': 'clean,pgd3'}
    reports = {name: measured(Linf('1/255'), attacks=attacks, worst_case=True) for name, attacks in made.items()}
    for name, report in reports.items():
        report.save(tmp_path / name)
    assert not reports['a']['pgd3'].complete and reports['alone']['pgd3'].complete
    found = collect({name: [tmp_path / name] for name in 'ab'})['a']
    assert {key.partition(' (')[0]: value for key, value in found.items()} == {
        'clean': reports['a'].clean_accuracy, 'fgsm Linf 1/255': reports['a'].accuracy('fgsm'),
        'pgd3 after fgsm Linf 1/255': reports['a'].worst_case_accuracy}
    for name in ('other', 'alone'):
        with pytest.raises(InputError, match='pgd3 Linf 1/255 was measured .*with other settings'):
            collect({'a': [tmp_path / 'a'], name: [tmp_path / name]})


def test_a_card_and_the_list_of_models_say_the_worst_case(together, tmp_path):
    rows = result_rows([('toys', together)])
    assert rows[0][2:5] == (TEXT, 'worst case over all', '-')
    assert rows[0][6] == f'{together.worst_case_accuracy:.2f}' and len(rows) == 8
    assert {(row[2], row[3]) for row in rows[1:-1]} == {(str(t), a) for t in THREATS for a in ('fgsm', 'pgd3')}
    with_autoattack = replace(together, attacks=tuple(
        a if a.is_clean else replace(a, attack={'attack': 'autoattack'}) for a in together.attacks))
    assert with_autoattack.robust_accuracy.accuracy == together.worst_case_accuracy
    write_json(tmp_path / 'results.json', with_autoattack.to_dict())
    assert models._accuracies(tmp_path / 'results.json')[2:] == (
        TEXT, f'{together.clean_accuracy:.2f}', f'{together.worst_case_accuracy:.2f}')
    clean, *_ = together.attacks
    changed = replace(together, attacks=(replace(clean, correct=(False,) * 24),))
    some = replace(together, data=replace(together.data, num_images=25))
    for name, of_all, expected in (('toys', changed, 0.), ('other', changed, together.clean_accuracy),
                                   ('toys', some, together.clean_accuracy)):
        write_json(tmp_path / 'results.json', {
            'data_names': ['toys', name], 'evaluations': [
                replace(report, data=replace(report.data, num_images=number)).to_dict()
                for report, number in ((with_autoattack, 25), (of_all, of_all.data.num_images))]})
        assert models._accuracies(tmp_path / 'results.json')[3] == f'{expected:.2f}'


@pytest.mark.parametrize('threat, more, message', [
    ('Linf 1/255, linf 1/255', {}, 'names one threat model twice'), ('Linf 1/255,', {}, 'is not a threat model'),
    ((), {}, 'is not a threat model'), (TEXT, {'eps_sweep': '0,.1'}, 'eps_sweep=.*needs a single threat model'),
    ('L2 .1, L1 1', {'attacks': 'rays'}, 'supports only Linf, not L2'),
    (TEXT, {'attack_settings': {'step_size': .01}}, 'step_size=0.01: needs a single threat model'),
    (TEXT, {'attacks': [PGD(steps=2, step_size=.02)]}, 'step_size=0.02: needs a single threat model')])
def test_threat_models_that_do_not_go_together(threat, more, message):
    with pytest.raises(InputError, match=message):
        measured(threat, **more)


def test_threat_models_are_read_from_text_and_lists():
    assert parse_threats(TEXT) == parse_threats(list(THREATS)) == THREATS
    assert parse_threats(L2(1)) == parse_threats('L2 1') == (L2(1),)


@pytest.mark.parametrize('argv, expected', [
    (['--threat', TEXT], TEXT), (['--norm', 'L1', '--eps', '12'], L1(12)), ([], Linf('8/255'))])
def test_the_flag(argv, expected, monkeypatch, tmp_path):
    class Asked(Exception):
        pass

    def ask(*_, threat, **__):
        raise Asked(threat)

    monkeypatch.setattr(eval_command, 'evaluate', ask)
    with pytest.raises(Asked) as asked:
        eval_command.run(['--model', 'resnet18', '--data-dir', str(tmp_path), *argv])
    assert asked.value.args == (expected,)
    if '--threat' in argv:
        with pytest.raises(InputError, match='eps=.*conflicts with `threat`'):
            eval_command.run(['--model', 'resnet18', '--data-dir', str(tmp_path), '--eps', '.1', *argv])


def test_distances_are_in_the_norm_of_their_attack_and_have_no_common_curve():
    report = measured('Linf 2/255, L2 0.3', attacks='clean,fmn20')
    notes = ' '.join(words.reading(report))
    assert re.findall(r'fmn20 (Linf|L2) .*? is [\d.e-]+ in (\S+) ', notes) == [('Linf', 'Linf'), ('L2', 'L2')]
    assert words.eps_curves(report) == {}


def test_networks_of_other_images_are_not_compared(apart, tmp_path):
    report = apart[1]
    data = report.data
    for name, changed in (
            ('same', data), ('pixels', replace(data, sha256='0' * 64)),
            ('indices', replace(data, indices=tuple(i + 1 for i in data.indices))),
            ('labels', replace(data, labels=tuple((label + 1) % 4 for label in data.labels)))):
        replace(report, data=changed).save(tmp_path / name)
        folders = {'a': [tmp_path / 'same'], 'b': [tmp_path / name]}
        if name == 'same':
            assert collect(folders)['a'] == collect(folders)['b']
        else:
            with pytest.raises(InputError, match='measured on other images'):
                collect(folders)
    replace(report, data=replace(data, sha256='')).save(tmp_path / 'joined')
    collect({'a': [tmp_path / 'same'], 'b': [tmp_path / 'joined']})
    # images resized in another way have another hash, which says nothing
    replace(report, data=replace(data, sha256='0' * 64), model=replace(report.model, crop_pct=.5)).save(tmp_path / 'r')
    collect({'a': [tmp_path / 'same'], 'b': [tmp_path / 'r']})
    replace(report, settings=replace(report.settings, surrogate='s', surrogate_sha256='f')).save(tmp_path / 's')
    with pytest.raises(InputError, match='with other settings'):
        collect({'a': [tmp_path / 'same'], 'b': [tmp_path / 's']})
