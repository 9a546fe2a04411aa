import os
from pathlib import Path

import pytest
import torch

# one thread makes float sums repeat whatever the machine, and small networks are no faster on more
torch.set_num_threads(int(os.environ.get('TEST_THREADS', '1')))

SHARED_DATA = Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def fashion_mnist_dir():
    folder = SHARED_DATA
    if not (folder / 'FashionMNIST' / 'raw' / 't10k-images-idx3-ubyte').exists():
        pytest.skip('Fashion-MNIST is not at hand')
    return folder
