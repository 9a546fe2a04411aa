"""Several networks side by side, from the reports of their evaluations (NoFrost, figures 3 and 4).

NoFrost - https://arxiv.org/abs/2207.01156
"""
from pathlib import Path
from typing import Dict, Hashable, Mapping, NamedTuple, Sequence, Tuple

from ..errors import InputError
from .outcome import percent
from .report import EvaluationReport

__all__ = ['collect']


class _Row(NamedTuple):
    """An accuracy.

    Attributes:
        accuracy: In percent.
        measured_on: What must be equal to compare it: number of images and seed first.
        name: Its name in the table.
    """
    accuracy: float
    measured_on: Tuple[Hashable, ...]
    name: str


_PREPROCESSING = ('input_size', 'interpolation', 'crop_pct', 'crop_mode')


def _benchmarks(report: EvaluationReport) -> Dict[str, _Row]:
    data, seed = report.data, report.settings.seed
    found: Dict[str, _Row] = {}
    for b in report.benchmarks:
        place = (data.dataset, data.split) if b.name in ('clean', 'corruptions') else ()
        parts = tuple((p.corruption, p.severity) for p in b.parts) if b.errors else ()
        found[b.name] = _Row(b.accuracy, (b.num_images, seed, 'balanced', b.available, *place, *parts), b.name)
    return found


def _sample(report: EvaluationReport) -> Tuple[Hashable, ...]:
    data = report.data
    return (data.num_examples, report.settings.seed, data.subset, data.num_images, data.dataset, data.split)


def _images(report: EvaluationReport) -> Dict[Hashable, Hashable]:
    """What must be equal for equal keys: the chosen images of a sample, and if seen the same way, their pixels."""
    data, sample = report.data, _sample(report)
    as_seen = tuple(getattr(report.model, name) for name in _PREPROCESSING)
    found = {sample: (data.indices, data.labels), (sample, as_seen): data.sha256}
    return {key: value for key, value in found.items() if data.indices and value}


def _attacks(report: EvaluationReport) -> Dict[str, _Row]:
    sample = _sample(report)
    found: Dict[str, _Row] = {}
    for outcome in report.attacks:
        if outcome.is_clean:
            found[outcome.name] = _Row(report.accuracy(outcome.name), sample, outcome.name)
        else:
            before = () if outcome.complete else report.earlier(outcome)
            settings = [repr(sorted(a.attack.items())) for a in (*before, outcome)]
            found[f'{outcome.attack_name} {outcome.threat}'] = _Row(
                report.accuracy(outcome.name), (*sample, *settings, report.settings.surrogate_sha256),
                f'{report.described(outcome)} {outcome.threat}')
    if len(report.threats) > 1:
        names = tuple((a.attack_name, repr(sorted(a.attack.items()))) for a in report.real_attacks)
        worst = f'worst case of {report.threat}'
        found[worst] = _Row(percent(report.worst_case), (*sample, *names), worst)
    return found


def collect(folders: Mapping[str, Sequence[Path]]) -> Dict[str, Dict[str, float]]:
    """Accuracy in percent by network and by benchmark or attack, for those that all networks were evaluated with.

    Names of attacks include the threat model; all names include the number of images and the seed.

    Args:
        folders: Folders of the reports of each network, by its name.

    Raises:
        InputError: If a folder holds no report, an accuracy of a network occurs twice, networks were evaluated on
            different images or with different seeds, or they have nothing in common.
    """
    found: Dict[str, Dict[str, _Row]] = {}
    images: Dict[Hashable, Hashable] = {}
    for name, own in folders.items():
        found[name], weights = {}, set()
        for folder in own:
            try:
                report = EvaluationReport.load(folder)
            except InputError as error:
                raise InputError(f'{name}={folder}: {error.explanation}') from error
            weights.add(report.model.weights_sha256)
            if any(images.setdefault(key, value) != value for key, value in _images(report).items()):
                raise InputError(
                    f'{name}={folder}: was measured on other images than a previous folder', 'use the same data')
            if len(weights) > 1:
                raise InputError(f'{name}={folder}: holds results for other weights than the previous folder')
            for key, value in {**_benchmarks(report), **_attacks(report)}.items():
                if key != 'clean' and key in found[name]:
                    raise InputError(f'{name}={folder}: {key} is in another folder of {name} too')
                found[name].setdefault(key, value)
    first = next(iter(found.values()))
    common = [key for key in first if all(key in own for own in found.values())]
    if not common:
        raise InputError(f"{', '.join(found)}: have no benchmark or attack in common")
    for key in common:
        for name, rows in found.items():
            if rows[key].measured_on != first[key].measured_on:
                raise InputError(
                    f'{name}: {key} was measured on other images or with other settings than for '
                    f'{next(iter(found))}', 'use the same data, `num_examples`, `seed`, attacks, `corruptions` and '
                    '`severities` for both')
    titles = {}
    for key in common:
        images_, seed, *_ = first[key].measured_on
        titles[key] = f'{first[key].name} ({images_:,} images, seed {seed})'
    return {name: {titles[key]: rows[key].accuracy for key in common} for name, rows in found.items()}
