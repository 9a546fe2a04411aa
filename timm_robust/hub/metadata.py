"""Metadata of a card for the Hub: tags, data sets, papers, and results for benchmarks to collect."""
import re
from typing import Dict, List, Sequence, Tuple

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from ..evaluation import AttackOutcome, EvaluationReport
from ..evaluation.render import words
from .benchmark import BENCHMARK, published, task_id

__all__ = [
    'Evaluations',
    'arxiv_ids',
    'doubts',
    'eval_files',
    'has_autoattack',
    'hub_datasets',
    'known_data',
    'overlap',
    'threat_tags',
]

Evaluations = Sequence[Tuple[str, EvaluationReport]]

_ON_HUB = {
    'cifar10': 'uoft-cs/cifar10',
    'cifar100': 'uoft-cs/cifar100',
    'fashionmnist': 'zalando-datasets/fashion_mnist',
    'ilsvrc2012': 'ILSVRC/imagenet-1k',
    'imagenet': 'ILSVRC/imagenet-1k',
    'imagenet1k': 'ILSVRC/imagenet-1k',
    'imagenette': 'frgfm/imagenette',
    'imagenette2': 'frgfm/imagenette',
    'mnist': 'ylecun/mnist',
}
_OVERLAPPING = {_ON_HUB['imagenet'], _ON_HUB['imagenette']}
_TRAINING, _HELD_OUT = ('train', 'training'), ('test', 'testing', 'val', 'valid', 'validation', 'eval', 'evaluation')


def _key(data: str) -> str:
    """A key for comparing names: the same for 'torch/cifar10', 'CIFAR-10' and 'CIFAR-10 (a copy)'."""
    return re.sub(r'[^a-z0-9]', '', data.partition('(')[0].rpartition('/')[2].lower())


def hub_datasets(names: Sequence[str]) -> List[str]:
    """The Hub ids of the data sets with these names; unknown ones are left out."""
    return list(dict.fromkeys(_ON_HUB[_key(name)] for name in names if _key(name) in _ON_HUB))


def known_data(dataset: str, folder: str) -> str:
    """The data set of a training run; '' for a folder that is not named after a known data set."""
    return dataset or (folder if _key(folder) in _ON_HUB else '')


def threat_tags(evaluations: Evaluations) -> List[str]:
    """Norms and eps of the attacks: 'linf', 'eps-8-255'."""
    threats = [a.threat for _, report in evaluations for a in report.attacks if a.threat]
    eps = [re.sub(r'[^0-9.]+', '-', t.text.partition(' ')[2]) for t in threats]
    return list(dict.fromkeys([*(t.norm.lower() for t in threats), *(f'eps-{e}' for e in eps)]))


def arxiv_ids(citations: Sequence[str]) -> List[str]:
    """arXiv ids of the papers that BibTeX entries link to."""
    return list(dict.fromkeys(re.findall(r'arxiv\.org/abs/(\d+\.\d+)', '\n'.join(citations))))


def overlap(train_data: str, train_split: str, base_model: str, evaluations: Evaluations) -> List[Tuple[bool, str]]:
    """For each evaluation, whether its images could have been used in training, and a sentence that says so."""
    found = []
    of_base = f' The training data of {base_model} is unknown.' if base_model else ''
    for name, report in evaluations:
        split = report.data.split
        measured = f'{name}, split {split}' if split else name
        own, trained = _ON_HUB.get(_key(name)), _ON_HUB.get(_key(train_data))
        if not train_data:
            found.append((True, f'{measured}: the training set is unknown, so the images may have been in it.'))
        elif own and trained and own != trained and {own, trained} != _OVERLAPPING:
            found.append((False, f'{measured}: a different data set from the training set ({train_data}).{of_base}'))
        elif (own or _key(name)) != (trained or _key(train_data)):
            found.append((
                True, f'{measured}: judging by its name, it may have images of the training set ({train_data}).'))
        elif split in _HELD_OUT and train_split in _TRAINING:
            found.append((
                False,
                f'{measured}: judging by the splits, no image was used in training (split {train_split}).{of_base}'))
        else:
            found.append((
                True, f'{measured}: the images may have been used in training (split {train_split or "unknown"}).'))
    return list(dict.fromkeys(found))


