"""The script that a GPU is tried with, without one: what it checks runs, and what fails it says."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import gpu  # noqa: E402


def test_no_gpu_is_said_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.gpu', '--output', str(tmp_path / 'gpu.json')],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'no GPU is available' in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Few of everything, on the CPU."""
    monkeypatch.setattr(gpu, '_NETWORKS', ('nofrost_resnet20_cifar',))
    monkeypatch.setattr(gpu, '_LINF', 'fgsm,pgd-targeted1')
    monkeypatch.setattr(gpu, '_L2', 'square3')
    monkeypatch.setattr(gpu, 'OBJECTIVES', {name: gpu.OBJECTIVES[name] for name in ('nofrost', 'apart')})
    path = tmp_path / 'gpu.json'
    monkeypatch.setattr(sys, 'argv', [
        'gpu', '--device', 'cpu', '--sections', 'attacks', 'objectives', 'layers', '--num-images', '4', '--output',
        str(path)])

    def of() -> dict:
        code = gpu.main()
        return code, json.loads(path.read_text())['checks']

    return of


@pytest.mark.slow
def test_its_checks_pass_on_a_cpu(run):
    code, checks = run()
    assert code == 0
    assert {section: len(found) for section, found in checks.items()} == {'layers': 12, 'objectives': 8, 'attacks': 4}
    assert all(check['ok'] for found in checks.values() for check in found.values())


def test_a_check_that_fails_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'create_task', lambda *args, **kwargs: lambda x, y: {'loss': torch.tensor(float('inf'))})
    code, checks = run()
    failed = [check for check in checks['objectives'].values() if not check['ok']]
    assert code == 1 and len(failed) == 8 and all('Traceback' in check['trace'] for check in failed)
    assert '16 passed, 8 failed: nofrost float32' in capsys.readouterr().out
