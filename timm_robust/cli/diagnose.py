"""`timm-robust diagnose`: is the robustness of a network real?"""
import shlex
import textwrap
from typing import List, Sequence

import torch

from ..errors import InputError
from ..evaluate import Finding, diagnose, plot_loss_surface, weights_sha256, write_json
from ..evaluate.report import versions
from ..evaluate.surface import loss_surface
from ..models.search_copy import make_search_model
from ..train.build import resolve_device
from .arguments import Parser, apply_config, start_logging
from .inputs import add_input_arguments, add_threat_arguments, build_surrogate, open_inputs, read_threat
from .outputs import new_output

__all__ = ['build_parser', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust diagnose`."""
    parser = Parser(
        prog='timm-robust diagnose',
        description='Look for signs that a network hides its gradients, or depends on the batch, instead of being '
                    'robust.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for these flags')
    group = parser.add_argument_group('Diagnosis parameters')
    add_threat_arguments(group)
    group.add_argument('--output', default='', metavar='DIR',
                       help='folder for diagnostics.json and loss_surface.png (default: '
                            './output/diagnostics/TIME-MODEL)')
    add_input_arguments(parser, num_examples=100)
    return parser


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings for a terminal: verdict, name and what a reader should conclude."""
    return '\n\n'.join(
        f"{f.verdict.upper():<8} {f.name.replace('_', ' ')}\n"
        + textwrap.fill(f.text, 110, initial_indent=' ' * 9, subsequent_indent=' ' * 9) for f in findings)


def run(argv: List[str]) -> None:
    """Diagnose."""
    parser = build_parser()
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    threat = read_threat(args)
    if threat.eps == 0:
        raise InputError('--eps 0: leaves an attack nothing to do, give an eps above 0')
    device = torch.device(resolve_device(args.device))
    output = new_output(args, 'diagnostics.json')
    inputs = open_inputs(args, device)
    surrogate = build_surrogate(args, inputs)
    x, y = inputs.first(len(inputs.indices))
    model = inputs.pixel_model
    findings = diagnose(
        model, x, y, threat, batch_size=args.batch_size, seed=args.seed, surrogate=surrogate,
        search_model=make_search_model(model, x[:8]))
    surface = loss_surface(model, x, y, threat, batch_size=args.batch_size, seed=args.seed)
    output.mkdir(parents=True, exist_ok=True)
    title = f'{args.model}\n{threat}, {len(x)} images, seed {args.seed}'
    plot_loss_surface(surface, title, output / 'loss_surface.png')
    write_json(output / 'diagnostics.json', {
        'model': {'name': args.model, 'checkpoint': args.checkpoint, 'weights_sha256': weights_sha256(inputs.model)},
        'data': {'data_dir': args.data_dir, 'dataset': args.dataset, 'split': args.split, 'indices': inputs.indices},
        'threat_model': {'norm': threat.norm, 'eps': threat.eps, 'text': str(threat)},
        'settings': {'seed': args.seed, 'command': shlex.join(['timm-robust', 'diagnose', *argv])},
        'diagnostics': [vars(f) for f in findings],
        'loss_surface': surface,
        'versions': versions(),
    })
    print(f'\n{args.model}{" " + args.checkpoint if args.checkpoint else ""}: {len(x)} images, {threat}, '
          f'seed {args.seed}\n')
    print(findings_text(findings))
    print(f"\nWritten: {output / 'diagnostics.json'}, {output / 'loss_surface.png'}")
