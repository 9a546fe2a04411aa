"""Time and strength of our attacks compared with a reference, on the same network and images, in one run.

    python -m benchmarks.attacks --model resnet50 --checkpoint FILE --data-dir DIR --num-examples 1000 --split test

The reference is the AutoAttack repository (pip install git+https://github.com/fra31/auto-attack), for PGD torchattacks.
CPU time is printed as well as wall time, since other work on the machine affects it less. `--parts` selects attacks.
Memory is the peak of an attack beyond network and images: torch's allocations on a GPU, the process's memory on a CPU
under Linux.
"""
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import memory, synchronize
from timm_robust.attacks import PGD, input_gradient, make_fast_model, parse_attack
from timm_robust.attacks.losses import cross_entropy
from timm_robust.cli.arguments import Parser
from timm_robust.cli.flags import add_flags
from timm_robust.evaluation import ThreatConfig, versions
from timm_robust.evaluation.sources import open_data
from timm_robust.evaluation.subject import open_model
from timm_robust.inputs import ImagesConfig, NetworkConfig
from timm_robust.settings import from_flat

STEPS = 20


class Counter(torch.nn.Module):
    """Counts the images passed through a network, and the gradients computed."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def count(self, x: torch.Tensor) -> None:
        """Count the images of x, and their gradients once they are computed."""
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(lambda g: setattr(self, 'backwards', self.backwards + len(g)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count(x)
        return self.model(x)


class Shared(torch.nn.Module):
    """A fast copy to attack; its evaluations are added to those of the network."""

    def __init__(self, copy: torch.nn.Module, counter: Counter):
        super().__init__()
        self.copy = copy.eval()
        object.__setattr__(self, 'counter', counter)  # not as a submodule
        self.tolerance = copy.tolerance

    def float32(self) -> 'Shared':
        return Shared(self.copy.float32(), self.counter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counter.count(x)
        return self.copy(x)


def theirs(name: str, model, x, y, threat, batch_size: int) -> torch.Tensor:
    """The reference's adversarial images."""
    eps, norm = threat.eps, threat.norm
    common = dict(norm=norm, eps=eps, device=x.device, seed=0)
    larger = {'use_largereps': norm == 'L1'}  # as its AutoAttack does
    if name == 'pgd':
        import torchattacks
        attack = torchattacks.PGD(model, eps=eps, alpha=2.5 * eps / STEPS, steps=STEPS, random_start=False)
    elif name in ('apgd_ce', 'apgd_dlr'):
        from autoattack.autopgd_base import APGDAttack
        attack = APGDAttack(model, n_iter=100, loss=name[5:], **larger, **common).perturb
    elif name == 'apgd_t':
        from autoattack.autopgd_base import APGDAttack_targeted
        attack = APGDAttack_targeted(model, n_iter=100, **larger, **common).perturb
    elif name == 'fab_t':
        from autoattack.fab_pt import FABAttack_PT
        attack = FABAttack_PT(model, n_iter=100, targeted=True, **common).perturb
    elif name == 'square':
        from autoattack.square import SquareAttack
        attack = SquareAttack(model, n_queries=5000, p_init=.8, resc_schedule=False, **common).perturb
    else:
        from autoattack import AutoAttack
        attack = partial(AutoAttack(model, norm=norm, eps=eps, device=x.device, seed=0, verbose=False)
                         .run_standard_evaluation, bs=batch_size)
    return torch.cat([attack(a, b) for a, b in zip(x.split(batch_size), y.split(batch_size))])


def ours(name: str, model, x, y, threat, batch_size: int, copy) -> torch.Tensor:
    """Our adversarial images, crafted on the fast copy if there is one."""
    attack = PGD(steps=STEPS, random_start=False) if name == 'pgd' else parse_attack(name)
    fast_model = None if copy is None else Shared(copy, model)
    return attack(model, x, y, threat, batch_size=batch_size, fast_model=fast_model)


def floor(name: str, model, x, y, threat, batch_size: int) -> torch.Tensor:
    """The minimum cost of PGD if no image is fooled: a forward pass and an input gradient for each step."""
    adv = []
    for a, b in zip(x.split(batch_size), y.split(batch_size)):
        point = a
        for _ in range(STEPS):
            gradient, _, _ = input_gradient(model, point, partial(cross_entropy, target=b))
            point = point + 2.5 * threat.eps / STEPS * gradient.sign()
            point = torch.clamp(point, a - threat.eps, a + threat.eps).clamp(0, 1)
        adv.append(point)
    return torch.cat(adv)


