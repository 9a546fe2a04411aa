"""The page of `timm-robust app`: its computation, and where gradio and chromium are installed the page itself."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import make_image_folder
from PIL import Image

from timm_robust.attacks import L2, Linf
from timm_robust.cli import app
from timm_robust.cli.main import main
from timm_robust.errors import InputError
from timm_robust.evaluation.examples import attack_picture, attacks_of_pictures
from timm_robust.evaluation.sources import open_data
from timm_robust.evaluation.subject import open_model

MODEL = 'nofrost_resnet20_cifar'  # with weights in the package


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), per_class=2, size=40)


@pytest.fixture(scope='module')
def subject():
    return open_model(MODEL, device='cpu')


def test_a_picture_is_seen_and_attacked_as_in_an_evaluation(folder, subject):
    source = open_data(folder, subject, workers=0, allow_class_mismatch=True)
    x, _ = source.first(4)
    for path in sorted((folder / 'validation').rglob('*.png')):
        threat = Linf('8/255')
        found = attack_picture(subject, Image.open(path), threat, 'pgd5')
        index = next(j for j in range(4) if torch.equal(x[j], found.clean))
        with torch.no_grad():
            before, after = subject.model(torch.stack([x[index], found.adversarial])).softmax(1)
        assert (found.label, found.prediction) == (before.argmax(), after.argmax()) and found.attack == 'pgd5'
        assert found.clean_confidence == pytest.approx(before.max().item(), abs=1e-5)
        assert found.confidence == pytest.approx(after.max().item(), abs=1e-5)
        assert 0 < threat.size((found.adversarial - found.clean)[None]).item() <= threat.eps * (1 + 1e-5)
        assert found.fooled


def test_eps_0_leaves_the_picture_and_grey_networks_take_colour(subject):
    picture = Image.effect_noise((50, 30), 60).convert('RGBA')
    still = attack_picture(subject, picture, Linf(0), 'pgd')
    assert torch.equal(still.clean, still.adversarial) and still.clean_confidence == still.confidence
    grey = open_model('nofrost_resnet20_cifar', device='cpu')
    grey.preprocessing = {**grey.preprocessing, 'input_size': (1, 32, 32)}
    grey.model = lambda x, model=subject.model: model(x.expand(-1, 3, -1, -1))
    assert attack_picture(grey, picture, Linf(0), 'pgd').clean.shape == (1, 32, 32)


def test_attacks_on_offer_are_those_that_run(subject):
    linf, l2 = (attacks_of_pictures(threat, 10) for threat in (Linf('8/255'), L2(.5)))
    assert {'pgd', 'fgsm', 'apgd-dlr', 'autoattack', 'rays'} <= set(linf) and 'cw-l2' in l2 and 'rays' not in l2
    assert not {'clean', 'n-fgsm', 'adaptive', 'cw-l2'} & set(linf)
    assert 'apgd-dlr' not in attacks_of_pictures(Linf('8/255'), 2)
    with pytest.raises(InputError, match="attacks='n-fgsm'"):
        attack_picture(subject, Image.new('RGB', (32, 32)), Linf('8/255'), 'n-fgsm')


@pytest.mark.parametrize('eps,verdict', [('8/255', 'fooled, pgd20, perturbation Linf 0.03137'), (
    0, 'not fooled, pgd20, perturbation Linf 0')])
def test_what_is_shown(folder, subject, eps, verdict):
    picture = Image.open(next((folder / 'validation').rglob('*.png'))).resize((32, 32))
    shown, text = app.show(subject, picture, Linf(eps), 'pgd')
    example = attack_picture(subject, picture, Linf(eps), 'pgd')
    names = subject.network.class_names()
    assert [p.size for p in shown] == [(256, 256)] * 3
    assert shown[0].resize((32, 32), Image.Resampling.NEAREST).tobytes() == picture.tobytes()
    assert text == (
        f'**{names[example.label]}** ({100 * example.clean_confidence:.1f} %) → **{names[example.prediction]}** '
        f'({100 * example.confidence:.1f} %): {verdict}')


def test_bad_input_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert main(['app', MODEL]) == 2 and "pip install 'timm-robust[app]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'gradio', app)  # any module
    monkeypatch.delenv('MODEL', raising=False)
    for argv, text in (([], 'name a network'), ([MODEL, '--images', str(tmp_path / 'no')], '--images'),
                       ([MODEL, '--eps', '0'], '--eps 0')):
        assert main(['app', *argv]) == 2
        line, = capsys.readouterr().err.splitlines()
        assert text in line


class _Browser:
    """Headless chromium, spoken to over a pipe in its own protocol."""

    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.count, self.session, self.requests = 0, {}, []
        target = self('Target.createTarget', url='about:blank')['targetId']
        self.session = {'sessionId': self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']}
        self('Network.enable')

    def __call__(self, method, **params):
        self.count += 1
        message = {'id': self.count, 'method': method, 'params': params, **self.session}
        self.to_browser.write(json.dumps(message).encode() + b'\0')
        while True:
            answer = json.loads(self._read())
            if answer.get('method') == 'Network.requestWillBeSent':
                self.requests.append(answer['params']['request']['url'])
            if answer.get('id') == self.count:
                assert 'error' not in answer, answer
                return answer['result']

    def _read(self):
        read = bytearray()
        while (byte := self.from_browser.read(1)) != b'\0':
            assert byte, 'the browser is gone'
            read += byte
        return read

    def evaluate(self, script):
        return self('Runtime.evaluate', expression=script, returnByValue=True)['result'].get('value')

    def wait(self, script, timeout=60):
        end = time.time() + timeout
        while not (value := self.evaluate(script)):  # a number, a text or a truth value
            assert time.time() < end, f'{script}\n{self.evaluate("document.body.innerText")}'
            time.sleep(.2)
        return value


@contextmanager
def _browser(profile):
    down, up = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ['bash', '-c', 'exec "$0" "$@" 3<&"$IN" 4>&"$OUT"', 'chromium', '--headless', '--no-sandbox', '--disable-gpu',
         '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--remote-debugging-pipe', f'--user-data-dir={profile}'],
        pass_fds=(down[0], up[1]), env={**os.environ, 'IN': str(down[0]), 'OUT': str(up[1])},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(down[0])
    os.close(up[1])
    with open(down[1], 'wb', buffering=0) as to_browser, open(up[0], 'rb') as from_browser:
        try:
            yield _Browser(to_browser, from_browser)
        finally:
            process.kill()
            process.wait()


@contextmanager
def _served(folder, *command, **env):
    """A process that serves the page; gives its address."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', **env})
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r'http://127\.0\.0\.1:\d+', line):
                break
        else:
            raise AssertionError(''.join(lines))
        yield found[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize('as_space', [False, True])
def test_the_page_in_a_browser(folder, tmp_path, as_space):
    pytest.importorskip('gradio', reason='gradio is not installed')
    if shutil.which('chromium') is None:
        pytest.skip('chromium is not installed')
    shutil.copytree(folder / 'validation', tmp_path / 'images')
    root = str(Path(__file__).parents[2])
    command, env = ['-m', 'timm_robust', 'app', MODEL, '--device', 'cpu'], {'PYTHONPATH': root}
    if as_space:
        shutil.copy(app.__file__, tmp_path / 'app.py')
        command, env = ['app.py'], {'PYTHONPATH': root, 'MODEL': MODEL}
    with _served(tmp_path, *command, **env) as address, _browser(tmp_path / 'profile') as page:
        page('Page.navigate', url=address)
        assert page.wait('document.querySelectorAll(".gallery-item").length') == 4
        if as_space:  # an image is picked in one of the two, uploaded in the other
            page.evaluate('document.querySelector(".gallery-item").click()')
        else:
            root_node = page('DOM.getDocument')['root']['nodeId']
            field = page('DOM.querySelector', nodeId=root_node, selector='input[type=file]')['nodeId']
            page('DOM.setFileInputFiles', nodeId=field, files=[str(next(folder.rglob('*.png')))])
        page.wait('/→.*fooled, pgd20, perturbation Linf 0.03137/.test(document.body.innerText)')
        assert page.wait(  # lossless, or the perturbation would be gone
            '[...document.images].filter(i => i.naturalWidth == 256 && i.src.endsWith(".png")).length') == 3
        page.evaluate("""(() => {
            const eps = document.querySelector('input[type=range]');
            eps.value = 0;
            eps.dispatchEvent(new Event('input', {bubbles: true}));
            eps.dispatchEvent(new PointerEvent('pointerup', {bubbles: true}));
        })()""")
        page.wait('/not fooled, pgd20, perturbation Linf 0\\s/.test(document.body.innerText + " ")')
        assert page.requests and all(url.startswith((address, 'data:', 'blob:')) for url in page.requests)
