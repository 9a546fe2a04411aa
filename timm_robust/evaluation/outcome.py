"""What an evaluation found: image by image, attack by attack."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

from ..attacks import Adaptive, Attack, Clean, Ensemble, ThreatModel, parse_attacks
from ..errors import InputError
from .facts import ThreatFacts
from .format2 import _effort, _settings
from .journal import Journal
from .report import AttackOutcome, percent

__all__ = [
    'AttackResult',
    'AttackSpec',
    'Evaluation',
    'assemble',
    'check_specs',
    'keyed_steps',
    'plan_attacks',
    'threat_facts',
    'to_outcome',
]

_MANY = 1000  # classes enough for every member of an ensemble


@dataclass(frozen=True)
class AttackSpec:
    """An attack of an evaluation and its threat model, None for clean images."""
    attack: Attack
    threat: Optional[ThreatModel] = None

    @property
    def name(self) -> str:
        """What the attack is called."""
        return str(self.attack)

    @property
    def is_attack(self) -> bool:
        """Whether anything is done to the images."""
        return self.threat is not None

    @property
    def steps(self) -> Tuple['AttackSpec', ...]:
        """The attacks to run, one after the other."""
        return tuple(AttackSpec(member, self.threat) for member in self.attack.members(_MANY))

    def __call__(self, model, x, y, seeds: List[int], *, whole_batch: bool = False, **how: Any) -> torch.Tensor:
        """Adversarial images; `how` is for attacks on single images."""
        if whole_batch:
            return self.attack.craft(model, x, y, self.threat, seed=seeds)
        return self.attack(model, x, y, self.threat, seed=seeds, **how)

    def describe(self) -> Dict[str, Any]:
        """Everything needed to repeat the attack, for JSON."""
        if self.threat is None:
            return {'name': self.name}
        common = {'name': self.name, 'norm': self.threat.norm, 'eps': self.threat.eps}
        if isinstance(self.attack, Ensemble):
            return {**common, 'parts': [part.describe() for part in self.steps]}
        settings = {k: v for k, v in self.attack.to_dict().items() if v is not None}
        return {**common, 'steps': 1, **settings} if self.attack.budget is None else {**common, **settings}


def plan_attacks(names: str, threat: ThreatModel, **settings: Any) -> List[AttackSpec]:
    """The attacks of an evaluation; arguments of `parse_attacks`.

    Raises:
        InputError: See `parse_attacks`; on an attack of another norm, and eps 0.
    """
    attacks = parse_attacks(names, **settings)
    for attack in attacks:
        if isinstance(attack, Clean):
            continue
        try:
            attack.check(threat)
        except InputError as error:
            raise error.about('attacks', str(attack)) from error
        if threat.eps == 0:
            raise InputError('leaves an attack nothing to do', 'name clean alone or give an eps above 0',
                             argument='eps', value=0)
    return [AttackSpec(attack, None if isinstance(attack, Clean) else threat) for attack in attacks]


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
            that normalizes by the batch on attacks that treat each image by itself, for others on attacks of whole
            batches, and on what a worst case or a surrogate does not go with.
    """
    if batch_dependent and worst_case:
        raise InputError(
            'is not defined for a network that normalizes by the batch, where an image withstands an attack only '
            'beside certain others', argument='worst_case')
    names = [s.name for s in specs]
    repeated = [n for n in names if names.count(n) > 1]
    if repeated:
        raise InputError(f'names {repeated[0]} more than once', argument='attacks', value=','.join(names))
    for spec in specs:
        attack, restarts = spec.attack, getattr(spec.attack, 'restarts', 1)
        if spec.threat is None:
            continue
        if surrogate and not attack.transfers:
            raise InputError(
                f'{spec.name} stops where the surrogate is fooled and transfers badly', 'choose fgsm, pgd, bim, mim or '
                'cw', argument='surrogate')
        if surrogate and restarts > 1:
            raise InputError(
                "choosing among runs takes the network's own answers", 'leave it out with `surrogate`',
                argument='restarts', value=restarts)
        try:
            attack.check(spec.threat, num_classes)
        except InputError as error:
            raise (error.about('attacks', spec.name) if error.argument == 'attack' else error) from error
        if not batch_dependent and not attack.image_by_image:
            raise InputError(
                f'{spec.name} moves whole batches, for a network that normalizes by them, which this one does not',
                'choose apgd-ce or autoattack', argument='attacks', value=','.join(names))
        if batch_dependent and (not attack.whole_batch or (restarts > 1 and not isinstance(attack, Adaptive))):
            raise InputError(
                f'{spec.name} treats each image by itself, which is not defined for a network that normalizes by the '
                'batch', 'choose adaptive, or `bn_mode=population`', argument='attacks', value=','.join(names))


