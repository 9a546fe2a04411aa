"""`timm-robust diagnose`: is the robustness of a network real?"""
from typing import List

import torch

from ..attacks import make_fast_model
from ..errors import InputError
from ..evaluation import diagnose, loss_surface
from ..evaluation.render import findings_text, plot_loss_surface
from ..inputs import resolve_device, write_json
from ..settings import to_mapping
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
        fast_model=make_fast_model(model, x[:8]))
    surface = loss_surface(model, x, y, threat, batch_size=args.batch_size, seed=args.seed)
    output.mkdir(parents=True, exist_ok=True)
    title = f'{args.model}, {threat}, {len(x)} images, seed {args.seed}'
    plot_loss_surface(surface, title, output / 'loss_surface.png')
    write_json(output / 'diagnostics.json', {
        **measured_facts('diagnose', argv, inputs, threat),
        'findings': [to_mapping(f) for f in findings],
        'surface': to_mapping(surface),
    })
    print(f'\n{args.model}{" " + args.checkpoint if args.checkpoint else ""}: {len(x)} images, {threat}, '
          f'seed {args.seed}\n')
    print(findings_text(findings))
    print(f"\nWritten: {output / 'diagnostics.json'}, {output / 'loss_surface.png'}")
