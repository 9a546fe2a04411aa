"""What on_fake_device.py checks, in a process of its own: its device is there for good once it is registered."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_on_a_second_device():
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist',
         str(HERE / 'on_fake_device.py')],
        capture_output=True, text=True, timeout=600, cwd=HERE.parent,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(map(str, (HERE, HERE.parent)))})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
