import base64
import copy
import html
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from timm_robust.attacks import ThreatModel
from timm_robust.evaluation import plot_eps_sweep, plot_images
from timm_robust.evaluation.diagnostics import Finding
from timm_robust.evaluation.figures import panels, to_png
from timm_robust.evaluation.outcome import AttackResult, Evaluation
from timm_robust.evaluation.report import build_results, evaluation_table, write_report
from timm_robust.evaluation.specs import parse_attacks
from timm_robust.evaluation.summary import HEADER, headline, robust_accuracy, table_rows
from timm_robust.inputs import write_json

THREAT = ThreatModel('linf', 8 / 255)
HOSTILE = '<script>alert(1)</script>|`*_[x](http://x.example/)$\\frac$"\'&'
FINDINGS = [
    Finding('zero_gradients', 'ok', 'No gradient is zero.', {}),
    Finding('saturated_logits', 'warning', 'Logits saturate.', {}),
    Finding('black_box', 'alarm', 'Square breaks 3 images < 5.', {}),
    Finding('transfer', 'skipped', 'No surrogate.', {}),
]
SURFACE = {
    'norm': 'linf', 'eps': 8 / 255, 'seed': 4, 'num_examples': 100, 'coordinates': [-1., 0., 1.],
    'loss': [[0., 1., 2.], [0., 1., 3.], [0., 1., 2.]]}

# images of eight that withstand each attack, the first seven being right when clean
WITHSTANDS = {'clean': 7, 'fgsm': 6, 'pgd20': 4, 'square100': 5, 'autoattack': 3, 'autoattack-plus': 2, 'rays100': 2}


def make_results(names, worst_case=False, batch_dependent=False, model='net', findings=(), **settings):
    found, standing = [], [True] * 8
    for spec in parse_attacks(names, THREAT):
        outcome = [i < WITHSTANDS[spec.name] for i in range(8)]
        if spec.name == 'square100':
            outcome[0] = False  # breaks an image the attacks above it do not
        if worst_case and spec.is_attack:
            outcome = [None if i < 7 and not stands else right
                       for i, (right, stands) in enumerate(zip(outcome, standing))]
        attacked = sum(standing) if worst_case else 7
        standing = [stands and right is not False for stands, right in zip(standing, outcome)]
        found.append(AttackResult(spec, outcome, list(standing), attacked, 1.25))
    evaluation = Evaluation(found, list(range(8)), list(range(10, 18)), batch_dependent)
    return build_results(
        evaluation, THREAT,
        model={'name': model, 'checkpoint': '', 'weights_sha256': 'c0ffee' * 10},
        data={'dataset': 'ImageFolder', 'data_dir': '/some/folder', 'split': 'test'},
        settings={'seed': 3, 'worst_case': worst_case, 'device': 'cpu', 'date': '2020-02-02T02:02:02+00:00',
                  'command': 'timm-robust eval --model net', **settings},
        eps_sweep={0.: 87.5, 8 / 255: 12.5}, findings=findings)


def make_examples(channels=3):
    clean = torch.rand(channels, 8, 8) * .8 + .1
    noise = (8 / 255) * torch.randn(channels, 8, 8).sign()
    common = {'clean': clean, 'adversarial': clean + noise, 'clean_confidence': .9112, 'confidence': .6789}
    return [
        {**common, 'attack': 'fgsm', 'label': 0, 'prediction': 1},
        {**common, 'attack': 'pgd20', 'label': 1, 'prediction': 1}]


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


def written(folder, results, examples=(), names=None, surface=None):
    write_report(folder, results, list(examples), names, surface)
    return Page((folder / 'report.html').read_text()), (folder / 'report.md').read_text()


def markdown_rows(text, first):
    """Cells of the table whose first heading is `first`."""
    lines = text[text.index(f'| {first} |'):].split('\n\n')[0].splitlines()
    return [line.strip('| ').split(' | ') for line in lines[:1] + lines[2:]]


