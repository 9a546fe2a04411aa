"""`timm-robust statistics`: what an attack does to normalization, and what the choice of statistics is worth."""
import math
from typing import List

import torch

from ..attacks import PGD
from ..errors import InputError
from ..evaluation import evaluate_attacks, plan_attacks
from ..evaluation.norm_statistics import layer_statistics, shift_rows
from ..evaluation.outcome import check_specs
from ..evaluation.render import text_table
from ..evaluation.render.figures import plot_statistics
from ..inputs import resolve_device, write_json
from ..layers import RobustNorm2d, set_bn_mode
from ..settings import to_mapping
from .arguments import Parser, apply_config, start_logging
from .inputs import measuring_parser, open_inputs, read_threat
from .outputs import measured_facts, new_output

__all__ = ['build_parser', 'run']

_NOTE = (
    'With batch statistics a prediction depends on the other images of its batch, and the attacks move whole batches; '
    'accuracy there is of these batches alone. `timm-robust diagnose` says what else to think of it.')


def build_parser() -> Parser:
    """The parser of `timm-robust statistics`."""
    parser, group = measuring_parser(
        'statistics',
        'Compare the statistics of clean and adversarial batches with the tracked ones, layer by layer (RobustNorm, '
        'figure 2), and accuracy with population and with batch statistics (RobustNorm, tables 1, 2 and 4).',
        'statistics.json and statistics.png',
        num_examples=1000)
    group.add_argument('--attacks', default='clean,fgsm,pgd20', metavar='NAMES',
                       help='clean, fgsm, fgsm-rs, bim, pgd, mim, cw (default: %(default)s)')
    return parser


def run(argv: List[str]) -> None:
    """Compare."""
    parser = build_parser()
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    threat = read_threat(args)
    if args.bn_mode:
        raise InputError(f'--bn-mode {args.bn_mode}: all of them are compared, leave it out')
    if args.gamma is not None:
        raise InputError(f'--gamma {args.gamma:g}: mixes tracked statistics alone, leave it out')
    if args.batch_size == 1:
        raise InputError('--batch-size 1: has no statistics of a batch, choose at least 2')
    if args.surrogate:
        raise InputError(f'--surrogate {args.surrogate}: the attacks are on the network itself, leave it out')
    specs = plan_attacks(args.attacks, threat)
    output = new_output(args, 'statistics.json')
    inputs = open_inputs(args, torch.device(resolve_device(args.device)))
    model, pixel_model = inputs.model, inputs.pixel_model
    modes = ['population', 'batch']
    if any(isinstance(m, RobustNorm2d) for m in model.modules()):
        modes.insert(1, 'mean')
    try:
        set_bn_mode(model, 'population')
    except ValueError as error:
        raise InputError(f'--model {args.model}: {error}') from error
    check_specs(specs, model.num_classes, batch_dependent=True)

    x, y = inputs.first(len(inputs.indices))
    adv = torch.cat([
        PGD(steps=20).craft(pixel_model, a, b, threat, seed=args.seed + i)
        for i, (a, b) in enumerate(zip(x.split(args.batch_size), y.split(args.batch_size)))])
    layers = {
        kind: {name.removeprefix('model.'): values for name, values in layer_statistics(
            pixel_model, images, args.batch_size).items()}
        for kind, images in (('clean', x), ('adversarial', adv))}
    rows = shift_rows(layers['clean'], layers['adversarial'], root='mean' not in modes)

    accuracy = {}
    for mode in modes:
        set_bn_mode(model, mode)
        results = evaluate_attacks(
            pixel_model, inputs.loader(), inputs.indices, specs, device=inputs.device, seed=args.seed,
            batch_size=args.batch_size, progress=False).results
        accuracy[mode] = {r.spec.name: r.accuracy for r in results}
    output.mkdir(parents=True, exist_ok=True)
    sample = f'{len(x)} images, batch {args.batch_size}, {threat}, seed {args.seed}'
    plot_statistics(rows, f'{args.model}\n{sample}, PGD-20 on population statistics', output / 'statistics.png')
    set_bn_mode(model, 'population')
    write_json(output / 'statistics.json', {
        **measured_facts('statistics', argv, inputs, threat),
        'accuracy': accuracy,
        'layers': {
            kind: {name: to_mapping(values) for name, values in found.items()} for kind, found in layers.items()},
    })
    names = list(accuracy['population'])
    print(f'\n{args.model}{" " + args.checkpoint if args.checkpoint else ""}: {sample}\n')
    print(text_table(
        [(mode, *(f'{accuracy[mode][n]:.1f}' for n in names)) for mode in modes],
        ('statistics', *(f'{n} %' for n in names))))
    print(f'\n{_NOTE}\n')
    worst = sorted(rows, key=lambda row: 0 if math.isnan(row.adversarial_mean) else -row.adversarial_mean)[:5]
    print('Layers whose mean an attack moves most, in tracked spreads (clean batches beside it):')
    print(text_table(
        [(r.layer, f'{r.adversarial_mean:.3f}', f'{r.clean_mean:.3f}') for r in worst],
        ('layer', 'adversarial', 'clean')))
    print(f"\nWritten: {output / 'statistics.json'}, {output / 'statistics.png'}")
