"""Shared code of the benchmarks: running arms in turn, medians, memory, and the output file."""
import argparse
import ctypes
import gc
import json
import os
import shlex
import statistics
import sys
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_robust.evaluation.report import versions

Arms = Dict[str, Callable[[], Any]]


def resident(name: str) -> float:
    """Memory of this process in MiB: current ('VmRSS') or peak ('VmHWM')."""
    line = next(v for v in Path('/proc/self/status').read_text().splitlines() if v.startswith(name))
    return int(line.split()[1]) / 1024


@contextmanager
def memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the peak of additional memory in MiB."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
    else:
        ctypes.CDLL('libc.so.6').malloc_trim(0)  # memory freed by another arm would hide this one's
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
        before = resident('VmRSS')
        yield lambda: resident('VmHWM') - before


class LiveBytes(TorchDispatchMode):
    """Counts the exact bytes of live tensors created inside the context, on any device.

    Attributes:
        peak: The maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: Dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._known:
                    self._known[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Wall time of a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Flags of every benchmark except --device."""
    parser.add_argument('--rounds', type=int, default=rounds, metavar='N',
                        help='runs of each arm, taking turns (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='CPU threads')
    parser.add_argument('--json', default='', metavar='FILE', help='write the figures')


class Benchmark:
    """Runs arms in turn, prints their medians as ratios to the first arm, and keeps the figures.

    Args:
        name: The script.
        args: Parsed arguments of `add_arguments`.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device or 'cpu')
        torch.set_num_threads(args.threads)
        on_gpu = self.device.type == 'cuda'
        named = torch.cuda.get_device_name(self.device) if on_gpu else f'CPU, {args.threads} thread(s)'
        given = [a for a in sys.argv[1:] if a not in ('--json', args.json)]
        allocator = [f'{k}={v}' for k, v in sorted(os.environ.items()) if k.startswith('MALLOC_')]
        command = shlex.join([*allocator, 'python', '-m', f'benchmarks.{name}', *given])
        self.facts = {'command': command, 'device': named, 'rounds': args.rounds, 'versions': versions()}
        self.rows: List[Dict[str, Any]] = []
        print(f"{name}: {named}, medians of {args.rounds}, {self.facts['versions']}")

    def compare(
            self,
            part: str,
            arms: Arms,
            floor: Optional[Callable[[str, Dict[str, float]], Optional[float]]] = None,
            memory_unit: Optional[float] = None,
    ) -> Dict[str, float]:
        """Median seconds of each arm.

        Args:
            part: Description of what the arms have in common, used as the heading of their rows.
            arms: Functions by name; the others are compared with the first.
            floor: Maps the name of an arm and all medians to a lower bound on its seconds.
            memory_unit: Also measure the memory of a call, in units of this many MiB.
        """
        for function in arms.values():
            function()
        # short calls are repeated so that the clock can resolve them
        repeats = {name: max(1, round(.02 / max(seconds(f, self.device), 1e-6))) for name, f in arms.items()}
        times = {name: [] for name in arms}
        for _ in range(self.args.rounds):
            for name, function in arms.items():
                times[name].append(seconds(function, self.device, repeats[name]))
        medians = {name: statistics.median(t) for name, t in times.items()}
        first = next(iter(medians.values()))
        for name, function in arms.items():
            row = {'part': part, 'arm': name, 'milliseconds': 1e3 * medians[name], 'ratio': medians[name] / first}
            least = floor(name, medians) if floor else None
            if least:
                row['ratio to floor'] = medians[name] / least
            if memory_unit:
                with memory(self.device) as taken:
                    function()
                    synchronize(self.device)
                    row['MiB' if memory_unit == 1 else 'inputs of memory'] = taken() / memory_unit
            self.add(row)
        return medians

    def add(self, row: Dict[str, Any]) -> None:
        """Print a row and keep it."""
        self.rows.append(row)
        print('  '.join(f'{k} {v:.3f}' if isinstance(v, float) else f'{v:<24}' if k in ('part', 'arm') else f'{k} {v}'
                        for k, v in row.items()), flush=True)
        if self.args.json:
            Path(self.args.json).write_text(json.dumps({**self.facts, 'rows': self.rows}, indent=1) + '\n')
