"""`timm-robust eval`: clean and robust accuracy of any timm model."""
import argparse
import hashlib
import json
import logging
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence

import torch
from timm.utils import init_distributed_device, is_primary

from ..attacks import Clean, Ensemble, make_fast_model, make_threat, parse_eps
from ..errors import InputError, check_at_least, check_choice
from ..evaluation import (
    AttackSpec,
    EvaluationReport,
    Journal,
    diagnose,
    evaluate_attacks,
    example_images,
    loss_surface,
    plan_attacks,
)
from ..evaluation.accuracy import sweep_eps, sweep_mbnat_gamma
from ..evaluation.outcome import assemble, check_specs, threat_facts, to_outcome
from ..evaluation.render import findings_text
from ..inputs import resolve_device, weights_sha256
from ..layers import has_batch_statistics
from ..settings import to_mapping
from .arguments import Parser, apply_config, start_logging
from .benchmarks import add_benchmark_arguments, run_benchmarks
from .inputs import Inputs, add_input_arguments, add_threat_arguments, build_surrogate, open_inputs, read_threat
from .outputs import data_facts, model_facts, own_positions, resumable_output, run_facts

__all__ = ['build_parser', 'run']

_DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
_NUM_DIAGNOSED = 100

_logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    """The parser of `timm-robust eval`."""
    parser = Parser(prog='timm-robust eval', description='Measure clean and robust accuracy of a timm model.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for these flags')
    group = parser.add_argument_group('Attack parameters')
    group.add_argument('--attacks', default='clean,fgsm,pgd20', metavar='NAMES',
                       help='comma-separated: clean; fgsm, fgsm-rs; with a number of steps bim, pgd, pgd-targeted, '
                            'mim, cw, cw-l2, apgd-ce, apgd-dlr, apgd-t, fab, fab-t, adaptive; with a number of queries '
                            'square, rays; autoattack, autoattack-plus, autoattack-rand (default: %(default)s)')
    add_threat_arguments(group)
    group.add_argument('--step-size', default=None, metavar='SIZE', help='attack step (default: 2.5 eps / steps)')
    group.add_argument('--restarts', type=int, default=1, metavar='N', help='random restarts (default: 1)')
    group.add_argument('--num-targets', type=int, default=None, metavar='N',
                       help='target classes of targeted attacks, by descending logit (default: 9)')
    group.add_argument('--worst-case', action='store_true',
                       help='run each attack only on images that withstood those before it (default: a table per '
                            'attack)')
    group.add_argument('--eps-sweep', default='', metavar='LIST',
                       help='also draw accuracy over these eps under the last attack, e.g. 0,2/255,4/255,8/255')
    group.add_argument('--sweep', default='', metavar='NAME',
                       help='gamma: also draw robust over clean accuracy, under the last attack, of a checkpoint '
                            'of --objective mbnat while gamma goes from 0 to 1')
    add_benchmark_arguments(parser)
    group = parser.add_argument_group('Evaluation parameters')
    group.add_argument('--exact', action='store_true',
                       help='search in plain float32 on the network as it is (default: on a copy with folded '
                            'normalization; what that finds counts only if it fools the network itself)')
    group.add_argument('--search-dtype', default='float32', metavar='DTYPE',
                       help='float32 or bfloat16, precision of the copy that gradient attacks search on; fab, square '
                            'and rays always search in float32 (default: float32)')
    group.add_argument('--allow-chance', action='store_true',
                       help='evaluate a network whose clean accuracy is that of guessing')
    group.add_argument('--diagnose', action=argparse.BooleanOptionalAction, default=None,
                       help='check whether the robustness is real (default: after AutoAttack)')
    group.add_argument('--save-images', type=int, default=8, metavar='N', nargs='?', const=8,
                       help='clean and adversarial images in the report (default: 8)')
    group.add_argument('--output', default='', metavar='DIR',
                       help='folder for results (default: ./output/eval/TIME-MODEL)')
    group.add_argument('--resume', action='store_true', help='go on with an evaluation that was cut off in --output')
    add_input_arguments(parser)
    return parser


