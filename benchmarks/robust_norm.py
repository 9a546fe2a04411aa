"""RobustNorm compared with BatchNorm and the paper's equations: forward and backward pass, and whole networks.

    python -m benchmarks.robust_norm --parts layer,evaluation,network

`layer` trains: output and gradients for input, scale and shift. `evaluation` normalizes by population statistics in
eval mode and computes only the gradient for the input, as an attack does. `network` is a training step of ResNet20,
batch 128. Shapes marked * were not used for tuning. Memory is for a forward and backward pass, in units of the input.
"""
import copy
import sys

import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import Benchmark, add_arguments
from timm_robust.cli.arguments import Parser
from timm_robust.layers import RobustNorm2d, replace_norm

TUNED = ((128, 16, 32, 32), (128, 64, 8, 8), (32, 64, 56, 56), (8, 256, 14, 14), (64, 32, 16, 16), (2, 64, 32, 32))
HELD_OUT = ((256, 16, 32, 32), (128, 128, 28, 28), (32, 512, 7, 7), (16, 24, 64, 64), (64, 3, 48, 48), (8, 2048, 7, 7))


class PaperNorm(RobustNorm2d):
    """RobustNorm from the paper's equations, differentiated by autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            mean, value_range = self.running_mean, self.running_var
        else:
            values = x.transpose(0, 1).reshape(x.shape[1], -1)
            mean, value_range = values.mean(1), values.max(1)[0] - values.min(1)[0]
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_(value_range.to(self.running_var), self.momentum)
        mean, spread, weight, bias = (
            v.to(x.dtype).view(1, -1, 1, 1)
            for v in (mean, value_range ** self.power + self.eps, self.weight, self.bias))
        return weight * (x - mean) / spread + bias


LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
NORMS = {'BatchNorm': nn.BatchNorm2d, 'RobustNorm': RobustNorm2d, 'paper': PaperNorm}


def layer_arms(shape, memory_format, bench: Benchmark, dtype: torch.dtype, training: bool):
    """Forward and backward pass of each norm on a shape."""
    x, upstream = (
        torch.randn(shape, device=bench.device, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()

    def arm(norm):
        layer = NORMS[norm](shape[1]).to(bench.device).train(training).requires_grad_(training)
        wanted = [x, *layer.parameters()] if training else [x]
        return lambda: torch.autograd.grad(layer(x), wanted, upstream)

    return {norm: arm(norm) for norm in NORMS}


def layers(bench: Benchmark, dtype: torch.dtype, training: bool) -> None:
    """Time the layer alone."""
    for shape in (*TUNED, *HELD_OUT):
        mib = torch.empty(0, dtype=dtype).element_size() * torch.Size(shape).numel() / 2 ** 20
        for name, memory_format in LAYOUTS.items():
            part = f"{'x'.join(map(str, shape))}{'*' if shape in HELD_OUT else ''}, {mib:.1f} MiB, {name}"
            bench.compare(
                part if training else f'evaluation {part}', layer_arms(shape, memory_format, bench, dtype, training),
                memory_unit=mib if mib >= 8 else None)


def network_arms(memory_format, bench: Benchmark):
    """A training step of ResNet20 with each norm."""
    x = torch.randn(128, 3, 32, 32, device=bench.device).contiguous(memory_format=memory_format)
    y = torch.randint(10, (128,), device=bench.device)
    twin = timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d', num_classes=10)

    def arm(norm):
        model = copy.deepcopy(twin)
        if norm != 'BatchNorm':
            replace_norm(model, NORMS[norm])
        model = model.to(bench.device, memory_format=memory_format).train()
        return lambda: (model.zero_grad(), F.cross_entropy(model(x), y).backward())

    return {norm: arm(norm) for norm in NORMS}


def networks(bench: Benchmark) -> None:
    """A training step of ResNet20."""
    for name, memory_format in LAYOUTS.items():
        bench.compare(f'ResNet20, 128x3x32x32, {name}', network_arms(memory_format, bench), memory_unit=1)


def main() -> None:
    """Run the benchmark."""
    parser = Parser(prog='benchmarks.robust_norm', description=__doc__.split('\n', 1)[0])
    add_arguments(parser, rounds=11)
    parser.add_argument('--device', default='cpu', help='device (default: cpu)')
    parser.add_argument('--dtype', default='float32', help='float32 or bfloat16 (default: float32)')
    parser.add_argument('--parts', default='layer,evaluation,network', help='what to run (default: %(default)s)')
    args = parser.parse_args(sys.argv[1:])
    bench = Benchmark('robust_norm', args)
    for part in args.parts.split(','):
        if part == 'network':
            networks(bench)
        else:
            layers(bench, getattr(torch, args.dtype), training=part == 'layer')


if __name__ == '__main__':
    main()