@torch.no_grad()
def predicted(model, x) -> torch.Tensor:
    """Predicted classes."""
    return torch.cat([model(part).argmax(1) for part in x.split(500)])


def measure(model, x, y, attack, all_images: bool) -> dict:
    """Robust accuracy, time, memory and evaluations of the network."""
    counter = Counter(model).eval()
    count = len(y)
    if not all_images:
        right = predicted(model, x) == y
        x, y = x[right], y[right]
    with memory(x.device) as taken:
        wall, cpu = time.perf_counter(), time.process_time()
        adv = attack(counter, x, y)
        synchronize(x.device)
        wall, cpu, mib = time.perf_counter() - wall, time.process_time() - cpu, taken()
    holds = predicted(model, adv) == y
    return {'accuracy': 100 * holds.sum().item() / count, 'wall': wall, 'cpu': cpu, 'mib': mib,
            'forwards': counter.forwards / len(x), 'backwards': counter.backwards / len(x)}


def main() -> None:
    """Run the benchmark."""
    parser = Parser(prog='benchmarks.attacks', description=__doc__.split('\n', 1)[0])
    group = parser.add_argument_group('Benchmark parameters')
    group.add_argument('--seed', type=int, default=0, metavar='S', help='seed of the images (default: 0)')
    group.add_argument('--parts', default='pgd,apgd_ce,apgd_dlr,apgd_t,fab_t,square,autoattack', help='attacks to run')
    group.add_argument('--arms', default='reference,exact,float32,bfloat16',
                       help='arms, compared with the first: reference, floor (only for pgd), and our attack on the '
                            'network itself (exact) or on its fast copy (float32, bfloat16)')
    group.add_argument('--own-labels', action='store_true',
                       help='use the predictions of the network as labels, to time untrained networks; with a small '
                            'eps no image is fooled')
    group.add_argument('--json', default='', metavar='FILE', help='write the figures')
    group.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='CPU threads')
    group.add_argument('--all-images', action='store_true',
                       help='also attack images that are misclassified when clean, as torchattacks always does')
    for cls in (ThreatConfig, ImagesConfig, NetworkConfig):
        add_flags(parser, cls)
    parser.set_defaults(device='cpu')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threat = from_flat(ThreatConfig, vars(args)).threat
    subject = open_model(from_flat(NetworkConfig, vars(args)))
    source = open_data(from_flat(ImagesConfig, vars(args)), subject, seed=args.seed, usual_examples=1000)
    x, y = (t.to(subject.device) for t in source.first(len(source.indices)))
    model, size = subject.model, args.batch_size
    if args.own_labels:
        y = predicted(model, x)
    searched = {'exact': None, 'float32': make_fast_model(model, x[:8]),
                'bfloat16': make_fast_model(model, x[:8], torch.bfloat16)}
    found = {}
    print(f'{args.model} {args.checkpoint}, {len(x)} images, {threat}, batch {size}, {args.threads} threads')
    arms = {'reference': theirs, 'floor': floor, **{k: partial(ours, copy=v) for k, v in searched.items()}}
    for part in args.parts.split(','):
        base = None
        for name in args.arms.split(','):
            attack = partial(arms[name], part, threat=threat, batch_size=size)
            try:
                found[part, name] = row = measure(model, x, y, attack, args.all_images)
            except ImportError as error:
                print(f'{part:11}{name:10} not run: {error}')
                continue
            base = base or row
            print(f"{part:11}{name:10}{row['accuracy']:7.1f} %{row['wall']:9.1f} s  {row['wall'] / base['wall']:5.2f}"
                  f" of the first  CPU {row['cpu'] / base['cpu']:5.2f}  forwards {row['forwards']:7.1f} "
                  f"backwards {row['backwards']:6.1f}  {row['mib']:.0f} MiB", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(
                    {'command': shlex.join(['python', '-m', 'benchmarks.attacks', *sys.argv[1:]]),
                     'threat_model': str(threat), 'num_examples': len(x), 'seed': args.seed, 'batch_size': size,
                     'threads': args.threads, 'model': args.model, 'model_kwargs': dict(subject.facts.model_kwargs),
                     'weights_sha256': subject.facts.weights_sha256, 'all_images': args.all_images,
                     'versions': versions(),
                     'rows': [{'part': p, 'arm': a, **r} for (p, a), r in found.items()]}, indent=1) + '\n')


if __name__ == '__main__':
    main()
