"""Settings of an evaluation, shared by the command line, YAML files and Python."""
from dataclasses import dataclass, field, fields, replace
from typing import Any, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn

from ..attacks import Attack, ThreatModel, attack_names, make_threat, norm_names, parse_eps, parse_threats
from ..data.corruptions import SEVERITIES
from ..errors import InputError, check_at_least, check_choice
from ..inputs import check_seed
from ..settings import check_types, default_of, setting
from .plan import Plan, make_plan

__all__ = ['DTYPES', 'EvalConfig', 'ThreatConfig']

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
_DEFAULT_ATTACKS = 'clean,fgsm,pgd20'
_ATTACK_SETTINGS = (
    'threat', 'worst_case', 'exact', 'fast_dtype', 'eps_sweep', 'gamma_sweep', 'surrogate', 'surrogate_checkpoint',
    'diagnose', 'attack_settings')
_BENCHMARK_SETTINGS = ('corruptions', 'severities')


@dataclass(frozen=True, kw_only=True)
class ThreatConfig:
    """A threat model as two settings."""
    norm: str = setting(
        'Linf', lambda: f'norm of the perturbation: {norm_names()}', metavar='NORM', group='Threat model')
    eps: Union[str, float, None] = setting(
        None, 'perturbation size in pixel units on [0, 1] (default: 8/255 for Linf, none for other norms)',
        metavar='EPS')

    def __post_init__(self) -> None:
        check_types(self)
        make_threat(self.norm, self.eps)

    @property
    def threat(self) -> ThreatModel:
        """The threat model."""
        return make_threat(self.norm, self.eps)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How to evaluate; the network and the images have separate settings.

    Attributes:
        threat: Threat model of the attacks, as an object or as text ('Linf 8/255'); several in a tuple, or in text
            with commas.
        attack_settings: Settings for every chosen attack that has a field of that name.
        progress: Show a progress bar; by default only on a terminal. Without a terminal, a log line is written for each
            pool of images.
        command: Command line to record in the report.

    Raises:
        InputError: On values of a wrong type or out of range, and on settings that would have no effect.
    """
    attacks: Union[str, Attack, Tuple[Any, ...], None] = setting(
        None, lambda: 'comma-separated: clean, and attacks with a number of steps or queries (default: '
        f'{_DEFAULT_ATTACKS}; none with benchmarks). Attacks: {attack_names()}',
        metavar='NAMES', group='Evaluation parameters')
    threat: Union[str, ThreatModel, Tuple[Any, ...]] = setting(
        'Linf 8/255', "one or several threat models, instead of norm and eps, e.g. 'Linf 8/255, L2 0.5, L1 12'; every "
        'attack runs under each of them', metavar='TEXT')
    attack_settings: Dict[str, Any] = field(default_factory=dict)
    worst_case: bool = setting(
        False, 'run each attack only on images that withstood all earlier attacks (default: on all correctly '
        'classified images)')
    eps_sweep: Union[str, Tuple[Any, ...]] = setting(
        '', 'also measure accuracy over these eps under the last attack, e.g. 0,2/255,4/255,8/255', metavar='LIST')
    gamma_sweep: bool = setting(
        False, 'also measure the trade-off of a checkpoint with two BatchNorms (objective mbnat) under the last '
        'attack, for gamma from 0 to 1')
    surrogate: Union[str, nn.Module] = setting(
        '', 'another network with the same classes to craft attacks on (a timm model or the folder of an export)',
        metavar='MODEL')
    surrogate_checkpoint: str = setting('', 'weights of the surrogate', metavar='PATH')
    exact: bool = setting(
        False, 'attack the network itself in plain float32 (default: a faster copy with folded normalization; every '
        'result is verified on the original)')
    fast_dtype: str = setting(
        'float32', 'precision of the faster copy, float32 or bfloat16; fab, square, rays, fmn and ddn always use '
        'float32',
        metavar='DTYPE')
    seed: int = setting(0, 'random seed for the image subset and the noise', metavar='S')
    allow_chance: bool = setting(False, 'evaluate a network even if its clean accuracy is no better than chance')
    diagnose: Optional[bool] = setting(None, 'check whether the robustness is real (default: after AutoAttack)')
    save_images: int = setting(8, 'number of clean and adversarial images in the report', metavar='N')
    benchmarks: Union[str, Tuple[str, ...]] = setting(
        '', 'comma-separated: clean and corruptions (computed on the fly) of the data set; c, 3dcc, r, a, sketch, '
        'stylized, v2 (ImageNet), cifar10-c, cifar100-c, cifar10.1, each as NAME=FOLDER, or NAME for its usual folder '
        'in data-dir',
        metavar='NAMES', group='Benchmark parameters')
    corruptions: Optional[Tuple[str, ...]] = setting(
        None, 'names of the corruptions in c, cifar10-c, cifar100-c, corruptions and 3dcc, or all to include the four '
        'validation corruptions (default: the 15 common ones, and the 12 of 3dcc)', metavar='NAME')
    severities: Tuple[int, ...] = setting(SEVERITIES, 'severities of corruptions', metavar='S')
    output: str = setting('', 'folder for results', metavar='DIR', group='Output parameters')
    resume: bool = setting(False, 'continue an interrupted evaluation in the output folder')
    progress: Optional[bool] = None
    command: str = ''

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        check_choice('fast_dtype', self.fast_dtype, DTYPES)
        check_at_least('save_images', self.save_images, 0)
        if self.exact and self.fast_dtype != 'float32':
            raise InputError(
                'with `exact=True` attacks run in float32', 'remove one of the two', argument='fast_dtype',
                value=self.fast_dtype)
        if self.resume and not self.output:
            raise InputError('needs the folder of the interrupted evaluation', 'pass `output`', argument='resume')
        if not self.plan:
            self._refuse_unused(_ATTACK_SETTINGS, 'with `benchmarks` and no attack', 'pass `attacks` too')
        if not self.benchmarks:
            self._refuse_unused(_BENCHMARK_SETTINGS, 'without `benchmarks`', 'pass some')
        for name in ('eps_sweep', 'gamma_sweep'):
            if getattr(self, name) and not (self.plan and self.plan.real_attacks):
                raise InputError('needs an attack in `attacks`, for example pgd20', argument=name,
                                 value=getattr(self, name))
            if getattr(self, name) and len(self.plans) > 1:
                raise InputError('needs a single threat model', 'pass one as `threat`', argument=name,
                                 value=getattr(self, name))
        for plan in self.plans[1:]:
            for size in (getattr(a, 'step_size', None) for a in plan.attacks):
                if size:
                    raise InputError('needs a single threat model, whose eps it fits', 'leave it out',
                                     argument='step_size', value=size)
        self.swept_plans()

    def _refuse_unused(self, names: Tuple[str, ...], when: str, remedy: str) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if own.name == 'threat':
                value = ', '.join(map(str, parse_threats(value)))
            if own.name in names and value != default_of(own):
                raise InputError(
                    f'has no effect {when}', f'remove it, or {remedy}', argument=own.name, value=value)

    @property
    def plans(self) -> Tuple[Plan, ...]:
        """The attacks under each threat model, with clean images only in the first; none for benchmarks only."""
        attacks = self.attacks
        if attacks is None:
            if self.benchmarks:
                return ()
            attacks = _DEFAULT_ATTACKS
        threats = parse_threats(self.threat)
        made = [make_plan(attacks, t, worst_case=self.worst_case, **self.attack_settings) for t in threats]
        if len(made) == 1:
            return tuple(made)
        return tuple(replace(
            plan, prefix=f'{plan.threat}/', attacks=plan.real_attacks if k else plan.attacks)
            for k, plan in enumerate(made) if not k or plan.real_attacks)

    @property
    def plan(self) -> Optional[Plan]:
        """The attacks under the first threat model; None for benchmarks only."""
        return next(iter(self.plans), None)

    def swept_plans(self) -> Dict[float, Plan]:
        """The plan for each eps of the sweep, ascending."""
        values = self.eps_sweep.split(',') if isinstance(self.eps_sweep, str) else self.eps_sweep
        plans: Dict[float, Plan] = {}
        for value in values:
            if isinstance(value, str) and not value.strip():
                continue
            try:
                plan = self.plan.at(parse_eps(value)) if self.plan else None
            except InputError as error:
                raise error.about('eps_sweep', self.eps_sweep) from error
            if plan and any(p.prefix == plan.prefix for p in plans.values()):
                raise InputError(f'names {plan.threat.eps:g} twice', argument='eps_sweep', value=self.eps_sweep)
            if plan:
                plans[plan.threat.eps] = plan
        return dict(sorted(plans.items()))
