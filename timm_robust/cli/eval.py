"""`timm-robust eval`: clean and robust accuracy of any timm model, and accuracy on shifted images."""
import dataclasses
import os
import shlex
from typing import Dict, List, Tuple

import torch

from ..errors import InputError
from ..evaluation import EvalConfig, ThreatConfig, evaluate
from ..evaluation.render import findings_text
from ..inputs import ImagesConfig, NetworkConfig, init_process
from .arguments import Parser, apply_config, start_logging
from .flags import add_attack_flags, add_flags, from_flags
from .outputs import new_name

__all__ = ['build_parser', 'run']


def _parser() -> Tuple[Parser, Dict[str, str]]:
    parser = Parser(prog='timm-robust eval', description='Measure clean and robust accuracy of a timm model.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for these flags')
    for cls in (ThreatConfig, EvalConfig, ImagesConfig, NetworkConfig):
        add_flags(parser, cls)
    return parser, add_attack_flags(parser)


def build_parser() -> Parser:
    """The parser of `timm-robust eval`."""
    return _parser()[0]


def run(argv: List[str]) -> None:
    """Evaluate."""
    parser, attack_flags = _parser()
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    settings = {name: getattr(args, flag) for name, flag in attack_flags.items() if getattr(args, flag) is not None}
    network, images = from_flags(NetworkConfig, args), from_flags(ImagesConfig, args)
    try:
        config = from_flags(
            EvalConfig, args, threat=from_flags(ThreatConfig, args).threat, attack_settings=settings,
            output=args.output or new_name('eval', args.model), command=shlex.join(['timm-robust', 'eval', *argv]))
    except InputError as error:
        raise (error.about('eps', args.eps) if error.argument == 'threat' else error) from error
    process = init_process(args.device)
    try:
        report = evaluate(
            dataclasses.replace(network, device=str(process.device)), images,
            **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    finally:
        if process.distributed:
            torch.distributed.destroy_process_group()
    if not process.primary:
        return
    print(f'\n{report}')
    if report.findings:
        print('\nIs the robustness real?\n\n' + findings_text(report.findings))
    print(f'\nWritten to {config.output}: ' + ', '.join(sorted(os.listdir(config.output))))