@dataclass
class AttackResult:
    """Outcome of one attack.

    Attributes:
        spec: The attack and its settings.
        correct: Per image, in the order of the evaluation: classified correctly (clean and) after this attack; None
            where it was not run because an attack before it had succeeded.
        so_far: Per image: withstands this attack and all before it.
        attacked: Number of images it was run on.
        seconds: Time spent on it.
    """
    spec: AttackSpec
    correct: List[Optional[bool]] = field(default_factory=list)
    so_far: List[bool] = field(default_factory=list)
    attacked: int = 0
    seconds: float = 0.

    @property
    def accuracy(self) -> Optional[float]:
        """Percent of images classified correctly under this attack; None if it was run on what others left."""
        return None if None in self.correct else percent(self.correct)

    @property
    def worst_case_accuracy(self) -> float:
        """Percent of images that withstand this attack and all before it."""
        return percent(self.so_far)


@dataclass
class Evaluation:
    """Outcome of all attacks on the same images.

    Attributes:
        results: One per attack.
        labels: True label of each image.
        indices: Index of each image in the data set.
        batch_dependent: The network's prediction depends on the other images of the batch.
        surrogate: Name of the network the attacks were crafted on, if it is another.
    """
    results: List[AttackResult]
    labels: List[int] = field(default_factory=list)
    indices: List[int] = field(default_factory=list)
    batch_dependent: bool = False
    surrogate: str = ''

    @property
    def worst_case(self) -> List[bool]:
        """Per image: classified correctly whatever the attack."""
        return self.results[-1].so_far


def threat_facts(threat: ThreatModel) -> ThreatFacts:
    """A threat model as a report writes it down."""
    return ThreatFacts(threat.norm, threat.eps, str(threat))


def to_outcome(result: AttackResult) -> AttackOutcome:
    """The outcome of an attack as a report holds it."""
    threat, described = result.spec.threat, result.spec.describe()
    return AttackOutcome(
        result.spec.name, _settings(described), None if threat is None else threat_facts(threat), _effort(described),
        tuple(result.correct), result.attacked, round(result.seconds, 3))


def keyed_steps(spec: AttackSpec) -> List[Tuple[AttackSpec, str]]:
    """The attacks behind a name, each with the key of its outcomes."""
    ensemble = isinstance(spec.attack, Ensemble)
    return [(part, f'{spec.name}/{part.name}' if ensemble else spec.name) for part in spec.steps]


def assemble(
        specs: Sequence[AttackSpec],
        journal: Journal,
        indices: Sequence[int],
        worst_case: bool = False,
) -> Evaluation:
    """Put together from single outcomes what each attack left, for images in the order of `indices`."""
    clean = [journal.correct['clean'][i] for i in indices]
    standing = clean
    evaluation = Evaluation([], [journal.labels[i] for i in indices], list(indices))
    for spec in specs:
        keys = [key for _, key in keyed_steps(spec)]
        outcome: List[Optional[bool]] = []
        for i, right, stands in zip(indices, clean, standing):
            skipped = worst_case and right and not stands and spec.is_attack
            # the parts of an ensemble that come after one that fooled have no outcome
            outcome.append(None if skipped else right and all(journal.correct[key][i] for key in keys))
        standing = [stands and right is not False for stands, right in zip(standing, outcome)]
        attacked = len({i for key in keys for i in journal.correct[key]} & set(indices))
        seconds = sum(journal.seconds[key] for key in keys or ['clean'])
        evaluation.results.append(AttackResult(spec, outcome, standing, attacked, seconds))
    return evaluation
