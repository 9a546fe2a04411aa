"""Transfer matrix: accuracy of each network on adversarial images crafted on each of the networks."""
import hashlib
import logging
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from ..attacks import Attack, ThreatModel, attack_from_dict
from ..errors import InputError
from ..inputs import read_json, write_json
from ..settings import check_types, from_mapping, to_mapping
from .accuracy import Runner, _assert_allowed
from .facts import DataFacts, ModelFacts, RunFacts, ThreatFacts, versions
from .journal import Journal, image_hashes
from .outcome import percent, wilson_interval
from .plan import Plan, make_plan, threat_facts
from .sources import DataSource, Source, open_data
from .subject import Subject, eval_mode, open_model, open_surrogate

__all__ = ['TransferReport', 'transfer']

_logger = logging.getLogger(__name__)

TRANSFER = 'transfer.json'
_USUAL_EXAMPLES = 500

NetworkSource = Union[str, nn.Module]
Outcomes = Tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """Result of `timm_robust.transfer`.

    Attributes:
        names: Names of the networks.
        models: The networks, in the order of `names`.
        data: The images.
        threat: Threat model.
        attack: All settings of the attack.
        settings: How the attack was run.
        clean: By network and image, whether the clean image is classified correctly.
        correct: By source network, target network and image, whether both the clean and the adversarial image are
            classified correctly.
        versions: Versions of the software that the numbers depend on.
    """
    names: Tuple[str, ...]
    models: Tuple[ModelFacts, ...]
    data: DataFacts
    threat: ThreatFacts
    attack: Dict[str, object]
    settings: RunFacts
    clean: Tuple[Outcomes, ...]
    correct: Tuple[Tuple[Outcomes, ...], ...]
    versions: Dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        check_types(self)

    def outcomes(self, source: str, target: str) -> Outcomes:
        """By image, whether `target` withstands the image crafted on `source`."""
        return self.correct[self.names.index(source)][self.names.index(target)]

    def accuracy(self, source: str, target: str) -> float:
        """Accuracy of `target` on images crafted on `source`, in percent; white-box accuracy if both are the same."""
        return percent(self.outcomes(source, target))

    def interval(self, source: str, target: str) -> Tuple[float, float]:
        """Wilson's 95 % interval of `accuracy`."""
        found = self.outcomes(source, target)
        return wilson_interval(sum(found), len(found))

    def clean_accuracy(self, target: str) -> float:
        """Accuracy of a network on the clean images, in percent."""
        return percent(self.clean[self.names.index(target)])

    def save(self, folder: Union[str, Path]) -> List[Path]:
        """Write transfer.json and transfer.png."""
        from .render import plot_transfer
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TRANSFER, to_mapping(self))
        plot_transfer(self, folder / 'transfer.png')
        return [folder / TRANSFER, folder / 'transfer.png']

    @classmethod
    def load(cls, folder: Union[str, Path]) -> 'TransferReport':
        """The report that `save` wrote.

        Raises:
            InputError: If there is no report.
        """
        return from_mapping(cls, read_json(Path(folder) / TRANSFER))

    @property
    def title(self) -> str:
        """Attack, threat model and images, for display."""
        attack = attack_from_dict(self.attack)
        return f'{attack}, {self.threat}, {self.data.num_examples:,} images, seed {self.settings.seed}'

    def __str__(self) -> str:
        from .render import text_table
        rows = [('clean', *(f'{self.clean_accuracy(t):.2f}' for t in self.names))]
        rows += [(s, *(f'{self.accuracy(s, t):.2f}' for t in self.names)) for s in self.names]
        return f'{self.title}\n\n{text_table(rows, ("crafted on", *(f"{t} (%)" for t in self.names)))}'


def _named(models: Union[Sequence[NetworkSource], Mapping[str, NetworkSource]]) -> Dict[str, NetworkSource]:
    if isinstance(models, Mapping):
        found = dict(models)
    else:
        names = [m if isinstance(m, str) else f'{type(m).__name__} {i}' for i, m in enumerate(models, 1)]
        found = dict(zip(names, models))
        if len(found) < len(names):
            raise InputError('has duplicates', argument='models', value=names)
    if len(found) < 2:
        raise InputError('must be two networks or more', argument='models')
    return found


def _opened(models: Mapping[str, NetworkSource], device: Optional[str]) -> List[Subject]:
    """The networks; each must have the classes and input of the first."""
    subjects: List[Subject] = []
    for name, model in models.items():
        try:
            found = open_surrogate(model, subjects[0], '') if subjects else open_model(model, device=device)
        except InputError as error:
            raise (error.about('models', name) if error.argument in ('model', 'surrogate') else error) from error
        subjects += [found] if found is not None else []
    return subjects


