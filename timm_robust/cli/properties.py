"""`timm-robust properties`: decision margin, boundary thickness and smoothness of a network (NoFrost, table 5)."""
import math
from typing import List

import torch

from ..errors import InputError
from ..evaluation.properties import boundary_thickness, decision_margin, smoothness
from ..evaluation.render import text_table
from ..inputs import resolve_device, write_json
from ..layers import has_batch_statistics
from .arguments import Parser, apply_config, start_logging
from .inputs import measuring_parser, open_inputs, read_threat
from .outputs import measured_facts, new_output

__all__ = ['build_parser', 'run']

_HEADER = ('property', 'mean', 'standard error', 'images')


def build_parser() -> Parser:
    """The parser of `timm-robust properties`."""
    parser, group = measuring_parser(
        'properties',
        'Decision margin M (L2 distance to the boundary along adversarial directions, of images classified '
        'correctly), boundary thickness T (L2 length on which neither class wins clearly) and smoothness D '
        '(largest KL divergence within eps): large M and T and small D go with robustness.',
        'properties.json',
        num_examples=500)
    group.add_argument('--steps', type=int, default=20, metavar='N', help='steps of each attack (default: 20)')
    group.add_argument('--num-targets', type=int, default=3, metavar='N',
                       help='wrong classes the margin is sought towards (default: 3)')
    return parser


def run(argv: List[str]) -> None:
    """Measure."""
    parser = build_parser()
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    threat = read_threat(args)
    if threat.eps == 0:
        raise InputError('--eps 0: leaves an attack nothing to do, give an eps above 0')
    if args.surrogate:
        raise InputError(f'--surrogate {args.surrogate}: properties are of one network, leave it out')
    output = new_output(args, 'properties.json')
    inputs = open_inputs(args, torch.device(resolve_device(args.device)))
    if has_batch_statistics(inputs.model):
        raise InputError(
            '--bn-mode: a network that normalizes by the batch has no boundary of its own, use '
            '--bn-mode population')
    x, y = inputs.first(len(inputs.indices))
    batches = list(zip(x.split(args.batch_size), y.split(args.batch_size)))
    model = inputs.pixel_model
    common = dict(threat=threat, steps=args.steps)
    measures = {
        'decision margin (L2)': lambda a, b: decision_margin(model, a, b, num_targets=args.num_targets, **common),
        'boundary thickness (L2)': lambda a, b: boundary_thickness(model, a, seed=args.seed, **common),
        f'smoothness (KL, {threat})': lambda a, b: smoothness(model, a, seed=args.seed, **common),
    }
    with torch.no_grad():
        right = torch.cat([model(a).argmax(1) == b for a, b in batches])
    rows, found, notes = [], {}, []
    for name, measure in measures.items():
        values = torch.cat([measure(a, b) for a, b in batches])
        found[name] = [v if math.isfinite(v) else None for v in values.tolist()]
        values = values[right] if name.startswith('decision') else values
        met = values[values.isfinite()].double()
        error = (met.std() / len(met) ** .5).item() if len(met) > 1 else float('nan')
        rows.append((name, f'{met.mean().item():.4g}', f'{error:.2g}', f'{len(met):,}'))
        if len(met) < len(values):
            notes.append(f'{name}: no boundary was met for {len(values) - len(met)} images, which the mean leaves out.')
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / 'properties.json', {
        **measured_facts('properties', argv, inputs, threat, steps=args.steps, num_targets=args.num_targets),
        'clean_accuracy': 100 * right.double().mean().item(),
        'correct': right.int().tolist(),
        'properties': found,
    })
    print(f'\n{args.model}{" " + args.checkpoint if args.checkpoint else ""}: {len(x)} images, attacks within '
          f'{threat}, {args.steps} steps, seed {args.seed}\n')
    print(text_table(rows, _HEADER))
    if notes:
        print('\n' + '\n'.join(notes))
    print(f"\nWritten: {output / 'properties.json'}")
