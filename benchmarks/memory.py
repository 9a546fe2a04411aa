"""Memory of an evaluation per image of a pool, with a network that needs almost no memory.

    python -m benchmarks.memory [--size 224] [--pools 64 128 256] [--json benchmarks/results/memory.json]

Counts the bytes of all live tensors except the data set. The first figure is for the whole evaluation, per image of a
pool of eight batches; the second is for the attack alone, called on the images of a pool.
"""
import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
import torch.nn as nn

from timm_robust import evaluate
from timm_robust.attacks import Attack, parse_attacks
from timm_robust.evaluation.report import versions

from .common import LiveBytes

BATCHES_IN_POOL = 8
# eps too small to fool any image, so that memory does not depend on which are fooled
ATTACKS = {'Linf 0.0001': 'pgd3,pgd-targeted3,apgd-ce3,apgd-t3,fab-t2,square8', 'L2 0.001': 'pgd3,apgd-ce3,square8'}


class Averages(nn.Module):
    """A linear layer on the mean of each channel."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


def measured(attack: Attack, threat: str, count: int, batch_size: int, size: int = 224, alone: bool = False) -> float:
    """Peak memory per image of a pool, in units of a float32 image.

    Args:
        attack: The attack.
        threat: Its threat model.
        count: Images to evaluate.
        batch_size: Images of a batch.
        size: Height and width of the images.
        alone: Call the attack on all images, without an evaluation.
    """
    torch.manual_seed(0)
    model, x = Averages().eval(), torch.rand(count, 3, size, size)
    with torch.no_grad():
        y = model(x).argmax(1)
    with LiveBytes() as live:
        if alone:
            attack.run(model, x, y, threat, batch_size=batch_size, seed=0, all_correct=True)  # as an evaluation does
        else:
            evaluate(model, x, y, attacks=['clean', attack], threat=threat, batch_size=batch_size, device='cpu',
                     progress=False, save_images=0, diagnose=False, allow_chance=True)
    return (live.peak + alone * x.nbytes) / x[0].nbytes / (BATCHES_IN_POOL * batch_size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--pools', nargs='+', type=int, default=[64, 128, 256], metavar='N')
    parser.add_argument('--json', default='', metavar='FILE', help='write the figures')
    args = parser.parse_args()
    given = [a for a in sys.argv[1:] if a not in ('--json', args.json)]
    rows = []
    mib = 4 * 3 * args.size ** 2 / 2 ** 20
    print(f'MiB for each image of a pool at {args.size}x{args.size}: evaluation (attack alone)')
    for threat, names in ATTACKS.items():
        for attack in parse_attacks(names):
            for pool in args.pools:
                whole, alone = (mib * measured(attack, threat, pool, pool // BATCHES_IN_POOL, args.size, alone)
                                for alone in (False, True))
                rows.append({'threat model': threat, 'attack': attack.name, 'images of a pool': pool,
                             'MiB of an image': whole, 'of the attack alone': alone})
                print(f'{threat} {attack.name} {pool}: {whole:.2f} ({alone:.2f})', flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({
            'command': shlex.join(['python', '-m', 'benchmarks.memory', *given]), 'size': args.size,
            'versions': versions(), 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
