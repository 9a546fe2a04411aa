"""Attacks by name: 'clean,pgd20,apgd-ce,autoattack'."""
import inspect
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from ..attacks import ATTACKS, AUTOATTACK_VERSIONS, ThreatModel, apgd_ce, madry_step_size, pgd, run_search
from ..attacks.autoattack import CLASSES_NEEDED, autoattack_parts
from ..errors import InputError

__all__ = ['AttackSpec', 'check_specs', 'parse_attacks']

_ALIASES = {'cw': 'cw_linf', 'mia': 'mim', 'apgd': 'apgd_ce', 'adaptive': 'adaptive_batch'}
_AUTOATTACKS = {'autoattack': 'standard', 'aa': 'standard', **{f'autoattack_{v}': v for v in AUTOATTACK_VERSIONS}}
_DEFAULT_STEPS = {'bim': 20, 'pgd': 20, 'pgd_targeted': 20, 'mim': 20, 'cw_linf': 20}
_RECORDED = ('steps', 'restarts', 'query_limit', 'rescale_schedule', 'rho', 'eot_iter')
_BUDGET = {'square': 'query_limit', 'rays': 'query_limit'}
_ONE_STEP = ('fgsm', 'fgsm_rs')
_ONE_NORM = {'rays': 'linf', 'cw_l2': 'l2'}
_TARGETED = ('pgd_targeted', 'apgd_t', 'fab_t')


_PASSES_TO = {**dict.fromkeys(('fgsm', 'fgsm_rs', 'bim', 'mim', 'cw_linf'), pgd),
              **dict.fromkeys(('apgd_dlr', 'apgd_t'), apgd_ce)}


def _parameters(function: str) -> Dict[str, inspect.Parameter]:
    """An attack's arguments by name, those it passes on included."""
    own = dict(inspect.signature(ATTACKS[function]).parameters)
    if 'kwargs' not in own:
        return own
    return {**inspect.signature(_PASSES_TO.get(function, run_search)).parameters, **own}


@dataclass(frozen=True)
class AttackSpec:
    """An attack with all its settings, or several in a row of which each takes what the others left, or none ('clean').

    Args:
        name: What the user called it.
        function: Key of `ATTACKS`, or None for clean images and for several attacks.
        threat: Norm and eps, or None for clean images.
        settings: Arguments of the attack.
        parts: The attacks of an ensemble.
    """
    name: str
    function: Optional[str] = None
    threat: Optional[ThreatModel] = None
    settings: Dict[str, Any] = field(default_factory=dict)
    parts: Tuple['AttackSpec', ...] = ()

    @property
    def is_attack(self) -> bool:
        """Whether anything is done to the images."""
        return self.threat is not None

    @property
    def steps(self) -> Tuple['AttackSpec', ...]:
        """The attacks to run, one after the other."""
        return self.parts or ((self,) if self.function else ())

    def takes(self, argument: str) -> bool:
        """Whether the attack has an argument of this name."""
        return self.function is not None and argument in _parameters(self.function)

    def __call__(self, model: Callable, x: torch.Tensor, y: torch.Tensor, seeds: List[int], **how: Any) -> torch.Tensor:
        """Attack; of `how` (batch_size, search_model, progress, keep) the attack gets what it takes."""
        how = {k: v for k, v in how.items() if self.takes(k)}
        return ATTACKS[self.function](model, x, y, self.threat, seed=seeds, **{**self.settings, **how})

    def describe(self) -> Dict[str, Any]:
        """Everything needed to repeat the attack, for JSON."""
        if not self.is_attack:
            return {'name': self.name}
        common = {'name': self.name, 'norm': self.threat.norm, 'eps': self.threat.eps}
        if self.parts:
            return {**common, 'parts': [part.describe() for part in self.parts]}
        defaults = {
            k: p.default for k, p in _parameters(self.function).items()
            if k in _RECORDED and p.default is not p.empty}
        if self.function in _ONE_STEP:
            defaults['steps'] = 1
        return {**common, 'function': self.function, **defaults, **self.settings}


def _split(name: str) -> Tuple[str, str]:
    """Attack and number of 'pgd20'; the longest name that fits, for 'cw_l2' ends in a digit of its own."""
    known = {**{k: k for k in ATTACKS}, **_ALIASES, **_AUTOATTACKS}
    fits = [k for k in known if name.startswith(k) and (name[len(k):] == '' or name[len(k):].isdigit())]
    longest = max(fits, key=len, default='')
    return known.get(longest, ''), name[len(longest):]


def _single(name: str, threat: ThreatModel, step_size, restarts: int, num_targets: Optional[int]) -> AttackSpec:
    function, number = _split(name.replace('-', '_'))
    takes = _parameters(function)
    settings: Dict[str, Any] = {}
    if _ONE_NORM.get(function, threat.norm) != threat.norm:
        raise InputError(f'--attacks {name}: is for --norm {_ONE_NORM[function]} alone, not --norm {threat.norm}')
    if number and int(number) < 1:
        raise InputError(f'--attacks {name}: the number of {_BUDGET.get(function, "steps")} must be at least 1')
    if function in _BUDGET:
        if number:
            settings[_BUDGET[function]] = int(number)
    elif 'steps' in takes and function not in _ONE_STEP:
        if number or function in _DEFAULT_STEPS:
            settings['steps'] = int(number or _DEFAULT_STEPS[function])
    elif number:
        raise InputError(f'--attacks {name}: {function} takes a single step, leave the number out')
    if function in _DEFAULT_STEPS:
        steps = settings['steps']
        by_default = threat.eps / steps if function in ('bim', 'mim') else madry_step_size(threat, steps)
        settings['step_size'] = step_size or by_default or None
    if restarts > 1 and 'restarts' in takes and function not in ('rays', 'cw_l2', 'fgsm', 'fgsm_rs', 'bim', 'mim'):
        settings['restarts'] = restarts
    if num_targets is not None and function in _TARGETED:
        settings['num_targets'] = num_targets
    return AttackSpec(name, function, threat, settings)


