"""Cost of the views of NoFrost*: their loader compared with a plain loader, Noise2Net with a plain training step.

    python -m benchmarks.views --data-dir imagenet --img-size 224 -b 32 --num-examples 256
"""
import sys

import timm
import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import Subset

from benchmarks.common import Benchmark, add_arguments
from timm_robust.cli.arguments import Parser
from timm_robust.data.augment import ViewsDataset, noise2net, texture_debiased


class _Part(Subset):
    """A subset whose loader sets the transform of the data set."""

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, value):
        self.dataset.transform = value


def main() -> None:
    """Run the benchmark."""
    parser = Parser(prog='benchmarks.views', description=__doc__.split('\n', 1)[0])
    add_arguments(parser, rounds=5)
    parser.add_argument('--device', default='cpu', help='device (default: cpu)')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder of images')
    parser.add_argument('--split', default='validation', help='split (default: validation)')
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='height and width (default: 224)')
    parser.add_argument('--model', default='nofrost_resnet26', help='network of the step (default: %(default)s)')
    parser.add_argument('-b', '--batch-size', type=int, default=32, metavar='N')
    parser.add_argument('--num-examples', type=int, default=256, metavar='N', help='images per round (default: 256)')
    args = parser.parse_args(sys.argv[1:])
    bench = Benchmark('views', args)
    size = (3, args.img_size, args.img_size)

    def opened():
        return create_dataset('', root=args.data_dir, split=args.split)

    def loader(dataset):
        part = _Part(dataset, range(args.num_examples))
        return create_loader(
            part, size, args.batch_size, is_training=True, color_jitter=0., num_workers=0, device=bench.device,
            persistent_workers=False)

    plain, again, other = loader(opened()), loader(opened()), opened()
    apart = loader(other)
    other.transform = texture_debiased(args.img_size)
    debiased = loader(ViewsDataset(opened(), args.img_size))
    deep = loader(ViewsDataset(opened(), args.img_size, [args.data_dir]))
    bench.compare(f'{args.num_examples} images of {args.img_size}x{args.img_size}, no workers', {
        'clean': lambda: [None for _ in plain],
        'clean and debiased': lambda: [None for _ in debiased],
        'clean, debiased and deep folder': lambda: [None for _ in deep],
        'clean and debiased, decoded twice': lambda: [None for _ in zip(plain, apart)],
        'clean twice': lambda: [None for _ in zip(plain, again)],
    })

    model = timm.create_model(args.model, num_classes=10).to(bench.device).train()
    x = torch.rand(args.batch_size, *size, device=bench.device)
    y = torch.arange(args.batch_size, device=bench.device) % 10
    bench.compare(f'{args.model}, {args.batch_size}x3x{args.img_size}x{args.img_size}', {
        'plain step': lambda: torch.nn.functional.cross_entropy(model(x), y).backward(),
        'noise2net': lambda: noise2net(x, 0),
    })


if __name__ == '__main__':
    main()
