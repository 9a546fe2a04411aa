"""The evaluation protocol as a benchmark on the Hub: eval.yaml, and protocol.json with images, threat models, attacks.

For each data set whose eval.yaml it accepts, the Hub collects the results in the .eval_results/ of models:
https://huggingface.co/docs/hub/eval-results
"""
import hashlib
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

import yaml

from ..evaluation import AttackOutcome, EvaluationReport
from ..inputs import write_json, write_text

__all__ = ['BENCHMARK', 'published', 'task_id', 'write_benchmark']

BENCHMARK = 'timm-robust/adversarial-robustness'
_DESCRIPTION = (
    'Clean and robust accuracy of image classifiers, in percent. For each task, protocol.json gives the indices of the '
    'images in a split, the threat model in pixel units on [0, 1], and the attack with all its settings. An image '
    'counts as robust if it is classified correctly both clean and attacked, in float32.')


def _slug(text: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def _images(report: EvaluationReport) -> str:
    """A name for a set of images: the same indices and labels give the same name."""
    content = f'{report.data.indices} {report.data.labels}'
    return f'{report.data.num_examples}-{hashlib.sha256(content.encode()).hexdigest()[:8]}'


def published(report: EvaluationReport) -> List[AttackOutcome]:
    """The outcomes that are accuracies of the network, without attacks crafted on another one."""
    return [outcome for outcome in report.attacks if outcome.is_clean or not report.settings.surrogate]


def task_id(name: str, report: EvaluationReport, outcome: AttackOutcome) -> str:
    """The id of the task that an accuracy belongs to: data, images, attack, threat model."""
    return _slug(f"{name} {_images(report)} {report.described(outcome)} {outcome.threat or ''}")


def write_benchmark(folder: Path, evaluations: Iterable[Tuple[str, EvaluationReport]]) -> None:
    """Write eval.yaml and protocol.json, with a task for each kind of accuracy in the evaluations.

    Args:
        folder: Where to write; it is meant for a data set repository.
        evaluations: Reports, each with the name of its data.
    """
    tasks: Dict[str, Dict[str, Any]] = {}
    images: Dict[str, Dict[str, Any]] = {}
    protocols: Dict[str, Dict[str, Any]] = {}
    for name, report in evaluations:
        key = f'{_slug(name)}-{_images(report)}'
        images[key] = {
            'data': name, 'split': report.data.split, 'subset': report.data.subset, 'seed': report.settings.seed,
            'indices': list(report.data.indices), 'labels': list(report.data.labels)}
        for outcome in published(report):
            task = task_id(name, report, outcome)
            tasks[task] = {'id': task, 'config': 'default', 'split': report.data.split or 'test'}
            threat = outcome.threat
            protocols[task] = {
                'images': key, 'threat': {'norm': threat.norm, 'eps': threat.eps} if threat else None,
                'attack': outcome.attack, 'members': list(outcome.members),
                'after': [] if outcome.complete else [a.attack for a in report.earlier(outcome)]}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / 'eval.yaml', yaml.safe_dump({
        'name': 'Adversarial robustness of image classifiers', 'description': _DESCRIPTION,
        'evaluation_framework': 'timm-robust', 'tasks': [tasks[task] for task in sorted(tasks)],
    }, sort_keys=False, width=1000))
    write_json(folder / 'protocol.json', {
        'tasks': {task: protocols[task] for task in sorted(protocols)},
        'images': {key: images[key] for key in sorted(images)}})