def parse_attacks(
        names: str,
        threat: ThreatModel,
        step_size: Optional[float] = None,
        restarts: int = 1,
        num_targets: Optional[int] = None,
) -> List[AttackSpec]:
    """Read a comma-separated list such as 'clean,fgsm,pgd20,apgd-ce,square1000,autoattack'.

    A number is the number of steps, or of queries for square and rays; without one it is 20 for PGD and its like and
    the publication's for the others. 'autoattack' is the standard version; 'autoattack-plus', 'autoattack-rand' are
    the others.

    Args:
        names: 'clean', keys of `ATTACKS` ('cw' is 'cw_linf'; hyphens may stand for underscores) and AutoAttacks.
        threat: Norm and eps of all attacks.
        step_size: Step in pixel units for pgd, bim, mim and cw; 2.5 eps / steps by default, eps / steps for bim, mim.
        restarts: Random restarts for attacks that start at random.
        num_targets: Number of target classes of targeted attacks.

    Raises:
        InputError: On an unknown name, a number an attack does not take, an attack of another norm, eps 0 and targets
            for attacks that have none.
    """
    specs: List[AttackSpec] = []
    for name in filter(None, (n.strip().lower() for n in names.split(','))):
        function, number = _split(name.replace('-', '_'))
        if name == 'clean':
            specs.append(AttackSpec('clean'))
        elif function in AUTOATTACK_VERSIONS and not number:
            # the number of classes is checked once the model is there
            parts = tuple(
                AttackSpec(part, part, threat, {
                    **settings, **({'num_targets': num_targets} if num_targets and part in _TARGETED else {})})
                for part, settings in autoattack_parts(function, 10))
            specs.append(AttackSpec(name, None, threat, {}, parts))
        elif function in ATTACKS:
            specs.append(_single(name, threat, step_size, restarts, num_targets))
        else:
            choices = ', '.join(['clean', *ATTACKS, *_ALIASES, *_AUTOATTACKS]).replace('_', '-')
            raise InputError(f'--attacks {name}: unknown attack, choose from {choices}, with steps as in pgd20')
    if not specs:
        raise InputError(f'--attacks {names!r}: name at least one, for example clean,fgsm,pgd20')
    if threat.eps == 0 and any(s.is_attack for s in specs):
        raise InputError('--eps 0: leaves an attack nothing to do, name clean alone or give an eps above 0')
    targeted = any(part.function in _TARGETED for s in specs for part in s.steps)
    if num_targets is not None and not targeted:
        plain = next((s.name for s in specs if s.is_attack), 'clean')
        reason = 'RayS is an untargeted Linf attack' if plain.startswith('rays') else f'{plain} has no target classes'
        raise InputError(f"--num-targets {num_targets}: {reason}; {', '.join(_TARGETED).replace('_', '-')} do")
    return specs


def check_specs(
        specs: Sequence[AttackSpec],
        num_classes: int,
        batch_dependent: bool,
        worst_case: bool = False,
        surrogate: bool = False,
) -> None:
    """Whether the attacks are defined for a network and an evaluation.

    Raises:
        InputError: On a name given twice, more targets than wrong classes and too few classes for a loss; for a network
            that normalizes by the batch on attacks that treat each image by itself, for others on `adaptive`, and on
            what a worst case or a surrogate does not go with.
    """
    if batch_dependent and worst_case:
        raise InputError(
            '--worst-case: is not defined for a network that normalizes by the batch, where an image withstands an '
            'attack only beside certain others')
    names = [s.name for s in specs]
    repeated = [n for n in names if names.count(n) > 1]
    if repeated:
        raise InputError(f"--attacks {','.join(names)}: names {repeated[0]} more than once")
    for spec in specs:
        if surrogate and not all(part.takes('keep') for part in spec.steps):
            raise InputError(
                f'--surrogate: {spec.name} stops where the surrogate is fooled and transfers badly, choose fgsm, pgd, '
                'bim, mim or cw')
        if surrogate and spec.settings.get('restarts', 1) > 1:
            raise InputError(
                f"--restarts {spec.settings['restarts']}: choosing among runs takes the network's own answers, leave "
                'it out with --surrogate')
        if spec.parts:
            version = _AUTOATTACKS[spec.name.replace('-', '_')]
            try:
                autoattack_parts(version, num_classes)
            except InputError as error:
                raise InputError(f'--attacks {spec.name}: {error}') from error
        for part in spec.steps:
            asked = part.settings.get('num_targets')
            if asked is not None and not 1 <= asked < num_classes:
                raise InputError(
                    f'--num-targets {asked}: must be between 1 and {num_classes - 1}, the number of wrong classes')
            needed = CLASSES_NEEDED.get(part.function, 2)
            if num_classes < needed:
                raise InputError(f'--attacks {spec.name}: needs at least {needed} classes, the model has {num_classes}')
            if part.function == 'adaptive_batch' and not batch_dependent:
                raise InputError(
                    f'--attacks {spec.name}: moves whole batches of a network that normalizes by them, which this one '
                    'does not: choose apgd-ce or autoattack')
            if batch_dependent and (not part.takes('norm_mode') or (
                    part.settings.get('restarts', 1) > 1 and part.function != 'adaptive_batch')):
                raise InputError(
                    f'--attacks {spec.name}: treats each image by itself, which is not defined for a network that '
                    'normalizes by the batch: choose adaptive, or --bn-mode population')
