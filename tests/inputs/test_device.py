import pytest
import torch

from timm_robust.errors import InputError
from timm_robust.inputs import check_seed, init_process, resolve_device


def test_devices():
    assert resolve_device('cpu') == 'cpu' and resolve_device(None) == ('cuda' if torch.cuda.is_available() else 'cpu')
    with pytest.raises(InputError, match="device='gpu': no such device; pass `device='cpu'`"):
        resolve_device('gpu')
    process = init_process('cpu')
    assert (process.device, process.rank, process.world_size) == (torch.device('cpu'), 0, 1)
    assert process.primary and not process.distributed


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match="device='cuda:1': no CUDA device is available; pass `device='cpu'`"):
        resolve_device('cuda:1')


@pytest.mark.parametrize('seed', [-1, 2 ** 32])
def test_seeds_that_numpy_would_not_take(seed):
    check_seed(0)
    with pytest.raises(InputError, match=f'seed={seed}: must be at least 0'):
        check_seed(seed)