@pytest.mark.parametrize('worst_case', [False, True])
def test_tables_hold_the_numbers_of_the_results(tmp_path, worst_case):
    results = make_results('clean,fgsm,pgd20,square100', worst_case)
    unknown = [r['accuracy'] is None for r in results['results']]
    assert unknown == ([False, False, True, True] if worst_case else [False] * 4)
    page, markdown = written(tmp_path, results)
    expected = [[r['attack']['name'], '-' if r['accuracy'] is None else f"{r['accuracy']:.2f}",
                 f"{r['worst_case_so_far']:.2f}"] for r in results['results']]
    for table in (page.tables[0], markdown_rows(markdown, 'attack')):
        assert table[0] == list(HEADER)
        assert [[row[0], row[4], row[5]] for row in table[1:]] == expected
        assert [row[3] for row in table[2:]] == [str(r['attacked']) for r in results['results'][1:]]
    for table in (page.tables[1], markdown_rows(markdown, 'eps')):
        assert table[1:] == [['0', '87.50'], ['8/255', '12.50']]
    said = 'its accuracy alone is not known' if worst_case else '"Accuracy under it alone"'
    assert said in page.text and said in markdown


def test_bars_are_as_long_as_the_accuracies(tmp_path):
    results = make_results('clean,fgsm,pgd20,square100')
    written(tmp_path, results)
    bars = re.findall(r'<div class="bar">.*?</svg>', (tmp_path / 'report.html').read_text(), re.S)
    for bar, found in zip(bars, results['results'], strict=True):
        widths = {kind: float(w) for kind, w in re.findall(r'class="(\w+)" width="([\d.]+)"', bar)}
        assert widths['worst'] == pytest.approx(found['worst_case_so_far'], abs=1e-3)
        assert widths.get('alone', widths['worst']) == pytest.approx(found['accuracy'], abs=1e-3)
    assert 'class="alone"' in bars[3], 'square100 leaves more than all together'


@pytest.mark.parametrize('names, worst_case, sentence', [
    ('clean,fgsm', False, 'Clean accuracy 87.50 %, robust accuracy at most 75.00 % under fgsm'),
    ('clean,fgsm,pgd20,square100', False,
     'Clean accuracy 87.50 %, robust accuracy at most 37.50 % in the worst case of fgsm, pgd20 and square100'),
    ('clean,pgd20,autoattack', False, 'Clean accuracy 87.50 %, robust accuracy 37.50 % under autoattack'),
    ('clean,pgd20,autoattack', True,
     'Clean accuracy 87.50 %, robust accuracy 37.50 % in the worst case of pgd20 and autoattack'),
    ('pgd20', False, 'Robust accuracy at most 50.00 % under pgd20'),
])
def test_headline(tmp_path, names, worst_case, sentence):
    sentence += ' (Linf eps 8/255, 8 images, seed 3).'
    if 'autoattack' not in names:
        sentence += ' These attacks bound robustness from above; stronger ones (AutoAttack) leave less.'
    results = make_results(names, worst_case)
    assert headline(results) == sentence
    page, markdown = written(tmp_path, results)
    assert sentence in page.text and f'**{sentence}**' in markdown
    assert ('≤ ' in page.text) == ('autoattack' not in names)


def test_headline_is_autoattacks_and_owns_up_to_what_beats_it():
    results = make_results('clean,autoattack,rays100')
    assert robust_accuracy(results) == (37.5, ['autoattack'])
    assert headline(results).endswith('All attacks together leave 25.00 %.')
    assert robust_accuracy(make_results('autoattack,autoattack-plus')) == (25., ['autoattack-plus'])
    worst_case = make_results('clean,fgsm,autoattack,rays100', worst_case=True)
    assert robust_accuracy(worst_case) == (37.5, ['fgsm', 'autoattack'])


def test_clean_images_alone_say_nothing_about_robustness(tmp_path):
    page, markdown = written(tmp_path, make_results('clean'))
    for text in (page.text, markdown):
        assert 'Clean accuracy 87.50 %, 8 images, seed 3. No attack was run' in text
        assert 'obust accuracy' not in text


