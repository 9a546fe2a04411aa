"""A 10-step attack on normalizer-free networks, with weights standardized once or in every step.

    python -m benchmarks.weight_cache --models nf_resnet26,nf_resnet50 --batches 8x64,32x64,8x224
"""
import sys
from contextlib import nullcontext
from unittest import mock

import timm
import torch
from timm.data import resolve_model_data_config

from benchmarks.common import Benchmark, add_arguments
from timm_robust.attacks import PGD, InputSpace, Linf
from timm_robust.cli.arguments import Parser


def main() -> None:
    """Run the benchmark."""
    parser = Parser(prog='benchmarks.weight_cache', description=__doc__.split('\n', 1)[0])
    add_arguments(parser, rounds=5)
    parser.add_argument('--device', default='cpu', help='device (default: cpu)')
    parser.add_argument('--models', default='nf_resnet26,nf_resnet50', help='networks (default: %(default)s)')
    parser.add_argument('--batches', default='8x64,32x64,8x224', help='images x size (default: %(default)s)')
    args = parser.parse_args(sys.argv[1:])
    bench = Benchmark('weight_cache', args)
    for name in args.models.split(','):
        model = timm.create_model(name).to(bench.device).eval()
        config = resolve_model_data_config(model)
        space, threat = InputSpace(config['mean'], config['std']), Linf('8/255')
        for batch in args.batches.split(','):
            count, size = map(int, batch.split('x'))
            x = space.normalize(torch.rand(count, 3, size, size, device=bench.device))
            y = torch.randint(model.num_classes, (count,), device=bench.device)

            def attack(x=x, y=y, model=model, space=space, threat=threat):
                return PGD(steps=10).craft(model, x, y, threat, space=space)

            def without(attack=attack):
                with mock.patch('timm_robust.attacks.context.cached_weights', lambda model: nullcontext()):
                    return attack()

            assert torch.equal(attack(), without())
            bench.compare(f'{name}, {count}x3x{size}x{size}', {'once': attack, 'in every step': without})


if __name__ == '__main__':
    main()
