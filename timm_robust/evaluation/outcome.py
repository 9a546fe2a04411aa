"""What an evaluation found: image by image, attack by attack."""
from dataclasses import dataclass, field
from typing import List, Optional, Sequence, Tuple

from ..attacks import ThreatModel
from .facts import ThreatFacts
from .format2 import _effort, _settings
from .journal import Journal
from .report import AttackOutcome, percent
from .specs import AttackSpec

__all__ = ['AttackResult', 'Evaluation', 'assemble', 'keyed_steps', 'threat_facts', 'to_outcome']


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
    return ThreatFacts(str(threat).split()[0], threat.eps, str(threat).replace(' eps ', ' '))


def to_outcome(result: AttackResult) -> AttackOutcome:
    """The outcome of an attack as a report holds it."""
    threat, described = result.spec.threat, result.spec.describe()
    return AttackOutcome(
        result.spec.name, _settings(described), None if threat is None else threat_facts(threat), _effort(described),
        tuple(result.correct), result.attacked, round(result.seconds, 3))


def keyed_steps(spec: AttackSpec) -> List[Tuple[AttackSpec, str]]:
    """The attacks behind a name, each with the key of its outcomes."""
    return [(part, f'{spec.name}/{part.name}' if spec.parts else spec.name) for part in spec.steps]


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
