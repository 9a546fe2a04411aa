"""Join evaluations of parts of a data set."""
from dataclasses import replace
from typing import Any, Callable, Dict, Sequence

from ..errors import InputError
from ..settings import to_mapping
from .outcome import AttackOutcome
from .report import EvaluationReport

__all__ = ['join_reports']

_PER_PART = ('subset', 'indices', 'labels', 'sha256', 'command', 'date', 'randomized', 'suspicions')


def _shared(part: Any) -> Dict[str, Any]:
    return {k: v for k, v in to_mapping(part).items() if k not in _PER_PART}


def _attacks(report: EvaluationReport) -> Dict[str, Any]:
    return {a.name: [a.attack, to_mapping(a.threat) if a.threat else None] for a in report.attacks}


_COMPARED: Dict[str, Callable[[EvaluationReport], Dict[str, Any]]] = {
    'model': lambda report: _shared(report.model),
    'data': lambda report: _shared(report.data),
    'settings': lambda report: _shared(report.settings),
    'attacks': _attacks,
    'versions': lambda report: report.versions,
}


def _check(reports: Sequence[EvaluationReport]) -> None:
    if not reports:
        raise InputError('is empty', 'give at least one report', argument='reports')
    for name, facts in _COMPARED.items():
        first, *others = map(facts, reports)
        for other in others:
            different = [k for k in {**first, **other} if first.get(k) != other.get(k)]
            if different or list(first) != list(other):
                raise InputError(
                    f"differ in their {name} ({', '.join(different) or 'order'})", 'evaluate all parts the same way',
                    argument='reports')
    images = [i for report in reports for i in report.data.indices]
    if len({*images}) < len(images):
        raise InputError('have images in common', 'keep each image in one report only', argument='reports')
    if len(reports) == 1:
        return
    if reports[0].settings.batch_dependent:
        raise InputError('belong to a network whose predictions hold for their batches only', argument='reports')
    for report in reports:
        if report.eps_sweep or report.gamma_sweep or report.benchmarks:
            raise InputError('hold sweeps or benchmarks', 'measure these on all images', argument='reports')


def join_reports(reports: Sequence[EvaluationReport]) -> EvaluationReport:
    """Join reports on different images into one, in the given order.

    Noise is seeded by image index, so parts evaluated separately, for example on several machines, give the same
    outcomes as one evaluation of all images, up to rounding in different batches. Times are summed; subset, command,
    date and diagnosis are taken from the first part.

    Args:
        reports: Reports with the same weights, attacks, settings and versions; no image may occur twice.

    Raises:
        InputError: If they are not parts of one evaluation.
    """
    _check(reports)

    def joined(outcomes: Sequence[AttackOutcome]) -> AttackOutcome:
        return replace(
            outcomes[0], correct=tuple(c for o in outcomes for c in o.correct),
            distances=tuple(d for o in outcomes for d in o.distances),
            error_rates=tuple(rate for o in outcomes for rate in o.error_rates),
            attacked=sum(o.attacked for o in outcomes), seconds=round(sum(o.seconds for o in outcomes), 3))

    first, randomized = reports[0], {r.settings.randomized for r in reports}
    found = [r.settings.suspicions for r in reports]
    suspicions = None if None in found else tuple(dict.fromkeys(text for texts in found for text in texts or ()))
    return replace(
        first,
        settings=replace(
            first.settings, suspicions=suspicions,
            randomized=next(known for known in (True, None, False) if known in randomized)),
        data=replace(
            first.data, sha256=first.data.sha256 if len(reports) == 1 else '',
            indices=tuple(i for r in reports for i in r.data.indices),
            labels=tuple(label for r in reports for label in r.data.labels)),
        attacks=tuple(joined(outcomes) for outcomes in zip(*(r.attacks for r in reports))))