def test_warnings_stand_above_the_table(tmp_path):
    results = make_results('clean,fgsm', batch_dependent=True, findings=FINDINGS, surrogate='other_net')
    page, markdown = written(tmp_path, results)
    for text in (page.text, html.unescape(markdown.replace('\\', ''))):
        top = text[:text.index('under it alone')]
        for expected in ('normalizes by the batch', 'crafted on other_net', 'Black box: Square breaks 3 images < 5.',
                         'Saturated logits: Logits saturate.'):
            assert expected in top, expected
        assert top.index('Square breaks') < top.index('Logits saturate'), 'an alarm comes before a warning'
        assert 'No gradient is zero' not in top and 'No gradient is zero' in text
    calm, markdown = written(tmp_path, make_results('clean,fgsm', findings=FINDINGS[:1]))
    assert 'Warning:' not in calm.text and 'Alarm:' not in calm.text and '>' not in markdown


def test_every_finding_has_its_verdict(tmp_path):
    page, markdown = written(tmp_path, make_results('clean,fgsm', findings=FINDINGS))
    for finding, name in zip(FINDINGS, ('Zero gradients', 'Saturated logits', 'Black box', 'Transfer')):
        assert f'{finding.verdict} {name}. {finding.text}' in page.text
        assert f'- **{finding.verdict}** {name}: {html.escape(finding.text)}' in markdown


def test_what_comes_from_outside_is_text(tmp_path):
    hostile = copy.deepcopy(make_results('clean,fgsm', model=HOSTILE, findings=FINDINGS, command=f'```\n{HOSTILE}'))
    hostile['data']['data_dir'] = HOSTILE
    hostile['results'][1]['attack']['name'] = HOSTILE
    hostile['diagnostics'][2]['text'] = HOSTILE
    examples = [{**e, 'attack': HOSTILE} for e in make_examples()]
    page, markdown = written(tmp_path, hostile, examples, [HOSTILE, HOSTILE], SURFACE)
    tame = make_results('clean,fgsm', findings=FINDINGS)
    usual, _ = written(tmp_path / 'tame', tame, make_examples(), ['a', 'b'], SURFACE)
    assert page.tags == usual.tags and page.attributes == usual.attributes
    assert page.text.count(HOSTILE) >= 8
    assert page.tables[0][2][0] == HOSTILE

    prose, command = re.subn(r'\n````\n.*?\n````\n', '\n', markdown, flags=re.S)
    assert command == 1, 'a fence longer than the one in the command'
    assert '<' not in prose and not re.search(r'(?<!\\)[`$]', prose.replace('`results.json`', ''))
    rows = [line for line in prose.splitlines() if line.startswith('|')]
    assert {len(re.findall(r'(?<!\\)\|', row)) for row in rows} == {8, 7, 3}, 'cells of the tables'
    assert re.findall(r'(?<!\\)\]\((.*?)\)', prose) == ['eps_sweep.png', 'images.png', 'loss_surface.png']


def test_page_needs_nothing_else(tmp_path):
    page, markdown = written(
        tmp_path, make_results('clean,fgsm', findings=FINDINGS), make_examples(), ['a', 'b'], SURFACE)
    text = (tmp_path / 'report.html').read_text()
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
    page, markdown = written(tmp_path, make_results('clean,pgd20'))
    versions = make_results('clean')['versions']
    for fact in ('timm-robust eval --model net', 'c0ffee' * 10, '2020-02-02T02:02:02+00:00', '/some/folder',
                 versions['torch'], versions['timm'], 'cpu', str(8 / 255), 'steps 20', 'results.json'):
        assert fact in page.text, fact
        assert fact in markdown, fact


def test_figures_are_those_there_is_something_to_draw_for(tmp_path):
    results = make_results('clean,fgsm')
    every = write_report(tmp_path / 'a', results, make_examples(), None, SURFACE)
    names = {'report.html', 'report.md', 'images.png', 'eps_sweep.png', 'loss_surface.png'}
    assert {p.name for p in every} == names == set(os.listdir(tmp_path / 'a'))
    del results['eps_sweep']
    few = write_report(tmp_path / 'b', results, [], None, None)
    assert {p.name for p in few} == {'report.html', 'report.md'} == set(os.listdir(tmp_path / 'b'))
    assert 'img' not in Page(few[0].read_text()).tags and '![' not in few[1].read_text()