def has_autoattack(evaluations: Evaluations) -> bool:
    """Whether AutoAttack was run in any of the evaluations."""
    return any(outcome.includes_autoattack for _, report in evaluations for outcome in report.attacks)


def diagnoses(evaluations: Evaluations) -> List[str]:
    """For each diagnosis, what was diagnosed, on how many images, and the result in a sentence."""
    return [
        f'{name}, {report.threats[0]}, '
        f"{report.findings[0].measured.get('num_examples', report.data.num_examples)} images: {words.verdict(report)}"
        for name, report in evaluations if report.findings and report.threats]


def doubts(overlaps: Sequence[str], evaluations: Evaluations) -> List[Tuple[str, str]]:
    """Warnings about the numbers, and about checks that were not run, as pairs of kind and text.

    Args:
        overlaps: Doubtful sentences of `overlap`.
        evaluations: Measurements, each with the name of its data.
    """
    lines = [('maybe trained on', text) for text in overlaps]
    lines += [warning for _, report in evaluations for warning in words.warnings(report)]
    own = [(name, report) for name, report in evaluations if report.threats and not report.settings.surrogate]
    checked = {(name, report.threats[0]) for name, report in own if report.findings}  # a diagnosis is of the first
    unchecked = [f'{name}, {t}' for name, report in own for t in report.threats if (name, t) not in checked]
    if not checked:
        lines.append(('not checked', 'timm-robust diagnose was not run on these weights: gradients may be masked.'))
    elif unchecked:
        lines.append(('not checked', f"timm-robust diagnose was not run for {'; '.join(dict.fromkeys(unchecked))}."))
    measured = dict.fromkeys((name, threat) for name, report in own for threat in report.threats)
    complete = {(name, a.threat) for name, report in own for a in report.attacks if a.includes_autoattack}
    if bounds := [f'{name}, {threat}' for name, threat in measured if (name, threat) not in complete]:
        which = 'These accuracies' if len(bounds) == len(measured) else f"Accuracies of {'; '.join(bounds)}"
        lines.append(('no AutoAttack', f'{which} are upper bounds; expect lower ones under AutoAttack.'))
    return list(dict.fromkeys(lines))


def _entry(name: str, report: EvaluationReport, outcome: AttackOutcome, repo_id: str) -> EvalResultEntry:
    low, high = report.interval(outcome.name)
    of_attack = f'robust accuracy, {report.described(outcome)}, {outcome.threat}'
    what = of_attack if outcome.threat else 'clean accuracy'
    return EvalResultEntry(
        dataset_id=BENCHMARK,
        task_id=task_id(name, report, outcome),
        value=round(report.accuracy(outcome.name), 2),
        date=report.settings.date or None,
        source_url=f'https://huggingface.co/{repo_id}/blob/main/results.json',
        source_name='outcome of every image',
        notes=f'{what}, in percent (95 % interval {low:.1f} to {high:.1f}), seed {report.settings.seed}, '
              f"timm_robust {report.versions.get('timm_robust', '')}")


def eval_files(repo_id: str, evaluations: Evaluations) -> Dict[str, str]:
    """The files .eval_results/DATA.yaml of a repository, in the Hub's format; of several values the lowest."""
    entries: Dict[str, Dict[str, EvalResultEntry]] = {}
    for name, report in evaluations:
        for entry in (_entry(name, report, outcome, repo_id) for outcome in published(report)):
            own = entries.setdefault(_key(name) or 'data', {})
            own[entry.task_id] = min(entry, own.get(entry.task_id, entry), key=lambda e: e.value)
    return {
        f'.eval_results/{key}.yaml': yaml.safe_dump(
            eval_result_entries_to_yaml(list(own.values())), sort_keys=False, allow_unicode=True, width=1000)
        for key, own in entries.items()}
