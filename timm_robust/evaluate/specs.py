"""Attacks by name: 'clean,fgsm,pgd20'."""
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional

import torch

from ..attacks import ATTACKS, ThreatModel, madry_step_size
from ..errors import InputError

__all__ = ['AttackSpec', 'parse_attacks']

_ALIASES = {'cw': 'cw_linf'}
_SINGLE_STEP = ('fgsm', 'fgsm_rs')
_DEFAULT_STEPS = 20
_NAME = re.compile(r'([a-z_]+?)(\d*)')


@dataclass(frozen=True)
class AttackSpec:
    """An attack with all its settings, or none ('clean').

    Args:
        name: What the user called it.
        function: Key of `ATTACKS`, or None for clean images.
        threat: Norm and eps, or None for clean images.
        settings: Arguments of the attack.
    """
    name: str
    function: Optional[str] = None
    threat: Optional[ThreatModel] = None
    settings: Dict[str, Any] = field(default_factory=dict)

    def __call__(
            self,
            model: Callable,
            x: torch.Tensor,
            y: torch.Tensor,
            seeds: List[int],
            keep: str = 'best',
    ) -> torch.Tensor:
        if self.function is None:
            return x
        return ATTACKS[self.function](model, x, y, self.threat, seed=seeds, keep=keep, **self.settings)

    def describe(self) -> Dict[str, Any]:
        """Everything needed to repeat the attack, for JSON."""
        if self.function is None:
            return {'name': self.name}
        return {
            'name': self.name,
            'function': self.function,
            'norm': self.threat.norm,
            'eps': self.threat.eps,
            **self.settings,
        }


def parse_attacks(
        names: str,
        threat: ThreatModel,
        step_size: Optional[float] = None,
        restarts: int = 1,
) -> List[AttackSpec]:
    """Read a comma-separated list such as 'clean,fgsm,pgd20'; a number is the number of steps, 20 by default.

    Args:
        names: 'clean' and keys of `ATTACKS` ('cw' is 'cw_linf').
        threat: Norm and eps of all attacks.
        step_size: Step in pixel units for attacks of several steps; 2.5 eps / steps by default, eps / steps for bim
            and mim.
        restarts: Random restarts for attacks that start at random.

    Raises:
        InputError: On an unknown name or a number of steps an attack does not take.
    """
    specs = []
    for name in filter(None, (n.strip().lower() for n in names.split(','))):
        match = _NAME.fullmatch(name)
        function = _ALIASES.get(match[1], match[1]) if match else name
        if function == 'clean' and not match[2]:
            specs.append(AttackSpec('clean'))
            continue
        if function not in ATTACKS:
            choices = ', '.join(['clean', *ATTACKS, *_ALIASES])
            raise InputError(f'--attacks {name}: unknown attack, choose from {choices}, with steps as in pgd20')
        if function in _SINGLE_STEP:
            if match[2]:
                raise InputError(f'--attacks {name}: {function} takes a single step, leave the number out')
            settings = {}
        else:
            steps = int(match[2] or _DEFAULT_STEPS)
            if steps < 1:
                raise InputError(f'--attacks {name}: the number of steps must be at least 1')
            by_default = threat.eps / steps if function in ('bim', 'mim') else madry_step_size(threat, steps)
            settings = {'steps': steps, 'step_size': step_size or by_default or None}
            if function in ('pgd', 'cw_linf', 'pgd_targeted'):
                settings['restarts'] = restarts
        specs.append(AttackSpec(name, function, threat, settings))
    if not specs:
        raise InputError(f'--attacks {names!r}: name at least one, for example clean,fgsm,pgd20')
    return specs
