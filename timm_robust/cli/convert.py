"""`timm-robust convert`: checkpoints of the papers' authors and of training runs as safetensors for a named model."""
import argparse
from pathlib import Path
from typing import Dict, List, Tuple

import torch

from ..errors import InputError
from ..inputs import Network, pixel_network, weights_sha256, write_json, write_weights
from ..inputs.weights import logits_of_fixed_input
from .arguments import Parser, add_model_arguments
from .inputs import add_image_arguments, images_for, open_converted

__all__ = ['build_parser', 'run']

_MOST_CHANGE = 0.1  # of a probability, by rounding, in percentage points


def build_parser() -> Parser:
    """The parser of `timm-robust convert`."""
    parser = Parser(
        prog='timm-robust convert',
        description='Turn a checkpoint into a safetensors file for a named model. Knows state dicts, also of '
                    "DataParallel, training checkpoints of timm and of this package, the NoFrost authors' and the "
                    "RobustNorm authors'. Nothing in a checkpoint is run.")
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='.safetensors, .pth, .pt or .pth.tar file')
    parser.add_argument('-o', '--output', required=True, metavar='FILE',
                        help='safetensors file to write; the report goes beside it, as FILE.json')
    parser.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=True,
                        help='prefer averaged weights of the checkpoint (default: yes)')
    parser.add_argument('--dtype', choices=('float32', 'float16'), default='float32',
                        help='of the floats in the file: float16 halves it and rounds the weights, which is judged '
                             'on the images of --data-dir; evaluate the file then, not the checkpoint '
                             '(default: %(default)s)')
    add_image_arguments(parser, num_examples=500)
    add_model_arguments(parser, pretrained=False, seed=0)
    return parser


def _listed(title: str, entries: Dict[str, str], arrow: str) -> List[str]:
    shown = [f'  {key} {arrow} {value}' for key, value in list(entries.items())[:5]]
    more = [f'  and {len(entries) - 5} more'] if len(entries) > 5 else []
    return [f'{title}: {len(entries)}', *shown, *more]


def report_text(network: Network) -> str:
    """What was renamed, dropped and added, for a terminal."""
    found = network.conversion
    return '\n'.join([
        f'taken from: {network.checkpoint.source}, {len(found.state_dict)} tensors',
        *_listed('renamed', found.renamed, '->'),
        *_listed('dropped', found.dropped, '-'),
        *_listed('added', found.added, '-'),
    ])


@torch.no_grad()
def _round(network: Network, args: argparse.Namespace) -> Tuple[Dict[str, torch.Tensor], str]:
    """Weights in float16, which the model then has too, and by how much that changes what it says of images."""
    if not (args.data_dir or args.dataset):
        raise InputError('--dtype float16: rounding is judged on images, give --data-dir')
    model = network.model
    weights = {k: v.half() if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}
    pixel_network(model, network.preprocessing, network.device, args.channels_last)
    inputs = images_for(network, args)

    def probabilities():
        return torch.cat([inputs.pixel_model(x).softmax(1) for x, _ in inputs.loader()])

    before = probabilities()
    model.load_state_dict(weights)
    change = 100 * (probabilities() - before).abs().max().item()
    told = f'float16 changes the probabilities of {len(before):,} images by at most {change:.2g} points'
    if not change <= _MOST_CHANGE:  # nan where a weight is beyond float16
        raise InputError(f'--dtype float16: {told}, more than {_MOST_CHANGE}: take float32')
    return weights, f'{told}\n'


def run(argv: List[str]) -> None:
    """Convert."""
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    if output.suffix != '.safetensors':
        raise InputError(f'--output {output}: must end in .safetensors')
    if output.exists():
        raise InputError(f'--output {output}: exists, choose another name')
    if not output.parent.is_dir():
        raise InputError(f'--output {output}: no such folder, make it first')
    network = open_converted(args, args.checkpoint, args.use_ema)
    model, found = network.model, network.conversion
    if not torch.isfinite(logits_of_fixed_input(model)).all():
        raise InputError(f'{args.checkpoint}: gives logits that are not finite: the training run probably diverged')
    weights, rounding = _round(network, args) if args.dtype == 'float16' else (found.state_dict, '')
    logits = logits_of_fixed_input(model)
    digest = weights_sha256(model)
    write_weights(output, weights)
    write_json(Path(f'{output}.json'), {
        'checkpoint': args.checkpoint, 'model': args.model, 'num_classes': model.num_classes,
        'model_kwargs': network.config.model_kwargs, 'weights_sha256': digest, 'taken_from': network.checkpoint.source,
        'renamed': found.renamed, 'dropped': found.dropped, 'added': found.added,
        'logits_of_fixed_input': logits.tolist(),
    })
    print(report_text(network))
    first = ', '.join(f'{v:.4f}' for v in logits[0, :5])
    print(f'logits of a fixed input: {first} ...\n{rounding}Written: {output}, {output}.json')
