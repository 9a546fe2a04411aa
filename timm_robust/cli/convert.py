"""`timm-robust convert`: convert checkpoints of training runs or of the papers' authors to safetensors."""
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

import torch

from ..errors import InputError, check_choice
from ..inputs import (
    ImagesConfig,
    Network,
    NetworkConfig,
    build_network,
    open_images,
    weights_sha256,
    write_json,
    write_weights,
)
from ..inputs.weights import logits_of_fixed_input
from ..settings import check_types, from_flat, setting
from .arguments import SettingsParser
from .flags import add_flags
from .outputs import new_file, print_next

__all__ = ['NO_FLAGS', 'ConvertConfig', 'build_parser', 'run']

# network settings that do not apply when weights are only converted
NO_FLAGS = ('checkpoint', 'pretrained', 'bn_mode', 'gamma', 'channels_last', 'device')
# Largest allowed change of a probability by rounding, in percentage points. A float16 weight has a relative error of up
# to 2 ** -11. If errors average out, a logit of size 10 changes by about 0.005, and a probability by at most a quarter
# of that (p (1 - p) <= 1 / 4), 0.12 points.
_MAX_CHANGE = 0.5


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `timm-robust convert`."""
    output: str = setting(
        '', 'safetensors file to write; the report is written to FILE.json', short='-o', metavar='FILE')
    dtype: str = setting(
        'float32', 'float32 or float16; float16 halves the file but rounds the weights; the effect is checked on '
        '500 images (--num-examples). Evaluate the new file, not the checkpoint')

    def __post_init__(self) -> None:
        check_types(self)
        check_choice('dtype', self.dtype, ('float32', 'float16'))


def build_parser() -> SettingsParser:
    """The parser of `timm-robust convert`."""
    parser = SettingsParser(
        ConvertConfig, ImagesConfig, prog='timm-robust convert',
        description='Convert a checkpoint to a safetensors file for a named model. Reads state dicts (also from '
                    'DataParallel), training checkpoints of timm and of this package, and checkpoints of the NoFrost '
                    'and RobustNorm authors. No code in a checkpoint is run.',
        examples=('timm-robust convert best_RA.pth --model nofrost_resnet50 -o weights.safetensors',))
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='.safetensors, .pth, .pt or .pth.tar file')
    add_flags(parser, NetworkConfig, without=NO_FLAGS)
    return parser


def _print_listed(title: str, entries: Dict[str, str], arrow: str) -> None:
    print(f'{title}: {len(entries)}')
    for key, value in list(entries.items())[:5]:
        print(f'  {key} {arrow} {value}')
    if len(entries) > 5:
        print(f'  and {len(entries) - 5} more')


@torch.no_grad()
def _round(network: Network, config: ImagesConfig) -> Tuple[Dict[str, torch.Tensor], str]:
    """Round the model's weights to float16 in place; return them and the largest change of a probability, as text."""
    def refused(problem: str, remedy: str) -> InputError:
        return InputError(problem, remedy, argument='dtype', value='float16')

    if not (config.data_dir or config.dataset):
        raise refused('the effect of rounding is measured on images', 'pass `data_dir`')
    images = open_images(config, network, usual_examples=500)

    def probabilities() -> torch.Tensor:
        return torch.cat([network.pixel_model(x).softmax(1) for x, _ in images.loader()])

    before = probabilities()
    weights = {k: v.half() if v.is_floating_point() else v.clone() for k, v in network.model.state_dict().items()}
    network.model.load_state_dict(weights)
    change = 100 * (probabilities() - before).abs().max().item()
    summary = f'float16 changes the probabilities of {len(before):,} images by at most {change:.2g} percentage points'
    if not change <= _MAX_CHANGE:  # nan if a weight overflows float16
        raise refused(f'{summary}, more than {_MAX_CHANGE}', 'use float32')
    return weights, f'{summary}\n'


def run(argv: List[str]) -> None:
    """Convert the checkpoint and write the report."""
    values = build_parser().read(argv)
    config, images = from_flat(ConvertConfig, values), from_flat(ImagesConfig, values)
    output = new_file(config.output, '.safetensors')
    if output.exists():
        raise InputError('already exists', 'choose another name', argument='output', value=config.output)
    network = build_network(from_flat(NetworkConfig, values), torch.device('cpu'), converts=True)
    model, found, checkpoint = network.model, network.conversion, network.checkpoint
    assert found and checkpoint
    if not torch.isfinite(logits_of_fixed_input(model)).all():
        raise InputError('gives logits that are not finite: the training run probably diverged', argument='checkpoint',
                         value=values['checkpoint'])
    weights, rounding = _round(network, images) if config.dtype == 'float16' else (found.state_dict, '')
    logits = logits_of_fixed_input(model)
    write_weights(output, weights)
    write_json(Path(f'{output}.json'), {
        'checkpoint': network.config.checkpoint, 'model': network.config.model, 'num_classes': model.num_classes,
        'model_kwargs': network.config.model_kwargs, 'weights_sha256': weights_sha256(model),
        'taken_from': checkpoint.source, 'renamed': found.renamed, 'dropped': found.dropped, 'added': found.added,
        'logits_of_fixed_input': logits.tolist(),
    })
    print(f'taken from: {checkpoint.source}, {len(found.state_dict)} tensors')
    _print_listed('renamed', found.renamed, '->')
    _print_listed('dropped', found.dropped, '-')
    _print_listed('added', found.added, '-')
    first = ', '.join(f'{v:.4f}' for v in logits[0, :5])
    print(f'logits of a fixed input: {first} ...\n{rounding}Written: {output}, {output}.json')
    print_next('eval', {
        'attacks': 'clean,pgd20,autoattack', 'data_dir': images.data_dir or 'DIR', 'dataset': images.dataset,
        'checkpoint': str(output), **{name: values[name] for name in (
            'model', 'num_classes', 'in_chans', 'img_size', 'model_kwargs') if name in values}})
