import logging
import os
import socket
import tempfile
from pathlib import Path

# before anything imports huggingface_hub: its Hub is on this machine, at a port where nobody listens until a test does
with socket.socket() as _free:
    _free.bind(('127.0.0.1', 0))
    HUB_PORT = _free.getsockname()[1]
_hf_home = tempfile.TemporaryDirectory(prefix='hf_home_')
os.environ.update(
    HF_ENDPOINT=f'http://127.0.0.1:{HUB_PORT}', HF_HOME=_hf_home.name, HF_HUB_DISABLE_XET='1',
    HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1', TORCH_HOME=f'{_hf_home.name}/torch')
os.environ.pop('HF_TOKEN', None)

import pytest  # noqa: E402
import torch  # noqa: E402

# one thread makes float sums repeat whatever the machine, and small networks are no faster on more
torch.set_num_threads(int(os.environ.get('TEST_THREADS', '1')))

SHARED_DATA = Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logs_end_with_their_test():
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    # a command logs to the standard error of its test, which is closed after
    for handler in [h for h in root.handlers if h not in before and type(h) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture
def fashion_mnist_dir():
    folder = SHARED_DATA
    if not (folder / 'FashionMNIST' / 'raw' / 't10k-images-idx3-ubyte').exists():
        pytest.skip('Fashion-MNIST is not at hand')
    return folder


def _archive(name, what):
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f'{what} is not available')
    return path


@pytest.fixture
def cifar10_archive():
    return _archive('cifar10-png.tar.gz', 'CIFAR-10')


@pytest.fixture
def imagenette_archive():
    return _archive('imagenette-128.tar.gz', 'Imagenette')


@pytest.fixture
def hub():
    """A Hub on this machine, empty, with an empty cache in front of it."""
    import shutil

    from hub_server import HubServer
    shutil.rmtree(Path(os.environ['HF_HOME']) / 'hub', ignore_errors=True)
    server = HubServer(HUB_PORT)
    yield server
    server.shutdown()
    server.server_close()
