"""timm's own model tests on our models, from the sdist of the installed timm version.

The default run takes the small networks; `pytest -m timm_contract` takes all of them.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_robust  # noqa: F401

CACHE = Path(__file__).resolve().parents[2] / '.cache'
NAMES = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith('timm_robust.')]
SMALL = [
    'nofrost_resnet11_mnist', 'nofrost_resnet20_cifar', 'nofrost_nfnet18_cifar', 'robustnorm_resnet20_cifar',
    'robustnorm_vgg11_cifar']


@pytest.fixture(scope='session')
def sdist():
    """Folder of timm's sources with tests, fetched once."""
    name = f'timm-{timm.__version__}'
    if not (CACHE / name / 'tests' / 'test_models.py').exists():
        CACHE.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', str(CACHE),
             f'timm=={timm.__version__}'],
            capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f'the sdist of {name} cannot be had: {done.stderr.strip().splitlines()[-1:]}')
        shutil.unpack_archive(CACHE / f'{name}.tar.gz', CACHE)
    return CACHE / name


@pytest.fixture(scope='session')
def timm_tests(sdist):
    """timm's tests/test_models.py as a module."""
    spec = importlib.util.spec_from_file_location('timm_test_models', sdist / 'tests' / 'test_models.py')
    module = importlib.util.module_from_spec(spec)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', pytest.PytestUnknownMarkWarning)
        spec.loader.exec_module(module)
    return module


def run_timm_tests(sdist, names, at_least):
    (sdist / 'timm').rename(sdist / 'sources') if (sdist / 'timm').exists() else None  # would shadow the installed one
    selected = ' or '.join(f'-{name}] or -{name}.' for name in names)
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-q', '-p', 'no:cacheprovider',
         '-W', 'ignore::pytest.PytestUnknownMarkWarning', '-k', f'({selected}) and not pretrained'],
        cwd=sdist, capture_output=True, text=True, env={**os.environ, 'TORCH_BACKEND': 'timm_robust'})
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r'(\d+) passed', summary)
    assert passed and int(passed[1]) >= at_least, summary


def test_small_models_pass_timms_tests(sdist):
    run_timm_tests(sdist, SMALL[:1] + SMALL[2:3], at_least=8 * 2)


@pytest.mark.timm_contract
@pytest.mark.parametrize('name', NAMES)
def test_every_model_passes_timms_tests(sdist, name):
    run_timm_tests(sdist, [name], at_least=7)


def selected_by_module(timm_tests, name):
    """The contract tests timm selects by module, which leave out models from elsewhere."""
    timm_tests.test_model_forward_intermediates(name, 1)
    timm_tests.test_model_forward_intermediates_features(name, 1)
    timm_tests.test_prune_intermediate_layers_contract(name)
    timm_tests.test_head_hidden_size(name, {'in_chans': 3} if 'mnist' in name else {})  # it feeds three channels


@pytest.mark.parametrize('name', SMALL)
def test_small_models_pass_what_timm_selects_by_module(timm_tests, name):
    selected_by_module(timm_tests, name)


@pytest.mark.timm_contract
@pytest.mark.parametrize('name', NAMES)
def test_every_model_passes_what_timm_selects_by_module(timm_tests, name):
    selected_by_module(timm_tests, name)


@pytest.mark.parametrize('name', ['nofrost_resnet20_cifar', 'robustnorm_resnet20_cifar', 'robustnorm_vgg11_cifar'])
def test_reset_classifier_keeps_the_pool(timm_tests, name):
    timm_tests.test_reset_classifier_keeps_pool(name)


@pytest.mark.timm_contract
@pytest.mark.parametrize('name', [n for n in NAMES if 'mnist' not in n])
def test_every_model_keeps_the_pool(timm_tests, name):
    timm_tests.test_reset_classifier_keeps_pool(name)
