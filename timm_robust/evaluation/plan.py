"""Which attacks an evaluation runs, and whether they are defined for its network."""
from dataclasses import dataclass, replace
from typing import Any, List, Sequence, Tuple, Union

from ..attacks import Adaptive, Attack, Clean, Ensemble, ThreatModel, parse_attacks, parse_threat
from ..errors import InputError
from .facts import ThreatFacts

__all__ = ['Plan', 'effort', 'make_plan', 'threat_facts']


def threat_facts(*threats: ThreatModel) -> ThreatFacts:
    """Any number of threat models, as a report records them."""
    return ThreatFacts(
        ', '.join(t.norm for t in threats), threats[0].eps if len(threats) == 1 else 0.,
        ', '.join(map(str, threats)) or 'no attack')


@dataclass(frozen=True)
class Plan:
    """Attacks of an evaluation.

    Attributes:
        attacks: In order; `Clean` means clean images.
        threat: Threat model of all of them.
        worst_case: Run each attack only on images that withstood all earlier attacks; otherwise each runs on all
            images classified correctly.
        prefix: Prefix of outcome keys.
    """
    attacks: Tuple[Attack, ...]
    threat: ThreatModel
    worst_case: bool = False
    prefix: str = ''

    @property
    def clean_key(self) -> str:
        """Key of the outcomes of clean images."""
        return f'{self.prefix}clean'

    @property
    def real_attacks(self) -> Tuple[Attack, ...]:
        """The attacks that change images."""
        return tuple(a for a in self.attacks if not isinstance(a, Clean))

    def members(self, attack: Attack, num_classes: int) -> List[Tuple[str, Attack]]:
        """The attacks to run one after the other, each with the key of its outcomes; none for clean images."""
        if not isinstance(attack, Ensemble):
            return [(f'{self.prefix}{m}', m) for m in attack.members(num_classes, self.threat)]
        # two ensembles with the same first members share these outcomes
        shared = [] if attack.first is None else self.members(attack.first, num_classes)
        own = attack.members(num_classes, self.threat)[len(shared):]
        return shared + [(f'{self.prefix}{attack}/{m}', m) for m in own]

    @property
    def passes(self) -> int:
        """Number of forward passes that decide whether an image is classified correctly."""
        return max(attack.passes for attack in self.attacks)

    def at(self, eps: float) -> 'Plan':
        """A plan of the last attack at another eps; a step size chosen for one eps is reset to the default."""
        last: Attack = Clean() if eps == 0 else self.real_attacks[-1]
        if getattr(last, 'step_size', None) is not None:
            last = replace(last, step_size=None)  # type: ignore[call-arg]
        return Plan((last,), replace(self.threat, eps=eps), prefix=f'eps {eps:g}/')

    def check(self, num_classes: int, batch_dependent: bool, surrogate: bool = False) -> None:
        """Refuse attacks that are not defined for a network.

        Args:
            num_classes: Classes of the network.
            batch_dependent: The network normalizes by the batch.
            surrogate: Attacks are crafted on another network.

        Raises:
            InputError: On too few classes, on more targets than wrong classes, and on attacks that do not work with the
                network's statistics, with `worst_case` or with a surrogate.
        """
        if batch_dependent and self.worst_case:
            raise InputError(
                'is not defined for a network that normalizes by the batch, since an image withstands an attack only '
                'within its batch', argument='worst_case')
        for attack in self.real_attacks:
            try:
                attack.check(self.threat, num_classes)
            except InputError as error:
                raise (error.about('attacks', str(attack)) if error.argument == 'attack' else error) from error
            _check_compatible(attack, batch_dependent, surrogate)


def _check_compatible(attack: Attack, batch_dependent: bool, surrogate: bool) -> None:
    restarts = getattr(attack, 'restarts', 1)

    def wrong(problem: str, remedy: str) -> InputError:
        return InputError(problem, remedy, argument='attacks', value=str(attack))

    if surrogate and not attack.transfers:
        raise wrong(
            'stops once the surrogate is fooled, so it transfers poorly', 'choose fgsm, pgd, bim, mim or cw with '
            '`surrogate`')
    if surrogate and restarts > 1:
        raise InputError(
            'restarts are compared on the network itself, not on a surrogate', 'remove it or `surrogate`',
            argument='restarts', value=restarts)
    if not batch_dependent and not attack.image_by_image:
        raise wrong(
            'attacks whole batches, which is only for networks that normalize by the batch',
            'choose apgd-ce or autoattack')
    if batch_dependent and (not attack.whole_batch or (restarts > 1 and not isinstance(attack, Adaptive))):
        raise wrong(
            'attacks each image separately, which is not defined for a network that normalizes by the batch',
            "choose adaptive, or `bn_mode='population'`")


def effort(attack: Attack) -> str:
    """The budget of an attack per image: '20', '20 x 5' with restarts, '5000 queries', '4 attacks'; '' for clean."""
    if isinstance(attack, Clean):
        return ''
    if isinstance(attack, Ensemble):
        return f'{len(attack.members())} attacks'
    number = 1 if attack.budget is None else getattr(attack, attack.budget)
    restarts = getattr(attack, 'restarts', 1)
    return f"{number}{' queries' if attack.counts_queries else ''}{f' x {restarts}' if restarts > 1 else ''}"


def make_plan(
        attacks: Union[str, Attack, Sequence[Union[str, Attack]]],
        threat: Union[str, ThreatModel],
        *,
        worst_case: bool = False,
        **settings: Any,
) -> Plan:
    """Parse attacks and threat model.

    Args:
        attacks: See `parse_attacks`.
        threat: See `parse_threat`.
        worst_case: See `Plan`.
        **settings: Settings for every chosen attack that has a field of that name.

    Raises:
        InputError: On unknown names, a name given twice, an attack for another norm, and eps 0.
    """
    plan = Plan(tuple(parse_attacks(attacks, **settings)), parse_threat(threat), worst_case)
    names = [str(attack) for attack in plan.attacks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f'names {twice} more than once', argument='attacks', value=','.join(names))
    for attack in plan.real_attacks:
        try:
            attack.check(plan.threat)
        except InputError as error:
            raise error.about('attacks', str(attack)) from error
        if plan.threat.eps == 0:
            raise InputError(
                'allows no perturbation', 'pass an eps above 0, or only the attack clean', argument='eps', value=0)
    return plan
