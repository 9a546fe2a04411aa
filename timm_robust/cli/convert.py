"""`timm-robust convert`: checkpoints of the papers' authors and of training runs as safetensors for a named model."""
import argparse
from pathlib import Path
from typing import Dict, List

import torch

from ..errors import InputError
from ..evaluate import weights_sha256, write_json
from ..hub.convert import Conversion, convert_state_dict, logits_of_fixed_input, read_checkpoint, write_safetensors
from ..train.build import build_model
from .arguments import Parser, add_model_arguments

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
                        help='of the floats in the file: float16 halves it and rounds the weights, so evaluate the '
                             'file and not the checkpoint (default: %(default)s)')
    add_model_arguments(parser, pretrained=False)
    return parser


def _listed(title: str, entries: Dict[str, str], arrow: str) -> List[str]:
    shown = [f'  {key} {arrow} {value}' for key, value in list(entries.items())[:5]]
    more = [f'  and {len(entries) - 5} more'] if len(entries) > 5 else []
    return [f'{title}: {len(entries)}', *shown, *more]


def report_text(found: Conversion) -> str:
    """What was renamed, dropped and added, for a terminal."""
    return '\n'.join([
        f'taken from: {found.source}, {len(found.state_dict)} tensors',
        *_listed('renamed', found.renamed, '->'),
        *_listed('dropped', found.dropped, '-'),
        *_listed('added', found.added, '-'),
    ])


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
    content = read_checkpoint(args.checkpoint, 'CHECKPOINT')
    args.pretrained = False
    model = build_model(args).eval()
    try:
        found = convert_state_dict(content, model, args.use_ema)
    except InputError as error:
        raise InputError(f'{args.checkpoint}: {error}') from error
    model.load_state_dict(found.state_dict, strict=True)
    logits = logits_of_fixed_input(model)
    if not torch.isfinite(logits).all():
        raise InputError(f'{args.checkpoint}: gives logits that are no numbers, the run it is of diverged')
    dtype = getattr(torch, args.dtype)
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    before, logits = logits, logits_of_fixed_input(model)
    change = 100 * (logits.softmax(1) - before.softmax(1)).abs().max().item()
    if not change <= _MOST_CHANGE:  # nan where a weight is beyond float16
        raise InputError(
            f'--dtype {args.dtype}: changes a probability of a fixed input by {change:.2g} points, which may be '
            f'{_MOST_CHANGE}: take float32')
    digest = weights_sha256(model)
    write_safetensors(output, weights)
    write_json(Path(f'{output}.json'), {
        'checkpoint': args.checkpoint, 'model': args.model, 'num_classes': model.num_classes,
        'model_kwargs': args.model_kwargs, 'weights_sha256': digest, 'taken_from': found.source,
        'renamed': found.renamed, 'dropped': found.dropped, 'added': found.added,
        'logits_of_fixed_input': logits.tolist(),
    })
    print(report_text(found))
    first = ', '.join(f'{v:.4f}' for v in logits[0, :5])
    print(
        f'logits of a fixed input: {first} ...\n'
        f'{args.dtype} changes probabilities of a fixed input by at most {change:.2g} points\n'
        f'Written: {output}, {output}.json')
