"""The result of an evaluation: the outcome of every image, and everything needed to reproduce it.

Accuracies are computed from the outcomes when they are used, with Wilson's 95 % interval.
"""
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from ..errors import InputError
from ..inputs import json_text, read_json, write_text
from ..settings import check_types, from_mapping, to_mapping
from .facts import DataFacts, Example, Finding, ModelFacts, RunFacts, ThreatFacts, versions
from .outcome import AttackOutcome, EpsPoint, GammaPoint, RobustAccuracy, percent, wilson_interval
from .shifts import BenchmarkResult
from .surface import LossSurface

if TYPE_CHECKING:
    import pandas

__all__ = ['RESULTS', 'EvaluationReport', 'read_reports']

FORMAT = 3
RESULTS = 'results.json'
_TOLERANCE = 1e-6  # between stored percentages and the stored outcomes


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluationReport:
    """Result of `timm_robust.evaluate`.

    `report['pgd20']` is the outcome of one attack. Two reports are equal if all fields except the example images are.

    Attributes:
        model: The network.
        data: The images.
        threat: Threat model of the attacks, or a summary of several.
        settings: How the attacks were run.
        attacks: Outcomes, in the order of the attacks.
        eps_sweep: Accuracy over eps under the last attack, ascending.
        gamma_sweep: Trade-off of a network with two BatchNorms under the last attack, ascending.
        benchmarks: Accuracy on corruptions and other shifts of distribution.
        findings: Findings of the diagnosis; empty without one.
        surface: The loss around clean images, if a diagnosis measured it.
        versions: Versions of the software that the numbers depend on.
        examples: Example images; not part of the JSON.

    Raises:
        InputError: On fields of a wrong type, a wrong number of outcomes or labels, and duplicate attack names.

    Examples:

        ```python
        report = evaluate(model, (images, labels), threat=Linf('8/255'), attacks='clean,autoattack')
        report.accuracy('autoattack'), report.interval('autoattack')
        report.save('out')
        assert report == EvaluationReport.load('out')
        ```
    """
    model: ModelFacts
    data: DataFacts
    threat: ThreatFacts
    settings: RunFacts
    attacks: Tuple[AttackOutcome, ...] = ()
    eps_sweep: Tuple[EpsPoint, ...] = ()
    gamma_sweep: Tuple[GammaPoint, ...] = ()
    benchmarks: Tuple[BenchmarkResult, ...] = ()
    findings: Tuple[Finding, ...] = ()
    surface: Optional[LossSurface] = None
    versions: Dict[str, str] = field(default_factory=versions)
    examples: Tuple[Example, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_types(self)
        names = [a.name for a in self.attacks]
        if len(set(names)) < len(names):
            raise InputError(f"names one attack twice ({', '.join(names)})", argument='attacks')
        for name, values in (('labels', self.data.labels), *((a.name, a.correct) for a in self.attacks)):
            if len(values) != self.data.num_examples:
                raise InputError(
                    f'{name} has {len(values)} entries for {self.data.num_examples} images', argument='attacks')

    def __getitem__(self, name: str) -> AttackOutcome:
        """The outcome of an attack, by its name; '-' and '_' are equivalent."""
        wanted = name.replace('_', '-').lower()
        for outcome in self.attacks:
            if outcome.name.replace('_', '-').lower() == wanted:
                return outcome
        raise KeyError(f"{name!r}: choose one of {', '.join(a.name for a in self.attacks)}")

    def __contains__(self, name: str) -> bool:
        try:
            return bool(self[name])
        except KeyError:
            return False

    def _withstood(self, attacks: Sequence[AttackOutcome]) -> Tuple[bool, ...]:
        return tuple(all(c is not False for c in image) for image in zip(*(a.correct for a in attacks)))

    def standing(self, name: str) -> Tuple[bool, ...]:
        """By image, whether it is classified correctly under an attack and all earlier ones with its threat model."""
        own = self[name]
        return self._withstood([*(a for a in self.attacks if a.is_clean), *self.earlier(own), own])

    @property
    def threats(self) -> Tuple[ThreatFacts, ...]:
        """The threat models that attacks were run under."""
        return tuple(dict.fromkeys(a.threat for a in self.attacks if a.threat is not None))

    def accuracy(self, name: str) -> float:
        """Percent of images classified correctly under an attack; cumulative if it ran only on the remaining images.

        Raises:
            KeyError: If there is no attack of that name.
        """
        found = self[name].accuracy
        return percent(self.standing(name)) if found is None else found

    def earlier(self, outcome: AttackOutcome) -> Tuple[AttackOutcome, ...]:
        """The attacks run before an attack under its threat model."""
        before = self.attacks[:self.attacks.index(outcome)]
        return tuple(a for a in before if a.threat == outcome.threat)

    def described(self, outcome: AttackOutcome) -> str:
        """An attack, the earlier ones if it ran only on images that survived them, and the network it was crafted on.

        For example 'pgd20 after fgsm', 'pgd20 (step_size 0.001)' and 'mim20 crafted on vgg11_cifar'.
        """
        text, surrogate = outcome.label, self.settings.surrogate
        if not outcome.complete:
            text += f" after {', '.join(a.attack_name for a in self.earlier(outcome))}"
        return text + (f' crafted on {surrogate}' if surrogate and not outcome.is_clean else '')

    def interval(self, name: str) -> Tuple[float, float]:
        """Wilson's 95 % interval of `accuracy`."""
        found = self[name].correct if self[name].complete else self.standing(name)
        return wilson_interval(sum(map(bool, found)), len(found))

    @property
    def worst_case(self) -> Tuple[bool, ...]:
        """By image, whether it is classified correctly under all attacks."""
        return self._withstood(self.attacks)

    @property
    def worst_case_accuracy(self) -> Optional[float]:
        """Percent of images classified correctly under all attacks; None if none was run."""
        return percent(self.worst_case) if self.attacks else None

    @property
    def clean_accuracy(self) -> Optional[float]:
        """Percent of clean images classified correctly; None if it was not measured."""
        return next((a.accuracy for a in self.attacks if a.is_clean), None)

    @property
    def real_attacks(self) -> Tuple[AttackOutcome, ...]:
        """Outcomes of attacks that change images."""
        return tuple(a for a in self.attacks if not a.is_clean)

    @property
    def robust_accuracy(self) -> Optional[RobustAccuracy]:
        """The robust accuracy to quote; None if no attack was run, or if attacks were crafted on another network.

        It is the accuracy under AutoAttack, cumulative if that ran only on the remaining images; without AutoAttack,
        the accuracy under `best`. Without either, or with several threat models, it is the worst case over all attacks.
        """
        if self.settings.surrogate:
            return None
        names = dict.fromkeys(a.attack_name for a in self.real_attacks)
        quoted = [self._quoted(i) for i, a in enumerate(self.real_attacks) if a.is_autoattack]
        if quoted and len(self.threats) == 1:
            return min(quoted, key=lambda q: q.accuracy)
        if self.best_known is not None:
            return self.best_known
        if not names:
            return None
        standing = self.worst_case
        return RobustAccuracy(percent(standing), wilson_interval(sum(standing), len(standing)), tuple(names))

    @property
    def best_known(self) -> Optional[RobustAccuracy]:
        """Accuracy under the ensemble `best`; None without `best`, or with several threat models.

        It is shown next to AutoAttack's accuracy, like `external` in RobustBench.
        """
        if len(self.threats) > 1 or self.settings.surrogate:
            return None
        return next((self._quoted(i) for i, a in enumerate(self.real_attacks) if a.is_best), None)

    def _quoted(self, place: int) -> RobustAccuracy:
        """The accuracy under a real attack; cumulative if it ran only on the remaining images."""
        names, outcome = [a.name for a in self.real_attacks], self.real_attacks[place]
        return RobustAccuracy(
            self.accuracy(outcome.name), self.interval(outcome.name),
            (outcome.name,) if outcome.complete else tuple(names[:place + 1]))

    def to_dict(self) -> Dict[str, Any]:
        """The content of results.json, including accuracies computed for other tools, and a hash of it."""
        content = {'format': FORMAT, **to_mapping(self)}
        del content['examples']
        for outcome, entry in zip(self.attacks, content['attacks']):
            entry.update(accuracy=outcome.accuracy, interval=outcome.interval,
                         worst_case_so_far=percent(self.standing(outcome.name)))
        content['worst_case_accuracy'] = self.worst_case_accuracy
        if self.best_known is not None:
            content['best_known_accuracy'] = self.best_known.accuracy
        return {**content, 'sha256': _digest(content)}

    def to_json(self) -> str:
        """JSON text that `from_json` reads back as an equal report."""
        return json_text(self.to_dict())

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> 'EvaluationReport':
        """A report from the content of results.json.

        Raises:
            InputError: On another format, fields of a wrong type, accuracies that do not match the outcomes, and edited
                content.
        """
        content = dict(content)
        intact = content.pop('sha256', None) == _digest(content)
        version = content.pop('format', None)
        if version != FORMAT:
            raise InputError(f'is not a result of an evaluation (format {version!r})', 'evaluate again')
        stored = [content.pop('worst_case_accuracy', None), content.pop('best_known_accuracy', None)]
        rows = []
        entries = content.get('attacks', ())
        if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
            raise InputError('is not a result of an evaluation (attacks)', 'evaluate again')
        for entry in map(dict, entries):
            stored += [entry.pop('accuracy', None), entry.pop('worst_case_so_far', None)]
            entry.pop('interval', None)
            rows.append(entry)
        report = from_mapping(cls, {**content, 'attacks': rows})
        found = [report.worst_case_accuracy, report.best_known.accuracy if report.best_known else None]
        for outcome in report.attacks:
            found += [outcome.accuracy, percent(report.standing(outcome.name))]
        for a, b in zip(stored, found):
            if a is not None and (b is None or not abs(a - b) < _TOLERANCE):
                raise InputError(f'says {a} % but its outcomes give {b} %: it was edited', 'evaluate again')
        if not intact:
            raise InputError('does not match its hash: it was edited', 'evaluate again')
        return report

    @classmethod
    def from_json(cls, text: str) -> 'EvaluationReport':
        """The report that `to_json` wrote.

        Raises:
            InputError: If the text is not JSON or not a report; see `from_dict`.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError(f'is not JSON ({error})') from error
        if not isinstance(content, dict):
            raise InputError('is not a result of an evaluation')
        return cls.from_dict(content)

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'EvaluationReport':
        """The report in a folder that `save` wrote, or in a results.json.

        Raises:
            InputError: If there is no report; see `from_dict`.
        """
        path = Path(path)
        path = path / RESULTS if path.is_dir() else path
        try:
            return cls.from_dict(read_json(path))
        except InputError as error:
            raise _unreadable(path, error) from error

    def save(self, folder: Union[str, Path]) -> List[Path]:
        """Write results.json, report.html, report.md and figures, each file atomically.

        Returns:
            The files written.
        """
        from .render import write_report
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RESULTS, self.to_json())
        return [folder / RESULTS, *write_report(self, folder)]

    def to_pandas(self) -> 'pandas.DataFrame':
        """Outcomes as a table, a row for each image with its label and a column for each attack; needs pandas."""
        import pandas
        columns = {a.name: pandas.array(a.correct, dtype='boolean') for a in self.attacks}
        return pandas.DataFrame(
            {'label': list(self.data.labels), **columns}, index=pandas.Index(self.data.indices, name='image'))

    def __str__(self) -> str:
        from .render import text_report
        return text_report(self)

    def __repr__(self) -> str:
        found = ', '.join(f'{a.name} {self.accuracy(a.name):.2f} %' for a in self.attacks)
        return f'<EvaluationReport of {self.model.name}: {found or "no attack"}, {self.data.num_examples:,} images>'

    def _repr_html_(self) -> str:
        from .render import html_table
        return html_table(self)


def _digest(content: Mapping[str, Any]) -> str:
    """Hash of the content of a results.json."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_reports(path: Union[str, Path]) -> List[Tuple[str, EvaluationReport]]:
    """Read the evaluations in a results.json, each with the name of its data, '' if the file gives none.

    Args:
        path: A results.json of `EvaluationReport.save`, or of a model card, which holds several evaluations.

    Raises:
        InputError: If the file is neither of these.
    """
    path = Path(path)
    content = read_json(path)
    if 'evaluations' not in content:
        return [('', EvaluationReport.load(path))]
    try:
        return [
            (str(name), EvaluationReport.from_dict(found))
            for name, found in zip(content['data_names'], content['evaluations'], strict=True)]
    except InputError as error:
        raise _unreadable(path, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            'holds no evaluations with data names', argument='path', value=str(path)) from error


def accuracy_on_all_images(data: str, evaluations: Sequence[Tuple[str, EvaluationReport]]) -> Optional[float]:
    """Clean accuracy on all images of a data set, None if no evaluation took all.

    Args:
        data: Name of the data.
        evaluations: From `read_reports`.
    """
    return next((report.clean_accuracy for name, report in evaluations
                 if name == data and report.data.num_examples == report.data.num_images), None)


def _unreadable(path: Path, error: InputError) -> InputError:
    inner = error.explanation if error.argument == 'path' else str(error)
    return InputError(inner, argument='path', value=str(path))
