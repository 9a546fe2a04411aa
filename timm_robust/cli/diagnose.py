"""`timm-robust diagnose`: is the robustness of a network real?"""
import textwrap
from typing import List, Sequence

import torch

from ..errors import InputError
from ..evaluation import Finding, diagnose, plot_loss_surface
from ..evaluation.surface import loss_surface
from ..inputs import resolve_device, write_json
from ..models.search_copy import make_search_model
from .arguments import Parser, apply_config, start_logging
from .inputs import build_surrogate, measuring_parser, open_inputs, read_threat
from .outputs import measured_facts, new_output

__all__ = ['build_parser', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust diagnose`."""
    parser, _ = measuring_parser(
        'diagnose',
        'Look for signs that a network hides its gradients, or depends on the batch, instead of being robust.',
        'diagnostics.json and loss_surface.png',
        num_examples=100)
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
        **measured_facts('diagnose', argv, inputs, threat),
        'diagnostics': [vars(f) for f in findings],
        'loss_surface': surface,
    })
    print(f'\n{args.model}{" " + args.checkpoint if args.checkpoint else ""}: {len(x)} images, {threat}, '
          f'seed {args.seed}\n')
    print(findings_text(findings))
    print(f"\nWritten: {output / 'diagnostics.json'}, {output / 'loss_surface.png'}")
