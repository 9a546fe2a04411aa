"""Reports: numbers, JSON, pages, figures."""
import base64
import html
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from timm_robust.attacks import AutoAttack
from timm_robust.data.corruptions import COMMON_CORRUPTIONS
from timm_robust.errors import InputError
from timm_robust.evaluation import (
    AttackOutcome,
    DataFacts,
    EvaluationReport,
    Example,
    Finding,
    LossSurface,
    ModelFacts,
    RunFacts,
    ThreatFacts,
    read_reports,
    versions,
    wilson_interval,
)
from timm_robust.evaluation.outcome import EpsPoint, GammaPoint
from timm_robust.evaluation.render import plot_eps_sweep, plot_images, words, write_report
from timm_robust.evaluation.render.figures import panels, to_png
from timm_robust.evaluation.render.words import HEADER, attack_rows, headline
from timm_robust.evaluation.shifts import BenchmarkResult, PartResult
from timm_robust.inputs import files

ROOT = Path(__file__).parents[2]
THREAT = ThreatFacts('Linf', 8 / 255, 'Linf 8/255')
HOSTILE = '<script>alert(1)</script>|`*_[x](http://x.example/)$\\frac$"\'&'
FINDINGS = (
    Finding('zero_gradients', 'ok', 'No gradient is zero.', {}),
    Finding('saturated_logits', 'warning', 'Logits saturate.', {'count': 3}),
    Finding('black_box', 'alarm', 'Square breaks 3 images < 5.', {}),
    Finding('transfer', 'skipped', 'No surrogate.', {}),
)
SURFACE = LossSurface('Linf', 8 / 255, 4, 100, (-1., 0., 1.), ((0., 1., 2.), (0., 1., 3.), (0., 1., 2.)))

# images of eight that withstand each attack, the first seven being right when clean
WITHSTANDS = {'clean': 7, 'fgsm': 6, 'pgd20': 4, 'square100': 5, 'autoattack': 3, 'autoattack-plus': 2, 'rays100': 2}
EFFORT = {'fgsm': '1', 'pgd20': '20', 'square100': '100 queries', 'rays100': '100 queries'}


def make_report(names, worst_case=False, batch_dependent=False, model='net', findings=(), command='', **settings):
    outcomes, standing = [], [True] * 8
    for name in names.split(','):
        correct = [i < WITHSTANDS[name] for i in range(8)]
        if name == 'square100':
            correct[0] = False  # breaks an image the attacks above it do not
        if worst_case and name != 'clean':
            correct = [None if i < 7 and not stands else right
                       for i, (right, stands) in enumerate(zip(correct, standing))]
        attacked = sum(standing) if worst_case else 7
        standing = [stands and right is not False for stands, right in zip(standing, correct)]
        kind = 'autoattack' if name.startswith('autoattack') else name.rstrip('0123456789')
        attack = {'attack': kind} if name == 'clean' else {'attack': kind, 'steps': 20, 'step_size': 1 / 255}
        outcomes.append(AttackOutcome(
            name, attack, None if name == 'clean' else THREAT, EFFORT.get(name, ''), correct,
            0 if name == 'clean' else attacked, 1.25))
    return EvaluationReport(
        model=ModelFacts(name=model, weights_sha256='c0ffee' * 10, mean=(.5, .25, .125)),
        data=DataFacts(
            dataset='ImageFolder', data_dir='/some/folder', split='test', indices=range(10, 18), labels=range(8),
            class_names=('cat', 'dog')),
        threat=THREAT,
        settings=RunFacts(
            seed=3, worst_case=worst_case, batch_dependent=batch_dependent, date='2020-02-02T02:02:02+00:00',
            command=command or 'timm-robust eval --model net', **settings),
        attacks=outcomes,
        eps_sweep=(EpsPoint(0., 7, 8), EpsPoint(8 / 255, 1, 8)),
        findings=findings)


