import subprocess
import sys

import pytest
import torch

from timm_robust.precision import _NEWER, float32_proper


def precisions():
    return [place.fp32_precision for place in _NEWER]


@pytest.mark.parametrize('precision', ['highest', 'high', 'medium'])
def test_float32_is_float32_and_the_settings_come_back(precision):
    def settings():
        return precisions(), torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32

    x = torch.full((1, 1), 1 + 2 ** -12)
    initially = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        before = settings()
        with pytest.raises(KeyboardInterrupt), torch.autocast('cpu', dtype=torch.bfloat16):
            assert (x @ x).dtype == torch.bfloat16
            with float32_proper():
                assert not {'tf32', 'bf16'} & set(precisions()) and not torch.backends.cudnn.allow_tf32
                assert not torch.backends.cuda.matmul.allow_tf32  # which compilers read
                assert torch.equal(x @ x, x * x)
                raise KeyboardInterrupt
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision(initially)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='torch has these flags from 2.9 on')
def test_float32_where_the_newer_flags_were_set():
    script = (
        'import torch\nfrom timm_robust.precision import _NEWER, float32_proper\n'
        "for place in _NEWER:\n    place.fp32_precision = 'tf32'\n"
        "with float32_proper():\n    assert [p.fp32_precision for p in _NEWER] == ['ieee'] * 3\n"
        "assert [p.fp32_precision for p in _NEWER] == ['tf32'] * 3\nprint('good')")
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.stdout == 'good\n', done.stderr
