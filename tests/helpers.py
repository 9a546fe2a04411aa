"""What several tests need."""
import dataclasses
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from timm_robust.attacks import ATTACKS, NFGSM, Ensemble, base, make_threat


def documented_attack(name: str = 'noise') -> str:
    """The module of the attack in the docstring of attacks/base.py, under some name."""
    example = base.__doc__.partition('    @register_attack')
    code = textwrap.dedent(''.join(example[1:])).replace("name = 'noise'", f'name = {name!r}')
    return (
        'import math\nimport torch\nfrom timm_robust import Attack, register_attack\n'
        f'from timm_robust.attacks import keep_best, logit_gap\nfrom timm_robust.settings import setting\n{code}')


class TinyNet(nn.Module):
    """A small convolutional network with optional BatchNorm and dropout, in float32 or float64."""

    def __init__(self, norm: bool = False, drop: float = 0., in_chans: int = 3, num_classes: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(8, num_classes)
        self.num_classes = num_classes

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc(self.drop(x))


class CountingBackend:
    """A compiler that leaves graphs as they are and counts them and their runs."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def make_image_folder(
        root: Path,
        splits=('train', 'validation'),
        classes=('a', 'b'),
        per_class: int = 8,
        size: int = 32,
):
    """Write an image folder whose classes differ in brightness, so that a network can learn them."""
    generator = np.random.default_rng(0)
    for split in splits:
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            low, high = 256 * index // len(classes), 256 * (index + 1) // len(classes)
            for i in range(per_class):
                pixels = generator.integers(low, high, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root


def run_cli(*argv, timeout: int = 300, **env):
    """Run `python -m timm_robust` in a process of its own."""
    return subprocess.run(
        [sys.executable, '-m', 'timm_robust', *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def run_distributed(script: str, tmp_path: Path, processes: int = 2, timeout: int = 240) -> str:
    """Run a script under torchrun over gloo; returns its output."""
    path = tmp_path / 'script.py'
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', f'--nproc-per-node={processes}', '--master-addr=127.0.0.1',
         f'--master-port={free_port()}', str(path)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo',
             'PYTHONPATH': os.pathsep.join(map(str, Path(__file__).parents[:2]))},
    )
    of_second = '\n'.join(line for line in done.stderr.splitlines() if 'rank1' in line)
    assert done.returncode == 0, (of_second or done.stderr)[-3000:]
    return done.stdout


def state_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two state dicts are bit-equal."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


EPS = {'Linf': .03, 'L2': .3, 'L1': 2.}
SETTINGS = {  # in so few steps a default would find nothing
    'cw-l2': dict(steps=20, binary_search_steps=3, initial_const=10.), 'ddn': dict(first_norm=.2),
    'fmn': dict(steps=20), 'rays': dict(query_limit=200),
    'square': dict(query_limit=50)}


def short_attack(cls, **settings):
    """An attack of the class that does not take long."""
    return _shortened(cls(), **settings)


def _shortened(attack, **settings):
    cls = type(attack)
    if isinstance(attack, Ensemble):
        return type(cls.__name__, (cls,), {
            'members': lambda self, num_classes=None, threat=None: tuple(
                map(_shortened, attack.members(num_classes, threat)))})()
    budget = {cls.budget: 6} if cls.budget else {}
    return dataclasses.replace(attack, **{**budget, **SETTINGS.get(cls.name, {}), **settings})


def defined_attacks():
    """Every registered attack under each norm that it is for."""
    for cls in ATTACKS.values():
        if cls is not NFGSM:  # whose images are not within eps
            for norm in EPS if cls.norms is None else cls.norms:
                members = short_attack(cls).members(threat=make_threat(norm, EPS[norm]))
                if all(m.norms is None or norm in m.norms for m in members):
                    yield pytest.param(cls, make_threat(norm, EPS[norm]), id=f'{cls.name}-{norm}')
