"""The scripts that regenerate tables, with commands that only pretend to run."""
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'train_scripts' / 'reproduce'


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The modules `common` and NAME, whose commands write what the real ones would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    calls = []

    def pretend(argv):
        calls.append(argv)
        flag = dict(zip(argv, argv[1:]))
        if argv[0] == 'train':
            run = Path(flag['--output'], flag['--experiment'])
            (run / 'export').mkdir(parents=True)
            top1 = 70 + 2 * (flag.get('--objective') == 'apart') + int(flag.get('--seed', 0))
            (run / 'summary.csv').write_text(f'epoch,eval_top1\n0,1\n1,{top1}\n')
            return 0
        results = {
            'results': [{'attack': {'name': n}, 'accuracy': 90. - 10 * i, 'worst_case_so_far': 0.}
                        for i, n in enumerate(flag['--attacks'].split(','))],
            'threat_model': {'text': f"Linf eps {flag.get('--eps', 0)}"}, 'settings': {'seed': 0, 'command': 'eval'},
            'data': {'num_examples': int(flag['--num-examples'])}, 'model': {'weights_sha256': 'f'},
            'eps_sweep': [{'eps': 0, 'accuracy': 80.}]}
        folder = Path(flag['--output'])
        folder.mkdir(parents=True)
        (folder / 'results.json').write_text(json.dumps(results))
        return 0

    def load(name):
        for module in ('common', name):
            sys.modules.pop(module, None)
        common = __import__('common')
        monkeypatch.setattr(common, 'timm_robust', pretend)
        monkeypatch.setattr(common, 'HERE', tmp_path)
        return __import__(name), calls

    yield load
    for module in ('common', 'apart', 'robustnorm'):
        sys.modules.pop(module, None)


def run(script, monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['script', *argv])
    script.main()


def test_apart(scripts, tmp_path, monkeypatch):
    script, calls = scripts('apart')
    for _ in range(2):  # what is there is not made again
        run(script, monkeypatch, '--data-dir', 'D', '--epochs', '2', '--runs', str(tmp_path / 'runs'))
    assert len(calls) == 6 and all(Path(c[c.index('-c') + 1]).is_file() for c in calls)
    text = (tmp_path / 'tables' / 'apart.md').read_text()
    assert '| standard | 70.00 | 71.00 | 72.00 | 71.00 | 1.00 |' in text
    assert '| gain | 2.00 | 2.00 | 2.00 | 2.00 | 0.00 |' in text


def test_robustnorm(scripts, tmp_path, monkeypatch):
    script, calls = scripts('robustnorm')
    for _ in range(2):
        run(script, monkeypatch, '--cifar10', 'C', '--fashion-mnist', 'F', '--networks', 'resnet20', '--num-examples',
            '300', '--runs', str(tmp_path / 'runs'), '--output', str(tmp_path / 'out'))
    trained = [c for c in calls if c[0] == 'train']
    assert len(trained) == 4 and all(Path(c[c.index('-c') + 1]).is_file() for c in trained)
    assert len(calls) == 4 + 2 * (2 + 3) + 4 + 4 * 7
    text = (tmp_path / 'tables' / 'robustnorm.md').read_text()
    assert '| resnet20 | robustnorm | CIFAR-10 (JPEG copy) | Linf eps 0.005014 | mean | 90.0 | 80.0' in text
    assert '| resnet20 | batchnorm | Fashion-MNIST | Linf eps 0.007060 | batch | 90.0 |' in text
    attacks = {c[c.index('--norm-statistics') + 1]: c[c.index('--attacks') + 1] for c in calls if '--eps' in c}
    assert attacks['batch'].endswith(',adaptive100') and attacks['mean'].endswith(',adaptive100')
    eps = {c[c.index('--data-dir') + 1]: float(c[c.index('--eps') + 1]) for c in calls if '--eps' in c}
    assert eps == {'C': pytest.approx(.02 * .7521 / 3, abs=1e-6), 'F': pytest.approx(.02 * .353, abs=1e-6)}