def make_examples(channels=3):
    clean = torch.rand(channels, 8, 8) * .8 + .1
    common = dict(clean=clean, adversarial=clean + (8 / 255) * torch.randn(channels, 8, 8).sign(),
                  clean_confidence=.9112, confidence=.6789)
    return (Example(attack='fgsm', label=0, prediction=1, **common),
            Example(attack='pgd20', label=1, prediction=1, **common))


class Page(HTMLParser):
    """What a browser would find: tags, attributes, text and the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.sources, self.tables, self.words = [], [], [], [], []
        self.cell = False
        self.feed(text)
        self.text = ' '.join(' '.join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.sources += [(tag, value) for name, value in attrs if name in ('src', 'href', 'srcset', 'data', 'action')]
        if tag == 'table':
            self.tables.append([])
        if tag == 'tr':
            self.tables[-1].append([])
        self.cell = tag in ('td', 'th')

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        self.words.append(data)
        if self.cell:
            self.tables[-1][-1].append(data)


def written(folder, report, examples=(), surface=None):
    replace(report, examples=examples, surface=surface).save(folder)
    return Page((folder / 'report.html').read_text()), (folder / 'report.md').read_text()


def markdown_rows(text, first):
    """Cells of the table whose first heading is `first`."""
    lines = text[text.index(f'| {first} |'):].split('\n\n')[0].splitlines()
    return [line.strip('| ').split(' | ') for line in lines[:1] + lines[2:]]


@pytest.mark.parametrize('worst_case', [False, True])
def test_tables_hold_the_numbers_of_the_report(tmp_path, worst_case):
    report = make_report('clean,fgsm,pgd20,square100', worst_case)
    assert [o.accuracy is None for o in report.attacks] == ([False, False, True, True] if worst_case else [False] * 4)
    page, markdown = written(tmp_path, report)
    alone = ['87.50', '75.00', '-', '-'] if worst_case else ['87.50', '75.00', '50.00', '50.00']
    cumulative = ['87.50', '75.00', '50.00', '37.50']
    interval = ['52.9 to 97.8', '40.9 to 92.9', *(['-'] * 2 if worst_case else ['21.5 to 78.5'] * 2)]
    attacked = ['-', *(['7', '6', '4'] if worst_case else ['7'] * 3)]
    for table in (page.tables[0], markdown_rows(markdown, 'attack')):
        assert table[0] == list(HEADER)
        names, threats, efforts, *columns, seconds = zip(*table[1:])
        assert [name.split(' (')[0] for name in names] == ['clean', 'fgsm', 'pgd20', 'square100']
        assert [name.replace('\\', '') for name in names] == [o.label for o in report.attacks]
        assert set(seconds) == {'1.2'}
        assert threats == ('-', *['Linf 8/255'] * 3) and efforts == ('-', '1', '20', '100 queries')
        assert list(map(list, columns)) == [attacked, alone, interval, cumulative]
    for table in (page.tables[1], markdown_rows(markdown, 'eps')):
        assert table[1:] == [['0', '87.50'], ['8/255', '12.50']]
    said = 'there is no per-attack accuracy' if worst_case else '"This attack"'
    assert said in page.text and said in markdown


def test_a_report_of_benchmarks_alone_names_no_attacked_images():
    report = make_report('clean,fgsm')
    assert '8 images, seed' in str(report)
    bare = str(replace(report, attacks=(), findings=(), eps_sweep=()))
    assert ' images, seed' not in bare and f'\nseed {report.settings.seed}, ' in bare


def test_bars_are_as_long_as_the_accuracies(tmp_path):
    report = make_report('clean,fgsm,pgd20,square100')
    written(tmp_path, report)
    bars = re.findall(r'<div class="bar">.*?</svg>', (tmp_path / 'report.html').read_text(), re.S)
    for bar, alone, cumulative in zip(bars, (87.5, 75, 50, 50), (87.5, 75, 50, 37.5), strict=True):
        widths = {kind: float(w) for kind, w in re.findall(r'class="(\w+)" width="([\d.]+)"', bar)}
        assert widths['worst'] == cumulative and widths.get('alone', widths['worst']) == alone
    assert 'class="alone"' in bars[3], 'square100 leaves more than all together'


@pytest.mark.parametrize('names, worst_case, sentence, interval', [
    ('clean,fgsm', False, 'Clean accuracy 87.50 %, robust accuracy at most 75.00 % under fgsm', '40.9 to 92.9'),
    ('clean,fgsm,pgd20,square100', False,
     'Clean accuracy 87.50 %, robust accuracy at most 37.50 % in the worst case of fgsm, pgd20 and square100',
     '13.7 to 69.4'),
    ('clean,pgd20,autoattack', False, 'Clean accuracy 87.50 %, robust accuracy 37.50 % under autoattack',
     '13.7 to 69.4'),
    ('clean,pgd20,autoattack', True,
     'Clean accuracy 87.50 %, robust accuracy 37.50 % in the worst case of pgd20 and autoattack', '13.7 to 69.4'),
    ('pgd20', False, 'Robust accuracy at most 50.00 % under pgd20', '21.5 to 78.5'),
])
def test_headline(tmp_path, names, worst_case, sentence, interval):
    sentence += f' (Linf 8/255, 8 images, seed 3; 95 % interval {interval}).'
    if 'autoattack' not in names:
        sentence += ' These attacks give an upper bound on robust accuracy; stronger ones (AutoAttack) may lower it.'
    report = make_report(names, worst_case)
    assert headline(report) == sentence
    page, markdown = written(tmp_path, report)
    assert sentence in page.text and f'**{sentence}**' in markdown
    assert ('≤ ' in page.text) == ('autoattack' not in names)
    assert sentence in html.unescape(report._repr_html_())


def test_headline_is_autoattacks_and_owns_up_to_what_beats_it():
    report = make_report('clean,autoattack,rays100')
    assert (report.robust_accuracy.accuracy, report.robust_accuracy.attacks) == (37.5, ('autoattack',))
    assert headline(report).endswith('Under all attacks together it is 25.00 %.')
    both = make_report('autoattack,autoattack-plus').robust_accuracy
    assert (both.accuracy, both.attacks) == (25., ('autoattack-plus',))
    worst_case = make_report('clean,fgsm,autoattack,rays100', worst_case=True).robust_accuracy
    assert (worst_case.accuracy, worst_case.attacks) == (37.5, ('fgsm', 'autoattack'))


def test_the_report_says_which_autoattack_few_classes_get(tmp_path):
    report = make_report('clean,autoattack')
    few = replace(
        report, model=replace(report.model, num_classes=3), attacks=[
            report['clean'], replace(report['autoattack'], members=[m.to_dict() for m in AutoAttack().members(3)])])
    said = 'The model has 3 classes, too few for the difference of logits ratio (DLR): autoattack used the logit gap'
    for text in (written(tmp_path, few)[0].text, str(few), written(tmp_path, few)[1]):
        assert said in ' '.join(text.split())
    assert 'too few' not in str(report)


def test_clean_images_alone_say_nothing_about_robustness(tmp_path):
    page, markdown = written(tmp_path, make_report('clean'))
    for text in (page.text, markdown):
        assert 'Clean accuracy 87.50 %, 8 images, seed 3. No attack was run' in text
        assert 'obust accuracy under' not in text and 'Robust accuracy ' not in text


def test_a_printed_report_and_a_notebook_show_what_the_diagnosis_found():
    report = make_report('clean,fgsm', findings=FINDINGS)
    text, page = str(report), html.unescape(report._repr_html_())
    assert 'Is the robustness real?' in text and 'Is the robustness real?' not in str(make_report('clean,fgsm'))
    for finding in FINDINGS[1:3]:  # a warning and an alarm
        assert finding.text in text and finding.text in page and finding.verdict.upper() in page
    assert FINDINGS[0].text not in page


def test_warnings_stand_above_the_table(tmp_path):
    report = make_report('clean,fgsm', batch_dependent=True, findings=FINDINGS, surrogate='other_net')
    report = replace(report, data=replace(report.data, mismatch='The data lacks class cat.'))
    page, markdown = written(tmp_path, report)
    for text in (page.text, html.unescape(markdown.replace('\\', ''))):
        top = text[:text.index('this attack (%)')]
        for expected in ('normalizes by the current batch', 'crafted on other_net', 'The data lacks class cat.',
                         'Black box: Square breaks 3 images < 5.', 'Saturated logits: Logits saturate.'):
            assert expected in top, expected
        assert top.index('Square breaks') < top.index('Logits saturate'), 'an alarm comes before a warning'
        assert 'No gradient is zero' not in top and 'No gradient is zero' in text
    calm, markdown = written(tmp_path, make_report('clean,fgsm', findings=FINDINGS[:1]))
    assert 'Warning:' not in calm.text and 'Alarm:' not in calm.text and '>' not in markdown


def test_every_finding_has_its_verdict(tmp_path):
    page, markdown = written(tmp_path, make_report('clean,fgsm', findings=FINDINGS))
    for text in (page.text, markdown):
        section = text[text.index('Is the robustness real?'):]
        assert '1 alarm and 1 warning in 4 checks, 1 skipped: the robust accuracy may not be real.' in section
        places = [section.index(FINDINGS[i].text[:9]) for i in (2, 1, 3, 0)]
        assert places == sorted(places), 'the gravest first'
    assert 'No sign of false robustness in 1 check.' in written(
        tmp_path, make_report('clean,fgsm', findings=FINDINGS[:1]))[1]
    for finding, name in zip(FINDINGS, ('Zero gradients', 'Saturated logits', 'Black box', 'Transfer')):
        assert f'{finding.verdict} {name}. {finding.text}' in page.text
        assert f'- **{finding.verdict}** {name}: {html.escape(finding.text)}' in markdown


def test_what_comes_from_outside_is_text(tmp_path):
    hostile = make_report('clean,fgsm', model=HOSTILE, findings=FINDINGS, command=f'```\n{HOSTILE}')
    hostile = replace(
        hostile,
        data=replace(hostile.data, data_dir=HOSTILE, class_names=(HOSTILE, HOSTILE)),
        attacks=(hostile.attacks[0], replace(hostile.attacks[1], name=HOSTILE)),
        findings=(*FINDINGS[:2], replace(FINDINGS[2], text=HOSTILE), FINDINGS[3]))
    page, markdown = written(tmp_path, hostile, [replace(e, attack=HOSTILE) for e in make_examples()], SURFACE)
    tame = make_report('clean,fgsm', findings=FINDINGS)
    usual, _ = written(tmp_path / 'tame', tame, make_examples(), SURFACE)
    assert page.tags == usual.tags and page.attributes == usual.attributes
    assert page.text.count(HOSTILE) >= 8
    assert page.tables[0][2][0] == f'{HOSTILE} (steps 20, step_size 0.00392156862745098)'
    assert Page(hostile._repr_html_()).tags == Page(tame._repr_html_()).tags

    prose, command = re.subn(r'\n````\n.*?\n````\n', '\n', markdown, flags=re.S)
    assert command == 1, 'a fence longer than the one in the command'
    assert '<' not in prose and not re.search(r'(?<!\\)[`$]', prose.replace('`results.json`', ''))
    rows = [line for line in prose.splitlines() if line.startswith('|')]
    assert {len(re.findall(r'(?<!\\)\|', row)) for row in rows} == {9, 7, 3}, 'cells of the tables'
    assert re.findall(r'(?<!\\)\]\((.*?)\)', prose) == ['eps_sweep.png', 'images.png', 'loss_surface.png']


def test_page_needs_nothing_else(tmp_path):
    page, markdown = written(tmp_path, make_report('clean,fgsm', findings=FINDINGS), make_examples(), SURFACE)
    text = (tmp_path / 'report.html').read_text()
    assert text.startswith('<!DOCTYPE html>')
    assert len(page.sources) == 2 * 3 + 2 and all(tag == 'img' for tag, _ in page.sources)
    for _, source in page.sources:
        kind, data = source.split(',')
        assert kind == 'data:image/png;base64'
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert not {'script', 'link', 'iframe', 'object'} & set(page.tags)
    assert 'http:' not in text and 'https:' not in text and 'url(' not in text and '@import' not in text
    assert 'prefers-color-scheme: dark' in text and 'name="viewport"' in text and '@media print' in text
    for name in re.findall(r'!\[.*?\]\((.*?)\)', markdown):
        Image.open(tmp_path / name).load()


def test_repetition_needs_no_look_at_the_json(tmp_path):
    page, markdown = written(tmp_path, make_report('clean,pgd20'))
    for fact in ('timm-robust eval --model net', 'c0ffee' * 10, '2020-02-02T02:02:02+00:00', '/some/folder',
                 versions()['torch'], versions()['timm'], 'cpu', str(8 / 255), 'steps 20', '0.5, 0.25, 0.125',
                 'results.json'):
        assert fact in page.text, fact
        assert fact in markdown.replace('\\', ''), fact


def test_figures_are_those_there_is_something_to_draw_for(tmp_path):
    report = make_report('clean,fgsm')
    points = (GammaPoint(0., 7, 1, 8), GammaPoint(1., 5, 4, 8))
    whole = replace(report, examples=make_examples(), surface=SURFACE, gamma_sweep=points)
    names = {'results.json', 'report.html', 'report.md', 'images.png', 'eps_sweep.png', 'loss_surface.png',
             'gamma_sweep.png'}
    assert {p.name for p in whole.save(tmp_path / 'a')} == names == set(os.listdir(tmp_path / 'a'))
    assert markdown_rows((tmp_path / 'a' / 'report.md').read_text(), 'gamma')[1:] == [
        ['0', '87.50', '12.50'], ['1', '62.50', '50.00']]
    few = replace(report, eps_sweep=()).save(tmp_path / 'b')
    assert {p.name for p in few} == {'results.json', 'report.html', 'report.md'} == set(os.listdir(tmp_path / 'b'))
    assert 'img' not in Page(few[1].read_text()).tags and '![' not in few[2].read_text()


def test_benchmarks(tmp_path):
    parts = [PartResult(10 * s, 100, c, s) for c in ('fog', 'snow') for s in (1, 5)]
    report = replace(make_report('clean'), attacks=(), eps_sweep=(), benchmarks=(
        BenchmarkResult('clean', (PartResult(90, 100),), 10_000, None),
        BenchmarkResult('a', (PartResult(30, 100),), 7500, 7500, 200, 20, (32, 32)),
        BenchmarkResult('corruptions', parts, 400, None)))
    page, markdown = written(tmp_path, report)
    expected = [
        ['clean', '100', '90.0', ''],
        ['a', '100', '30.0',
         'among its 200 classes; 20.0 among all classes, resized to 32x32, of 7,500 published images'],
        ['corruptions', '400', '30.0', 'mean error 70.0 % over 2 corruptions']]
    assert page.tables[0][1:] == [[c for c in row if c] for row in expected]
    severities = [['fog', '90.0', '50.0', '70.0'], ['snow', '90.0', '50.0', '70.0']]
    assert page.tables[1] == [['corruption', '1', '5', 'mean'], *severities]
    assert markdown_rows(markdown, 'corruption')[1:] == severities
    assert all(text in str(report) for row in expected for text in row)
    assert EvaluationReport.load(tmp_path) == report and 'obust accuracy' not in page.text


@pytest.mark.parametrize('channels', [1, 3])
def test_images(tmp_path, channels):
    examples = make_examples(channels)
    page, markdown = written(tmp_path, make_report('clean,fgsm,pgd20'), examples)
    shown = [Image.open(io.BytesIO(base64.b64decode(s.split(',')[1]))) for _, s in page.sources if 'base64' in s]
    clean, adversarial = examples[0].clean, examples[0].adversarial
    expected = (clean, (.5 + 10 * (adversarial - clean)).clamp(0, 1), adversarial)
    for image, tensor in zip(shown[1:4], expected):  # the first is the curve
        pixels = torch.from_numpy(np.array(image)).view(8, 8, channels).permute(2, 0, 1) / 255
        assert (pixels - tensor).abs().max() <= .51 / 255
    assert 'cat fooled by fgsm clean cat 91.1 % perturbation x10 adversarial dog 67.9 %' in page.text
    assert 'dog withstands pgd20 clean dog 91.1 % perturbation x10 adversarial dog 67.9 %' in page.text
    assert markdown_rows(markdown, 'label')[1:] == [
        ['cat', '91.1', 'fgsm', 'dog', '67.9', 'fooled'], ['dog', '91.1', 'pgd20', 'dog', '67.9', 'not fooled']]


def test_classes_without_a_name_go_by_number(tmp_path):
    report = make_report('clean,fgsm')
    report = replace(report, data=replace(report.data, class_names=('cat',)))
    page, markdown = written(tmp_path, report, make_examples())
    assert 'adversarial class 1 67.9 %' in page.text and '| class 1 |' in markdown
    page, _ = written(tmp_path, replace(report, data=replace(report.data, class_names=None)), make_examples())
    assert 'class 0 fooled by fgsm' in page.text


def test_perturbation_is_magnified_by_ten_and_cut_off():
    clean = torch.full((1, 1, 3), .4)
    example = replace(make_examples()[0], clean=clean, adversarial=clean + torch.tensor([[[.03, -.01, .2]]]))
    assert torch.allclose(panels(example)[1], torch.tensor([[[.8, .4, 1.]]]))
    assert np.array(Image.open(io.BytesIO(to_png(panels(example)[1])))).tolist() == [[204, 102, 255]]


def test_figures_by_themselves(tmp_path):
    plot_images(make_examples(1), ['$\\frac$', '_b'].__getitem__, 'a $\\title$', tmp_path / 'images.png')
    plot_eps_sweep({'$\\a$': {0.: 100., .1: 0.}, 'b': {0.: 90.}}, 'Linf', HOSTILE, tmp_path / 'sweep.png')
    for name in ('images.png', 'sweep.png'):
        image = np.array(Image.open(tmp_path / name).convert('L'))
        assert image.shape[0] > 300 and image.std() > 5, 'something is drawn'


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    make_report('clean,fgsm').save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert (tmp_path / 'results.json').stat().st_mode & 0o777 == 0o666 & ~_umask(), 'others may read it'

    def cut_off(source, target):
        raise OSError(28, 'no space')

    monkeypatch.setattr(files.os, 'replace', cut_off)
    other = make_report('clean,pgd20')
    for write in (other.save, lambda folder: write_report(other, folder)):
        with pytest.raises(OSError, match='no space'):
            write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_path_that_is_no_text(tmp_path):
    report = make_report('clean,fgsm')
    report = replace(report, data=replace(report.data, data_dir=os.fsdecode(b'/data/\xff')))
    page, markdown = written(tmp_path, report)
    assert '/data/\\udcff' in page.text and '/data/\\udcff' in markdown.replace('\\\\', '\\')
    assert EvaluationReport.load(tmp_path) == report


def test_report_as_text():
    text = str(make_report('clean,fgsm,pgd20', batch_dependent=True))
    assert all(cell in text for row in attack_rows(make_report('clean,fgsm,pgd20')) for cell in row)
    assert text.startswith('net on /some/folder (test)\n\nattack ')
    assert '8 images, seed 3, Linf 8/255.' in text and 'WARNING: This network normalizes by the current' in text
    assert 'upper bound' in text and 'upper bound' not in str(make_report('clean,autoattack'))
    assert repr(make_report('clean,fgsm')) == '<EvaluationReport of net: clean 87.50 %, fgsm 75.00 %, 8 images>'


@pytest.mark.parametrize('correct, total', [(0, 8), (8, 8), (157, 400), (1, 3), (1, 1000)])
def test_interval_is_that_of_wilson(correct, total):
    expected = binomtest(correct, total).proportion_ci(method='wilson')
    low, high = wilson_interval(correct, total)
    assert low == pytest.approx(100 * expected.low, abs=1e-9) and high == pytest.approx(100 * expected.high)
    assert 0 <= low <= 100 * correct / total <= high <= 100


def test_accuracies_are_those_of_the_outcomes():
    report = make_report('clean,pgd20,square100')
    assert report['pgd20'].correct == (True,) * 4 + (False,) * 4 and report['PGD20'] is report['pgd20']
    assert (report.clean_accuracy, report.accuracy('pgd20'), report.accuracy('square100')) == (87.5, 50., 50.)
    assert report['square100'].interval == report.interval('square100') == wilson_interval(4, 8)
    assert report.worst_case == (False, True, True, True) + (False,) * 4 and report.worst_case_accuracy == 37.5
    assert report.standing('pgd20') == report['pgd20'].correct and 'pgd20' in report and 'fgsm' not in report
    with pytest.raises(KeyError, match="'fgsm': choose one of clean, pgd20, square100"):
        report['fgsm']
    unfinished = make_report('clean,fgsm,pgd20', worst_case=True)
    assert unfinished['pgd20'].accuracy is None and unfinished['pgd20'].interval is None
    assert unfinished.accuracy('pgd20') == 50. and unfinished.interval('pgd20') == wilson_interval(4, 8)


def test_as_a_table_of_pandas():
    pytest.importorskip('pandas')
    table = make_report('clean,fgsm,pgd20', worst_case=True).to_pandas()
    assert table.index.tolist() == list(range(10, 18)) and table['label'].tolist() == list(range(8))
    assert table['pgd20'].isna().tolist() == [False] * 6 + [True, False] and table['clean'].mean() == .875


def test_json_and_back(tmp_path):
    report = make_report('clean,fgsm,pgd20', worst_case=True, findings=FINDINGS)
    report = replace(report, surface=SURFACE, gamma_sweep=(GammaPoint(0., 7, 1, 8),), benchmarks=(
        BenchmarkResult('c', (PartResult(1, 2, 'fog', 1),), 2),))
    again = EvaluationReport.from_json(report.to_json())
    assert again == report and again.to_json() == report.to_json()
    report.save(tmp_path)
    assert EvaluationReport.load(tmp_path) == EvaluationReport.load(tmp_path / 'results.json') == report
    assert replace(report, examples=make_examples()) == report
    assert replace(report, settings=replace(report.settings, seed=4)) != report
    content = json.loads(report.to_json())
    assert content['attacks'][1]['accuracy'] == 75. and content['attacks'][1]['interval'] == [
        pytest.approx(40.93, abs=.01), pytest.approx(92.85, abs=.01)]
    assert '"correct": [ true, true, ' in report.to_json(), 'a line for each list'


@pytest.mark.parametrize('path, value, message', [
    (('attacks', 1, 'accuracy'), 99.9, 'says 99.9 % but its outcomes give 75.0 %: it was edited'),
    (('attacks', 2, 'worst_case_so_far'), 99.9, 'says 99.9 % but its outcomes give 50.0 %'),
    (('worst_case_accuracy',), 99.9, 'says 99.9 % but its outcomes give 50.0 %'),
    (('worst_case_accuracy',), float('nan'), 'says nan % but'),
    (('attacks', 2, 'correct', 0), False, 'but its outcomes give'),
    (('attacks', 1, 'correct'), [True], 'fgsm has 1 entries for 8 images'),
    (('attacks', 1, 'name'), 'clean', 'names one attack twice'),
    (('sha256',), None, 'does not match its hash: it was edited'),
    (('settings', 'seed'), 'x', "seed='x': must be a whole number"),
    (('settings', 'colour'), 1, 'colour=1: unknown setting of RunFacts'),
    (('format',), 1, r'is not a result of an evaluation \(format 1\)'),
])
def test_a_file_that_was_changed_is_refused(tmp_path, path, value, message):
    content = json.loads(make_report('clean,fgsm,pgd20').to_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / 'results.json').write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        EvaluationReport.load(tmp_path)
    assert error.value.argument == 'path' and '\n' not in str(error.value)


@pytest.mark.parametrize('content', [b'{"format": 3, ', b'[1]', b'{}', b'\xff\xfe', b'{"format": 2}',
                                     b'{"format": 3}', b'{"format": 3, "attacks": 3}', b'{"evaluations": [1]}',
                                     b'{"evaluations": [], "data_names": 3}'])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, content):
    (tmp_path / 'results.json').write_bytes(content)
    for read in (EvaluationReport.load, read_reports):
        with pytest.raises(InputError) as error:
            read(tmp_path / 'results.json')
        assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(InputError, match='cannot be read'):
        EvaluationReport.load(tmp_path / 'nowhere')


CARDS = [*sorted(ROOT.glob('hub_cards/*/results.json')), *sorted(ROOT.glob('timm_robust/models/weights/*.json'))]


@pytest.mark.parametrize('path', CARDS, ids=lambda p: f'{p.parts[-2]}-{p.stem}')
def test_results_of_published_weights_are_read(path):
    content = json.loads(path.read_text())
    for (name, report), data_name in zip(read_reports(path), content['data_names'], strict=True):
        assert name == data_name and EvaluationReport.from_json(report.to_json()) == report
        assert report.model.weights_sha256 == content['weights_sha256'] and report.data.num_examples >= 400


def test_every_published_evaluation_is_looked_at():
    assert len(CARDS) == 20


@pytest.mark.parametrize('size, crop_pct, interpolation, crop_mode, name', [
    (224, .875, 'bilinear', 'center', 'Res256Crop224'), (224, .875, 'bicubic', 'center', 'BicubicRes256Crop224'),
    (224, 1., 'bilinear', 'squash', 'Res224'), (224, .9, 'bicubic', 'center', 'BicubicRes248Crop224'),
    (224, .9, 'bilinear', 'squash', ''), (224, .9, 'bilinear', 'border', ''), (None, None, None, None, '')])
def test_resizing_by_the_names_of_robustbench(size, crop_pct, interpolation, crop_mode, name):
    facts = ModelFacts(
        name='x', input_size=size and (3, size, size), crop_pct=crop_pct, interpolation=interpolation,
        crop_mode=crop_mode)
    assert facts.resizing == name


def test_the_sweep_of_a_minimum_norm_attack_has_one_column():
    report = make_report('clean,pgd20')
    last = report.attacks[-1]
    report = replace(report, attacks=(report.attacks[0], replace(last, distances=[.1] * 8)))
    header, rows = words.eps_header(report), words.eps_rows(report)
    assert header == ('eps', 'pgd20 (%)') and rows == [('0', '87.50'), ('8/255', '12.50')]
    assert words.eps_rows(replace(report, eps_sweep=()))[4][0] == '8/255', 'without a sweep, of the distances'


def test_a_mean_error_says_of_how_many_corruptions_it_is():
    parts = [PartResult(50, 100, c, 1) for c in COMMON_CORRUPTIONS] + [PartResult(100, 100, 'speckle_noise', 1)]
    report = replace(make_report('clean'), attacks=(), eps_sweep=(), benchmarks=(
        BenchmarkResult('corruptions', parts, 400, None),))
    assert words.benchmark_rows(report)[0][3] == 'mean error 50.0 % over 15 corruptions'