def _read_sweep(args: argparse.Namespace, specs: List[AttackSpec]) -> Dict[float, AttackSpec]:
    """One attack for each eps of --eps-sweep, after the manner of the last attack."""
    attacks = [s for s in specs if s.is_attack]
    if not args.eps_sweep:
        return {}
    if not attacks:
        raise InputError(f'--eps-sweep {args.eps_sweep}: needs an attack in --attacks, for example pgd20')
    sweep = {}
    for text in filter(None, args.eps_sweep.split(',')):
        try:
            threat = make_threat(args.norm, text)
        except InputError as error:
            raise InputError(f'--eps-sweep {args.eps_sweep}: {error}') from error
        # a fixed step is made for one eps
        if threat.eps == 0:
            sweep[0.] = AttackSpec(Clean())
        elif getattr(attacks[-1].attack, 'step_size', None) is None:
            sweep[threat.eps] = AttackSpec(attacks[-1].attack, threat)
        else:
            sweep[threat.eps] = AttackSpec(replace(attacks[-1].attack, step_size=None), threat)
    return sweep


def _check_sweep(args: argparse.Namespace, specs: List[AttackSpec]) -> None:
    if args.sweep != 'gamma':
        raise InputError(f'--sweep {args.sweep}: unknown, choose gamma (--eps-sweep goes over eps)')
    if not any(s.is_attack for s in specs):
        raise InputError(f'--sweep {args.sweep}: needs an attack in --attacks, for example pgd20')


def _read_step_size(args: argparse.Namespace) -> Optional[float]:
    if args.step_size is None:
        return None
    try:
        step_size = parse_eps(args.step_size)
    except InputError as error:
        raise InputError(f'--step-size {args.step_size}: {error}') from error
    if not step_size > 0:
        raise InputError(f'--step-size {args.step_size}: must be positive, for example 2/255')
    return step_size


def _must_match(report: EvaluationReport, specs: Sequence[AttackSpec], inputs: Inputs) -> Dict[str, Any]:
    """What must be the same for outcomes to be of the same evaluation."""
    hidden = ('command', 'date', 'device', *(() if report.settings.batch_dependent else ('batch_size',)))
    settings = {k: v for k, v in to_mapping(report.settings).items() if k not in hidden}
    chosen = hashlib.sha256(json.dumps(inputs.indices).encode()).hexdigest()
    data = {k: getattr(report.data, k) for k in ('dataset', 'data_dir', 'split', 'subset', 'num_images')}
    return {**to_mapping(report.model), **data, **settings, 'num_examples': len(inputs.indices), 'images': chosen,
            'attacks': [s.describe() for s in specs]}