def transfer(
        models: Union[Sequence[NetworkSource], Mapping[str, NetworkSource]],
        data: DataSource,
        labels: Any = None,
        *,
        attack: Union[str, Attack] = 'mim',
        threat: Union[str, ThreatModel] = 'Linf 8/255',
        seed: int = 0,
        device: Optional[str] = None,
        command: str = '',
        **images: Any,
) -> TransferReport:
    """Craft adversarial images on each network, the last iterates of an attack, and measure all networks on them.

    Args:
        models: Two or more networks of the same classes and input, each a name or a module as in `evaluate`.
        data: As in `evaluate`; by default 500 images of a folder or named data set.
        labels: Class indices (N,), if `data` is a tensor.
        attack: The attack, for example `MIM(steps=10, diversity=.5, kernel_size=5, copies=5)`.
        threat: Threat model.
        seed: Seed of the image subset and the noise.
        device: Device of the networks.
        command: Command line to record.
        **images: Fields of `ImagesConfig`.

    Raises:
        InputError: On networks with different classes or input, on attacks that stop once the network is fooled, and on
            whatever `evaluate` refuses.

    Examples:

        ```python
        report = transfer({'A': a, 'B': b}, (images, labels), attack=MIM(steps=10, diversity=.5))
        report.accuracy('A', 'B')
        ```
    """
    named = _named(models)
    try:
        plan = make_plan([attack], threat)
    except InputError as error:
        raise error.renamed({'attacks': 'attack'}) from error
    if not plan.real_attacks:
        raise InputError('changes no image', 'use mim', argument='attack', value=attack)
    with torch.inference_mode(False), eval_mode(*named.values()):
        subjects = _opened(named, device)
        given: Any = data if labels is None else (data, labels)
        source = open_data(given, subjects[0], seed=seed, usual_examples=_USUAL_EXAMPLES, **images)
        return _measure(tuple(named), subjects, source, plan, seed, command)


def _measure(
        names: Tuple[str, ...],
        subjects: Sequence[Subject],
        source: Source,
        plan: Plan,
        seed: int,
        command: str,
) -> TransferReport:
    attack, = plan.attacks
    resizing = {
        k: getattr(subjects[0].facts, k) for k in ('interpolation', 'crop_pct', 'crop_mode') if source.resizes}
    for name, subject in zip(names, subjects):
        if subject.preprocessing and any(getattr(subject.facts, k) != v for k, v in resizing.items()):
            _logger.warning(f'{name} gets images resized and cropped for {names[0]}, not for itself')
    runners = [
        Runner(s.model, plan, Journal(), num_classes=0, batch_size=source.batch_size, device=s.device, seed=seed,
               surrogate=s.model) for s in subjects]
    clean: List[List[bool]] = [[] for _ in names]
    correct: List[List[List[bool]]] = [[[] for _ in names] for _ in names]
    labels: List[int] = []
    hashes: List[str] = []
    for x, y in source.loader():
        x, y = x.to(runners[0].device), y.to(runners[0].device)
        indices = source.indices[len(labels):len(labels) + len(x)]
        logits = [runner.logits(x, y) for runner in runners]
        if not labels:
            _check_classes(names, runners, plan, [found.shape[1] for found in logits])
        labels += y.tolist()
        hashes += image_hashes(x, y)
        right = [found.argmax(1) == y for found in logits]
        for i, crafting in enumerate(runners):
            clean[i] += right[i].tolist()
            adv = crafting.craft(attack, x, y, indices)
            _assert_allowed(adv, x, plan.threat, str(attack), crafting.batch_size)
            for j, seeing in enumerate(runners):
                correct[i][j] += (right[j] & (seeing.logits(adv, y).argmax(1) == y)).tolist()
    return TransferReport(
        names=names,
        models=tuple(
            replace(s.facts, num_classes=r.num_classes, **(resizing if s.preprocessing else {}))
            for s, r in zip(subjects, runners)),
        data=replace(source.facts, indices=tuple(source.indices), labels=tuple(labels),
                     sha256=hashlib.sha256(' '.join(hashes).encode()).hexdigest()),
        threat=threat_facts(plan.threat),
        attack=attack.to_dict(),
        settings=RunFacts(
            seed=seed, batch_size=source.batch_size, batch_dependent=any(r.fixed_size for r in runners),
            exact=True, device=str(runners[0].device), command=command,
            date=datetime.now(timezone.utc).isoformat(timespec='seconds')),
        clean=tuple(map(tuple, clean)),
        correct=tuple(tuple(map(tuple, row)) for row in correct))


def _check_classes(names: Sequence[str], runners: Sequence[Runner], plan: Plan, counts: Sequence[int]) -> None:
    for name, runner, count in zip(names, runners, counts):
        if count != counts[0]:
            raise InputError(f'has {count} classes, but {names[0]} has {counts[0]}', argument='models', value=name)
        runner.num_classes = count
        try:
            plan.check(count, runner.batch_dependent, surrogate=True)
        except InputError as error:
            raise error.renamed({'attacks': 'attack', 'surrogate': 'attack'}) from error