@pytest.mark.parametrize('channels', [1, 3])
def test_images(tmp_path, channels):
    examples = make_examples(channels)
    page, markdown = written(tmp_path, make_results('clean,fgsm,pgd20'), examples, ['cat', 'dog'])
    shown = [Image.open(io.BytesIO(base64.b64decode(s.split(',')[1]))) for _, s in page.sources if 'base64' in s]
    clean, adversarial = examples[0]['clean'], examples[0]['adversarial']
    expected = (clean, (.5 + 10 * (adversarial - clean)).clamp(0, 1), adversarial)
    for image, tensor in zip(shown[1:4], expected):  # the first is the curve
        pixels = torch.from_numpy(np.array(image)).view(8, 8, channels).permute(2, 0, 1) / 255
        assert (pixels - tensor).abs().max() <= .51 / 255
    assert 'cat fooled by fgsm clean cat 91.1 % perturbation x10 adversarial dog 67.9 %' in page.text
    assert 'dog holds against pgd20 clean dog 91.1 % perturbation x10 adversarial dog 67.9 %' in page.text
    assert markdown_rows(markdown, 'label')[1:] == [
        ['cat', '91.1', 'fgsm', 'dog', '67.9', 'fooled'], ['dog', '91.1', 'pgd20', 'dog', '67.9', 'holds']]


def test_classes_without_a_name_go_by_number(tmp_path):
    page, markdown = written(tmp_path, make_results('clean,fgsm'), make_examples(), ['cat'])
    assert 'adversarial class 1 67.9 %' in page.text and '| class 1 |' in markdown
    page, _ = written(tmp_path, make_results('clean,fgsm'), make_examples(), None)
    assert 'class 0 fooled by fgsm' in page.text


def test_perturbation_is_magnified_by_ten_and_cut_off():
    clean = torch.full((1, 1, 3), .4)
    example = {'clean': clean, 'adversarial': clean + torch.tensor([[[.03, -.01, .2]]])}
    assert torch.allclose(panels(example)[1], torch.tensor([[[.8, .4, 1.]]]))
    assert np.array(Image.open(io.BytesIO(to_png(panels(example)[1])))).tolist() == [[204, 102, 255]]


def test_figures_by_themselves(tmp_path):
    plot_images(make_examples(1), ['$\\frac$', '_b'], 'a $\\title$', tmp_path / 'images.png')
    plot_eps_sweep({'$\\a$': {0.: 100., .1: 0.}, 'b': {0.: 90.}}, 'Linf', HOSTILE, tmp_path / 'sweep.png')
    for name in ('images.png', 'sweep.png'):
        image = np.array(Image.open(tmp_path / name).convert('L'))
        assert image.shape[0] > 300 and image.std() > 5, 'something is drawn'


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    results = make_results('clean,fgsm')
    write_report(tmp_path, results, [])
    write_json(tmp_path / 'results.json', results)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert json.loads(before['results.json']) == json.loads(json.dumps(results))
    assert (tmp_path / 'results.json').stat().st_mode & 0o777 == 0o666 & ~_umask(), 'others may read it'

    def cut_off(source, target):
        raise OSError('no space')

    monkeypatch.setattr('timm_robust.inputs.files.os.replace', cut_off)
    other = make_results('clean,pgd20')
    for write in (lambda: write_report(tmp_path, other, []), lambda: write_json(tmp_path / 'results.json', other)):
        with pytest.raises(OSError, match='no space'):
            write()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    monkeypatch.undo()
    broken = make_results('clean,pgd20')
    del broken['settings']['seed']
    with pytest.raises(KeyError):
        write_report(tmp_path, broken, [])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_path_that_is_no_text(tmp_path):
    results = make_results('clean,fgsm')
    results['data']['data_dir'] = os.fsdecode(b'/data/\xff')
    page, markdown = written(tmp_path, results)
    assert '/data/\\udcff' in page.text and '/data/\\udcff' in markdown


def test_table_as_text():
    results = make_results('clean,fgsm,pgd20', batch_dependent=True)
    text = evaluation_table(results)
    assert all(cell in text for row in table_rows(results) for cell in row)
    assert '8 images, seed 3, Linf eps 8/255.' in text and 'WARNING: this network normalizes by the batch' in text
    assert 'bound robustness from above' in text
    assert 'bound robustness from above' not in evaluation_table(make_results('clean,autoattack'))