def run(argv: List[str]) -> None:
    """Evaluate."""
    parser = build_parser()
    args = parser.parse_args(apply_config(parser, argv))
    start_logging()
    if args.benchmarks:
        run_benchmarks(args, argv, build_parser())  # whose defaults no file has changed
        return
    if args.sweep == 'gamma' and args.gamma is None:
        args.gamma = 0.
    threat = read_threat(args)
    step_size = _read_step_size(args)
    check_at_least('restarts', args.restarts)
    check_choice('search_dtype', args.search_dtype, _DTYPES)
    if args.exact and args.search_dtype != 'float32':
        raise InputError(f'--search-dtype {args.search_dtype}: --exact searches in float32, leave one of them out')
    specs = plan_attacks(
        args.attacks, threat, step_size=step_size, restarts=args.restarts if args.restarts > 1 else None,
        num_targets=args.num_targets)
    sweep_specs = _read_sweep(args, specs)
    if args.sweep:
        _check_sweep(args, specs)
    args.device = resolve_device(args.device)
    device = init_distributed_device(args)
    try:
        _evaluate(args, argv, threat, specs, sweep_specs, device)
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def _evaluate(args, argv, threat, specs, sweep_specs, device) -> None:
    output = resumable_output(args, 'results.json')
    inputs = open_inputs(args, device)
    batch_dependent = has_batch_statistics(inputs.model)
    check_specs(specs, inputs.model.num_classes, batch_dependent, args.worst_case, bool(args.surrogate))
    surrogate = build_surrogate(args, inputs)
    of_surrogate = dict(
        surrogate=args.surrogate, surrogate_sha256=weights_sha256(surrogate.model)) if surrogate else {}
    report = EvaluationReport(
        model=model_facts(args, inputs.model, inputs.data_config),
        data=data_facts(args, num_images=len(inputs.dataset), mismatch=inputs.images.mismatch),
        threat=threat_facts(threat),
        settings=run_facts(
            args, 'eval', argv, batch_dependent=batch_dependent, worst_case=args.worst_case, exact=args.exact,
            fast_dtype=args.search_dtype, device=str(device), **of_surrogate))
    journal = Journal(output, _must_match(report, specs, inputs), args.resume, args.rank)
    if args.distributed:
        torch.distributed.barrier()  # none begins to write while another still looks whether there is something

    def searched():
        if args.exact or surrogate is not None:
            return None
        return make_fast_model(inputs.pixel_model, inputs.first(8)[0], _DTYPES[args.search_dtype])

    fast_model = searched()
    common = dict(device=device, seed=args.seed, batch_size=args.batch_size, surrogate=surrogate)
    own = own_positions(len(inputs.indices), args, batch_dependent)
    with journal:
        evaluate_attacks(
            inputs.pixel_model, inputs.loader(own), [inputs.indices[i] for i in own], specs, journal=journal,
            worst_case=args.worst_case, refuse_chance=not args.allow_chance, fast_model=fast_model,
            progress=None if is_primary(args) else False, **common)
    if args.distributed:
        journal.merge()
    if not is_primary(args):
        return
    evaluation = assemble(specs, journal, inputs.indices, args.worst_case)
    evaluation.batch_dependent, evaluation.surrogate = batch_dependent, args.surrogate
    report = replace(
        report,
        data=replace(report.data, indices=tuple(evaluation.indices), labels=tuple(evaluation.labels),
                     class_names=inputs.class_names),
        attacks=tuple(map(to_outcome, evaluation.results)))
    # what comes now may fail or take long, and must not cost the outcomes
    report.save(output)
    for path in output.glob('progress-*.jsonl'):
        path.unlink()
    print(f'\n{report}')
    if sweep_specs:
        _logger.info('Accuracy over eps ...')
        report = replace(report, eps_sweep=sweep_eps(
            inputs.pixel_model, inputs.loader, inputs.indices, sweep_specs, fast_model=fast_model, **common))
    if args.sweep:
        _logger.info('Accuracy over gamma ...')
        report = replace(report, gamma_sweep=sweep_mbnat_gamma(
            inputs.pixel_model, inputs.loader, inputs.indices, [s for s in specs if s.is_attack][-1], searched,
            **common))
    if args.save_images:
        x, _ = inputs.first(args.batch_size)
        report = replace(report, examples=example_images(
            inputs.pixel_model, x, evaluation, seed=args.seed, count=args.save_images, surrogate=surrogate,
            fast_model=fast_model))
    written = report.save(output)
    if args.diagnose or (args.diagnose is None and any(isinstance(s.attack, Ensemble) for s in specs)):
        _logger.info('Is the robustness real? Looking for signs that it is not ...')
        x, y = inputs.first(_NUM_DIAGNOSED)
        try:
            found = diagnose(
                inputs.pixel_model, x, y, threat, batch_size=args.batch_size, seed=args.seed, surrogate=surrogate,
                fast_model=fast_model)
            surface = loss_surface(inputs.pixel_model, x, y, threat, batch_size=args.batch_size, seed=args.seed)
        except InputError as error:
            _logger.warning(f'No diagnosis: {error}')
        else:
            report = replace(report, findings=tuple(found), surface=surface)
            written = report.save(output)
            print('\nIs the robustness real?\n\n' + findings_text(found))
    print('\nWritten: ' + ', '.join(map(str, written)))
