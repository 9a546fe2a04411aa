"""Processes that wait for each other longer than the backend of training does, and for one that died."""
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import free_port, make_image_folder, run_distributed

LATE = """
import functools, time, torch, torch.distributed as dist
from datetime import timedelta

LIMIT = 3  # of the backend of training, in seconds
dist.init_process_group = functools.partial(dist.init_process_group, timeout=timedelta(seconds=LIMIT))

def late(owner, name, rank):
    function = getattr(owner, name)
    def slow(*args, **kwargs):
        if dist.is_initialized() and dist.get_rank() == rank:
            time.sleep(LIMIT + 1)
            waits.append(name)
        return function(*args, **kwargs)
    setattr(owner, name, slow)

waits = []
"""


@pytest.mark.slow
def test_processes_of_an_evaluation_wait_for_hours(tmp_path):
    """The second one attacks for longer, then the first one diagnoses."""
    run_distributed(LATE + """
from helpers import TinyNet
from timm_robust.evaluation import Runner, evaluate
from timm_robust.evaluation.stages import Stages
dist.init_process_group('gloo')
late(Runner, 'run', rank=1)
late(Stages, '_optional_stages', rank=0)
torch.manual_seed(0)
x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
report = evaluate(TinyNet().eval(), x, y, attacks='clean,fgsm', allow_chance=True)
assert len(report.attacks[0].correct) == 6
assert waits == [['_optional_stages'], ['run']][dist.get_rank()], waits
""", tmp_path)


@pytest.mark.slow
def test_processes_of_a_training_wait_for_hours(tmp_path):
    """The first one looks at images, opens its folder and writes."""
    folder = make_image_folder(tmp_path / 'images')
    argv = [str(folder), '--model', 'nofrost_resnet11_mnist', '--in-chans', '3', '--img-size', '32', '-b', '4',
            '--num-classes', '2',
            '-j', '0', '--epochs', '1', '--warmup-epochs', '0', '--device', 'cpu', '--output', str(tmp_path),
            '--experiment', 'run']
    run_distributed(LATE + f"""
from timm_robust.cli.train import read_config
from timm_robust.training import run
late(run, 'open_training_data', rank=0)
late(run._Run, 'open_folder', rank=0)
late(run._Run, 'keep', rank=0)
run.train(read_config({argv!r}))
assert waits in ([], ['open_training_data', 'open_folder', 'keep']), waits
""", tmp_path)
    assert (tmp_path / 'run' / 'export' / 'config.json').exists()


DYING = """
import os, signal, sys, time, torch.distributed as dist
from timm_robust.inputs import Peers
dist.init_process_group('gloo', init_method='tcp://127.0.0.1:{port}', rank=int(sys.argv[1]), world_size=2)
with Peers() as peers:
    peers.meet()
    print('together', flush=True)
    if peers.rank == {dying}:
        time.sleep(600)
    peers.{wait}
"""


@pytest.mark.parametrize('dying, wait', [(1, 'gather(1)'), (0, 'broadcast(1)')])
def test_a_process_that_died_is_noticed_by_those_who_wait(dying, wait):
    """Without a launcher, which would end all of them."""
    script = DYING.format(port=free_port(), dying=dying, wait=wait)
    processes = [subprocess.Popen(
        [sys.executable, '-c', script, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'GLOO_SOCKET_IFNAME': 'lo'}) for rank in '01']
    try:
        for process in processes:
            assert 'together\n' in iter(process.stdout.readline, '')  # before torch 2.9 gloo prints a line of its own
        time.sleep(.5)
        processes[dying].send_signal(signal.SIGKILL)
        start = time.perf_counter()
        _, error = processes[1 - dying].communicate(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert time.perf_counter() - start < 10
    assert 'InputError: another process of this run has ended; see its last output' in error


def test_who_waits_for_processes_that_never_come_says_so(tmp_path):
    """As in `if rank == 0: evaluate(...)`."""
    run_distributed("""
import time, torch.distributed as dist
from timm_robust.inputs import Peers, peers
lines, peers._PATIENCE = [], .2
peers._logger.warning = lines.append
dist.init_process_group('gloo')
assert Peers(distributed=False).size == 1
if dist.get_rank() == 1:
    time.sleep(2)
with Peers() as both:
    assert both.size == 2 and ['`distributed=False`' in line for line in lines] == [True] * (both.rank == 0), lines
""", tmp_path)
