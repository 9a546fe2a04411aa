"""How much of a training run's time is spent outside the network.

    python -m benchmarks.epoch quickstart --epochs 6
    python -m benchmarks.epoch train -c train_scripts/recipes/nofrost_resnet20_cifar10.yaml --data-dir DIR --epochs 1

Runs the command with a clock around its parts. Network time covers the task's passes, attacks and evaluation. The rest
is waiting for the loader, optimizer and weight averaging, checkpoints, and everything else (start, logging, figures).
"""
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import wraps
from typing import Iterator

import torch
from timm.task import TrainingTask

from timm_robust.cli import quickstart
from timm_robust.cli.main import main as command
from timm_robust.training import run
from timm_robust.training.checkpoint import AtomicCheckpointSaver

SPENT = defaultdict(float)
_OPEN = []


@contextmanager
def clock(name: str) -> Iterator[None]:
    """Adds up the time inside, excluding nested clocks."""
    start = time.perf_counter()
    _OPEN.append(0.)
    try:
        yield
    finally:
        taken = time.perf_counter() - start
        SPENT[name] += taken - _OPEN.pop()
        if _OPEN:
            _OPEN[-1] += taken


def timed(name: str, function):
    """The function under a clock."""
    @wraps(function)
    def wrapper(*args, **kwargs):
        with clock(name):
            return function(*args, **kwargs)
    return wrapper


class Waited:
    """A loader with a clock around the wait for each batch."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches = iter(self.loader)
        while True:
            with clock('loader'):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def epoch(train_one_epoch):
    """`train_one_epoch` with clocks around task, optimizer and average."""
    def wrapper(task: TrainingTask, loader, optimizer, *args, **kwargs):
        if 'forward' not in task.__dict__:
            task.forward = timed('network', task.forward)
            task.update_ema = timed('optimizer and average', task.update_ema)
            optimizer.step = timed('optimizer and average', optimizer.step)
        return train_one_epoch(task, Waited(loader), optimizer, *args, **kwargs)
    return wrapper


def main() -> None:
    """Run the command and print the times."""
    torch.Tensor.backward = timed('network', torch.Tensor.backward)
    for module in (run, quickstart):
        module.train_one_epoch = epoch(module.train_one_epoch)
    for name in ('validate', 'validate_robust'):
        setattr(run, name, timed('validation', getattr(run, name)))
    quickstart._measure = timed('validation', quickstart._measure)
    AtomicCheckpointSaver.save_checkpoint = timed('checkpoints', AtomicCheckpointSaver.save_checkpoint)
    with clock('other: start, logging, figures'):
        code = command(sys.argv[1:])
    total = sum(SPENT.values())
    print(f"\n{' '.join(sys.argv[1:])}: {total:.1f} s, {torch.get_num_threads()} thread(s)")
    for name, taken in sorted(SPENT.items(), key=lambda item: -item[1]):
        print(f'{name:<36}{taken:8.1f} s {100 * taken / total:6.1f} %')
    sys.exit(code)


if __name__ == '__main__':
    main()
