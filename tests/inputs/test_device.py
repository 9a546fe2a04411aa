import pytest
import torch

from timm_robust.errors import InputError
from timm_robust.inputs import check_seed, init_process, resolve_device


def test_devices():
    assert resolve_device('cpu') == 'cpu' and resolve_device(None) == ('cuda' if torch.cuda.is_available() else 'cpu')
    for name, reason in (('gpu', 'Expected one of'), ('xpu', '')):
        with pytest.raises(InputError, match=f"device='{name}': no such device here .{reason}.*; pass `device='cpu'`"):
            resolve_device(name)
    process = init_process('cpu')
    assert (process.device, process.rank, process.world_size) == (torch.device('cpu'), 0, 1)
    assert process.primary and not process.distributed


@pytest.mark.parametrize('count,named,fix', [(0, 'cuda', "; pass `device='cpu'`"), (1, 'cuda:1', '$')])
def test_a_cuda_device_that_is_not_there(monkeypatch, count, named, fix):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    with pytest.raises(InputError, match=f"device='{named}': this machine has {count} CUDA devices{fix}"):
        resolve_device(named)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert resolve_device(named) == named


@pytest.mark.parametrize('seed', [-1, 2 ** 32])
def test_seeds_that_numpy_would_not_take(seed):
    check_seed(0)
    with pytest.raises(InputError, match=f'seed={seed}: must be at least 0'):
        check_seed(seed)
