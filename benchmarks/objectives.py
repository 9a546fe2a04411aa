"""Time and memory of a training step of each objective, compared with a plain step and with a lower bound.

    python -m benchmarks.objectives --model resnet50 --img-size 224 --batch-size 32
    python -m benchmarks.objectives --model MODEL --checkpoint FILE --data-dir DIR --split test

The lower bound ("floor") adds up plain steps (forward and backward pass) and gradient steps (forward pass and gradient
for the input, in eval mode), measured in the same run. FAT can be faster than its floor, which ignores that images
leave the batch; trained weights and real images show this. `apart two backwards` is the paper's recipe: layers
perturbed by hooks, and a backward pass after each of the two passes.
"""
import copy
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import nn

from benchmarks.common import Benchmark, add_arguments
from timm_robust.attacks import InputSpace, attack_mode, input_gradient
from timm_robust.attacks.losses import cross_entropy
from timm_robust.cli.arguments import Parser
from timm_robust.cli.flags import add_flags
from timm_robust.errors import InputError
from timm_robust.evaluation import ThreatConfig
from timm_robust.inputs import ImagesConfig, NetworkConfig, build_network, open_images
from timm_robust.settings import from_flat
from timm_robust.tasks import OBJECTIVES, TrainingAttack, create_task

# number of plain steps, and 1 if gradient steps are added
FLOORS = {'standard': (1, 0), 'sat': (2, 1), 'trades': (2, 1), 'fat': (1, 1), 'trades_fat': (2, 1), 'mbnat': (2, 1),
          'apart': (2, 0), 'apart, 4 groups': (2, 0), 'apart two backwards': (2, 0), 'madry': (1, 1)}


class Hooked:
    """APART by hooks on each BatchNorm and two backward passes, as in the paper."""

    def __init__(self, model: nn.Module, epsilon: float = .1):
        self.model, self.epsilon, self.d = model, epsilon, {}
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in self.norms:
            norm.register_forward_hook(self.perturb)

    def perturb(self, norm, args, output):
        if norm not in self.d:
            return output
        d_mean, d_var = (d.view(1, -1, 1, 1) for d in self.d[norm])
        weight, bias, mean, var = (
            t.view(1, -1, 1, 1) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
        normalized = F.batch_norm(args[0], None, None, None, None, True, 0., norm.eps)
        y = weight * (1 + d_var) * (normalized - d_mean * mean / (var + norm.eps).sqrt()) + bias
        return norm.act(y) if hasattr(norm, 'act') else y

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.d = {m: [torch.zeros_like(m.weight, requires_grad=True) for _ in range(2)] for m in self.norms}
        (.5 * F.cross_entropy(self.model(x), y)).backward()
        self.d = {m: [self.epsilon * d.grad.sign() for d in pair] for m, pair in self.d.items()}
        tracked = [(m, m.momentum) for m in self.norms]
        for norm in self.norms:
            norm.momentum = 0.
        (.5 * F.cross_entropy(self.model(x), y)).backward()
        for norm, momentum in tracked:
            norm.momentum = momentum
        self.d = {}


def arms_of(args, model: nn.Module, space: InputSpace, x: torch.Tensor, y: torch.Tensor):
    """A step of each objective, as functions by name."""
    def step(objective, **settings):
        network = copy.deepcopy(model).train()
        try:
            task = create_task(
                OBJECTIVES[objective](**settings), network, nn.CrossEntropyLoss(),
                attack=TrainingAttack(eps=args.eps, steps=args.attack_steps), space=space, device=x.device,
                verbose=False)
        except InputError as error:
            print(f'{objective}: not run, {error}')
            return None
        if args.torchcompile:
            task.compile(backend=args.torchcompile)

        def run():
            network.zero_grad()
            task(x, y)['loss'].backward()
        return run

    network = copy.deepcopy(model).train()

    def gradient():
        with attack_mode(network):
            input_gradient(network, x, partial(cross_entropy, target=y))

    arms = {'standard': step('standard'), 'gradient step': gradient, 'madry': step('madry')}
    arms.update({name: step(name) for name in ('sat', 'trades', 'fat', 'trades_fat', 'mbnat', 'apart')})
    if arms['apart'] is not None:
        arms['apart, 4 groups'] = step('apart', groups=4)
        hooked = Hooked(copy.deepcopy(model).train())
        arms['apart two backwards'] = lambda: (hooked.model.zero_grad(), hooked(x, y))
    return {name: arm for name, arm in arms.items() if arm is not None}


def main() -> None:
    """Run the benchmark."""
    parser = Parser(prog='benchmarks.objectives', description=__doc__.split('\n', 1)[0])
    add_arguments(parser.add_argument_group('Benchmark parameters'), rounds=7)
    parser.add_argument('--torchcompile', nargs='?', default=None, const='inductor', metavar='BACKEND',
                        help='compile the passes of training; attacks run uncompiled')
    parser.add_argument('--attack-steps', type=int, default=3, metavar='N', help='attack steps (default: 3)')
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='seed of images and weights (default: 0)')
    for cls in (ThreatConfig, ImagesConfig, NetworkConfig):
        add_flags(parser, cls)
    parser.set_defaults(batch_size=32)
    args = parser.parse_args()
    bench = Benchmark('objectives', args)
    if args.data_dir:
        network = build_network(from_flat(NetworkConfig, vars(args)), bench.device)
        model, config = network.model, network.preprocessing
        images = open_images(from_flat(ImagesConfig, vars(args)), network, seed=args.seed)
        x, y = images.first(args.batch_size)
    else:
        torch.manual_seed(args.seed)
        model = timm.create_model(args.model, **args.model_kwargs).to(bench.device)
        config = resolve_model_data_config(model)
        size = args.img_size or config['input_size'][-1]
        x = torch.rand(args.batch_size, 3, size, size, device=bench.device)
        y = torch.randint(model.num_classes, (len(x),), device=bench.device)
    space = InputSpace(config['mean'], config['std'])
    x = space.normalize(x)
    if args.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    shape = 'x'.join(map(str, x.shape))
    part = f"{args.model}{' channels_last' if args.channels_last else ''}, {shape}, {args.attack_steps} attack steps"
    part += ', compiled' if args.torchcompile else ''
    bench.compare(part, arms_of(args, model, space, x, y), memory_unit=1, floor=lambda name, t: (
        FLOORS[name][0] * t['standard'] + FLOORS[name][1] * args.attack_steps * t['gradient step']
        if name in FLOORS else None))
    if args.torchcompile:
        print(f"graphs compiled: {torch._dynamo.utils.counters['stats']['unique_graphs']}")


if __name__ == '__main__':
    main()
