"""Surviving images and time of `quick`, `best` and AutoAttack, on the same network and images, in one run.

    python -m benchmarks.ensembles --model nofrost_resnet20_cifar --pretrained --data-dir DIR --split test \\
        --num-examples 64 --json benchmarks/results/ensembles/NAME.json

Each attack of an ensemble runs on the images that survived those before it. `best` starts with AutoAttack and includes
its outcome and time. Ratios are of CPU time, since other work on the machine affects it less.
"""
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from timm_robust.attacks import AutoAttack, Best, Quick, make_fast_model
from timm_robust.cli.arguments import Parser
from timm_robust.cli.flags import add_flags
from timm_robust.evaluation import ThreatConfig, versions
from timm_robust.evaluation.sources import open_data
from timm_robust.evaluation.subject import open_model
from timm_robust.inputs import ImagesConfig, NetworkConfig
from timm_robust.settings import from_flat


def main() -> None:
    """Run the benchmark."""
    parser = Parser(prog='benchmarks.ensembles', description=__doc__.split('\n', 1)[0])
    group = parser.add_argument_group('Benchmark parameters')
    group.add_argument('--seed', type=int, default=0, metavar='S', help='seed of images and noise (default: 0)')
    group.add_argument('--json', default='', metavar='FILE', help='write the figures')
    for cls in (ThreatConfig, ImagesConfig, NetworkConfig):
        add_flags(parser, cls)
    parser.set_defaults(device='cpu')
    args = parser.parse_args()
    torch.set_num_threads(1)
    threat = from_flat(ThreatConfig, vars(args)).threat
    subject = open_model(from_flat(NetworkConfig, vars(args)))
    source = open_data(from_flat(ImagesConfig, vars(args)), subject, seed=args.seed)
    x, y = (t.to(subject.device) for t in source.first(len(source.indices)))
    model, rows = subject.model, []
    fast = make_fast_model(model, x[:8])
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) == label for part, label in zip(
            x.split(args.batch_size), y.split(args.batch_size))]).nonzero().squeeze(1)
    print(f'{subject.facts.name}, {threat}, {len(x)} images, {len(right)} correct', flush=True)
    ends = {}
    for ensemble in (Quick(), AutoAttack(), Best()):
        members, left, cpu, wall = list(ensemble.members(subject.facts.num_classes)), right, 0., 0.
        if ensemble.first is not None:
            left, cpu, wall = ends[str(ensemble.first)]
            del members[:len(ensemble.first.members(subject.facts.num_classes))]
        for member in members:
            began = time.process_time(), time.perf_counter()
            found = member.run(model, x[left], y[left], threat, seed=(args.seed << 20) + left,
                               batch_size=args.batch_size, fast_model=fast)
            cpu, wall = cpu + time.process_time() - began[0], wall + time.perf_counter() - began[1]
            left = left[~found.fooled]
            rows.append({'ensemble': str(ensemble), 'after': str(member), 'left': len(left), 'cpu': cpu, 'wall': wall})
            print(f'{str(ensemble):12}{str(member):14}{len(left):5} survived  CPU {cpu:8.1f} s  wall {wall:8.1f} s',
                  flush=True)
        ends[str(ensemble)] = left, cpu, wall
    base = set(ends['autoattack'][0].tolist())
    for name, (left, cpu, _) in ends.items():
        ratio, kept = cpu / ends['autoattack'][1], set(left.tolist())
        print(f'{name:12}{len(left):5} survived; {len(kept - base)} of them broken by AutoAttack; {len(base - kept)} '
              f'broken that survived AutoAttack; {ratio:.3f} of its CPU time')
    if args.json:
        Path(args.json).write_text(json.dumps({
            'command': shlex.join(['python', '-m', 'benchmarks.ensembles', *sys.argv[1:]]), 'model': subject.facts.name,
            'weights_sha256': subject.facts.weights_sha256, 'threat_model': str(threat), 'num_examples': len(x),
            'correct': len(right), 'versions': versions(), 'rows': rows,
            'ensembles': {name: {'left': left.tolist(), 'cpu': cpu, 'wall': wall}
                          for name, (left, cpu, wall) in ends.items()}}, indent=1) + '\n')


if __name__ == '__main__':
    main()
