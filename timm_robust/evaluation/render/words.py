"""Sentences and table rows of a report, shared by all its formats."""
import math
from collections import Counter
from typing import Dict, List, Optional, Sequence, Tuple

from ..facts import Finding
from ..outcome import AttackOutcome, percent, wilson_interval
from ..report import EvaluationReport
from ..shifts import BenchmarkResult

__all__ = [
    'BENCHMARK_HEADER',
    'EXAMPLE_HEADER',
    'GAMMA',
    'GAMMA_HEADER',
    'HEADER',
    'SURFACE',
    'attack_rows',
    'benchmark_rows',
    'eps_curves',
    'eps_header',
    'eps_rows',
    'example_rows',
    'facts',
    'findings',
    'gamma_rows',
    'headline',
    'notes',
    'readable',
    'reading',
    'sample',
    'severity_header',
    'severity_rows',
    'swept_attack',
    'threat_header',
    'threat_rows',
    'title',
    'upper_bound',
    'verdict',
    'warnings',
]

HEADER = (
    'attack', 'threat model', 'steps', 'attacked', 'robust accuracy, this attack (%)', '95 % interval',
    'robust accuracy, cumulative (%)', 'seconds')
BENCHMARK_HEADER = ('benchmark', 'images', 'top-1 (%)', 'notes')
EXAMPLE_HEADER = ('label', 'clean confidence (%)', 'attack', 'prediction', 'confidence (%)', 'outcome')
GAMMA_HEADER = ('gamma', 'clean accuracy (%)', 'robust accuracy (%)')
GAMMA = 'Gamma 0 uses the BatchNorm for clean images, gamma 1 the one for adversarial images; values between mix both.'
SURFACE = (
    'Mean cross-entropy of clean images perturbed by up to eps along the gradient (x-axis) and along random signs '
    '(y-axis). If the gradient guides an attack, the loss rises smoothly to the right.')

_BOUND = 'These attacks give an upper bound on robust accuracy; stronger ones (AutoAttack) may lower it.'
_BY_BATCH = (
    'This network normalizes by the current batch. A prediction depends on the other images in its batch, and these '
    'accuracies hold for these batches only.')
_RANDOMIZED = (
    'This network is randomized: two passes of the same images differ, so these accuracies vary from run to run, and '
    'attacks that do not average over passes are weak. Use autoattack-rand.')
_ONLY_REMAINING = (
    '"Cumulative" counts images that withstand this attack and all above it. Each attack ran only on images that '
    'withstood those above it, so there is no per-attack accuracy.')
_ON_ALL = (
    '"This attack": each attack ran on all correctly classified images. "Cumulative" counts images that withstand '
    "this attack and all above it. Intervals are Wilson's.")

_OF_EACH_THREAT = (
    '"Cumulative" counts within each threat model; the worst case over all counts images that withstand every attack '
    'under every threat model. The diagnosis covers the first threat model only.')


def _number(value: Optional[float]) -> str:
    return '-' if value is None else f'{value:.2f}'


def readable(name: str) -> str:
    """A name such as 'zero_gradients' for people: 'Zero gradients'."""
    return name.replace('_', ' ').capitalize()


def sample(report: EvaluationReport) -> str:
    """How many images, except of benchmarks, and the seed."""
    count = f'{report.data.num_examples:,} images, ' if report.attacks else ''
    return f'{count}seed {report.settings.seed}'


def title(report: EvaluationReport) -> str:
    """Model and data set."""
    model, data = report.model, report.data
    name = ' '.join(filter(None, (model.name, model.checkpoint)))
    return name + (f' on {data.source}' if data.source else '') + (f' ({data.split})' if data.split else '')


def _row(report: EvaluationReport, outcome: AttackOutcome) -> Tuple[str, ...]:
    low, high = report.interval(outcome.name)
    return (
        outcome.label,
        str(outcome.threat or '-'),
        outcome.effort or '-',
        '-' if outcome.is_clean else str(outcome.attacked),
        _number(outcome.accuracy),
        f'{low:.1f} to {high:.1f}' if outcome.complete else '-',
        _number(percent(report.standing(outcome.name))),
        f'{outcome.seconds:.1f}',
    )


def attack_rows(report: EvaluationReport) -> List[Tuple[str, ...]]:
    """Rows under `HEADER`, with everything that must be reported along with a robust accuracy."""
    return [_row(report, outcome) for outcome in report.attacks]


def threat_header(report: EvaluationReport) -> Tuple[str, ...]:
    """Header of the table of several threat models."""
    return ('robust accuracy (%)', *map(str, report.threats), 'worst case over all')


def threat_rows(report: EvaluationReport) -> List[Tuple[str, ...]]:
    """Rows under `threat_header`: one for each attack and one for all of them; none with a single threat model."""
    if len(report.threats) < 2:
        return []
    attacks: Dict[str, List[AttackOutcome]] = {}
    for outcome in report.real_attacks:
        attacks.setdefault(outcome.attack_name, []).append(outcome)
    last = [[a for a in report.real_attacks if a.threat == threat][-1] for threat in report.threats]

    def row(title: str, under: Sequence[Sequence[Optional[bool]]]) -> Tuple[str, ...]:
        return (title, *(_number(percent(correct)) for correct in (*under, map(all, zip(*under)))))

    return [
        *(row(name, [o.correct if o.complete else report.standing(o.name) for o in found])
          for name, found in attacks.items()),
        *([row('all attacks', [report.standing(o.name) for o in last])] if len(attacks) > 1 else [])]


def reading(report: EvaluationReport) -> List[str]:
    """What the columns of the table mean."""
    if not report.real_attacks:
        return []
    return [
        _ONLY_REMAINING if report.settings.worst_case else _ON_ALL,
        *([_OF_EACH_THREAT] if len(report.threats) > 1 else []), *_few_classes(report), *_randomized(report),
        *_distances(report)]


def _transfer(report: EvaluationReport) -> List[str]:
    surrogate = report.settings.surrogate
    return [
        f'Black-box transfer: the attacks were crafted on {surrogate}, not on this network.'] if surrogate else []


def _few_classes(report: EvaluationReport) -> List[str]:
    names = ' and '.join(
        a.name for a in report.attacks if a.is_autoattack and any(m.get('loss') == 'gap' for m in a.members))
    return [
        f'The model has {report.model.num_classes} classes, too few for the difference of logits ratio (DLR): {names} '
        'used the logit gap instead, towards all wrong classes.'] if names else []


def _randomized(report: EvaluationReport) -> List[str]:
    texts = []
    for outcome in report.real_attacks:
        mean = outcome.single_pass_accuracy
        if outcome.passes > 1 and mean is not None:
            total = len(outcome.correct)
            low, high = wilson_interval(mean / 100 * total, total)
            least, most = outcome.verdict_interval
            texts.append(
                f'{outcome.name}: the network is treated as randomized, so {outcome.passes} passes decide; an image '
                f'misclassified in at least half of them counts as broken. A single pass classifies {mean:.2f} % '
                f'correctly (95 % interval {low:.1f} to {high:.1f}). Counting images with an error rate near one half '
                f'either way, robust accuracy is between {least:.2f} and {most:.2f} %.')
    return texts


def upper_bound(report: EvaluationReport) -> List[str]:
    """A note that the accuracy is an upper bound; none if AutoAttack was run."""
    return [_BOUND] if report.real_attacks and not any(a.includes_autoattack for a in report.attacks) else []


def _about_data(report: EvaluationReport) -> List[str]:
    data = report.data
    found = [data.mismatch] if data.mismatch else []
    if data.class_sizes_differ:
        sizes = data.class_sizes
        found.append(
            f'The images are class-balanced, but classes of the data set have {min(sizes):,} to {max(sizes):,} images: '
            'accuracies on all images can differ from these.')
    return found


def notes(report: EvaluationReport) -> List[str]:
    """What a reader of the table must know, as sentences."""
    return [
        f'{sample(report)}, {report.threat}.',
        *_transfer(report),
        *reading(report),
        *upper_bound(report),
        *([f'WARNING: {_BY_BATCH}'] if report.settings.batch_dependent else []),
        *([f'WARNING: {_RANDOMIZED}'] if report.settings.randomized else []),
        *(f'WARNING: {text}' for text in report.settings.suspicions or ()),
        *(f'WARNING: {text}' for text in _about_data(report)),
    ]


def headline(report: EvaluationReport) -> str:
    """Clean and robust accuracy with all they depend on, in a sentence or two."""
    clean, robust, where = report.clean_accuracy, report.robust_accuracy, sample(report)
    start = '' if clean is None else f'Clean accuracy {clean:.2f} %, '
    if report.settings.surrogate and report.real_attacks:
        return ' '.join([f'{start}{where}.', *_transfer(report), 'This says little about robustness.'])
    if robust is None:
        return f'{start}{where}. No attack was run: this says nothing about robustness.'
    names = robust.attacks
    text = f"{start}robust accuracy {'at most ' if upper_bound(report) else ''}{robust.accuracy:.2f} % "
    text += f'under {names[0]}' if len(names) == 1 else f"in the worst case of {', '.join(names[:-1])} and {names[-1]}"
    text += f' ({report.threat}, {where}; 95 % interval {robust.interval[0]:.1f} to {robust.interval[1]:.1f}).'
    together, best = percent(report.worst_case), report.best_known
    if best is not None and best != robust:
        text += f" Best known robust accuracy: {best.accuracy:.2f} % ({', '.join(best.attacks)})."
    if together < min(robust.accuracy, best.accuracy if best else 100.):
        text += f' Under all attacks together it is {together:.2f} %.'
    return ' '.join([text[0].upper() + text[1:], *upper_bound(report)])


def warnings(report: EvaluationReport) -> List[Tuple[str, str]]:
    """Reasons to doubt the accuracies, as pairs of verdict and text."""
    found = [(v, f) for v in ('alarm', 'warning') for f in report.findings if f.verdict == v]
    return [
        *([('warning', _BY_BATCH)] if report.settings.batch_dependent else []),
        *([('warning', _RANDOMIZED)] if report.settings.randomized else []),
        *(('warning', text) for text in report.settings.suspicions or ()),
        *(('warning', text) for text in _about_data(report)),
        *(('warning', text) for text in _transfer(report)),
        *((verdict, f'{readable(f.name)}: {f.text}') for verdict, f in found),
    ]


def findings(report: EvaluationReport) -> List[Finding]:
    """The findings of the diagnosis, the most severe first."""
    return sorted(report.findings, key=lambda f: ('alarm', 'warning', 'skipped', 'ok').index(f.verdict))


def verdict(report: EvaluationReport) -> str:
    """The diagnosis in one sentence."""
    counts = Counter(f.verdict for f in report.findings)
    bad = [f"{counts[v]} {v}{'s' * (counts[v] > 1)}" for v in ('alarm', 'warning') if counts[v]]
    skipped = f", {counts['skipped']} skipped" if counts['skipped'] else ''
    count = len(report.findings)
    of = f"{count} check{'s' * (count > 1)}{skipped}"
    if bad:
        return f"{' and '.join(bad)} in {of}: the robust accuracy may not be real."
    return f'No sign of false robustness in {of}.'


def eps_curves(report: EvaluationReport) -> Dict[str, Dict[float, float]]:
    """Accuracy over eps by attack: at each eps of the sweep, or at each distance found by minimum-norm attacks.

    Empty with several threat models, whose eps have different units.
    """
    if len(report.threats) > 1:
        return {}
    swept = {p.eps: p.accuracy for p in report.eps_sweep}
    curves = {swept_attack(report): swept} if swept else {}
    last = max(2 * report.threat.eps, *swept, 0.)
    for outcome in _curved(report):
        found = sorted({d for d in outcome.distances if d is not None and 0 < d <= last})
        # a step at each distance: the image is classified correctly just below it
        steps = {e: outcome.accuracy_at(e) for d in found for e in (math.nextafter(d, 0), d)}
        ends = {eps: outcome.accuracy_at(eps) for eps in (0., last)}
        curves[outcome.name] = dict(sorted({**ends, **steps}.items()))
    return curves


def _minimizing(report: EvaluationReport) -> List[AttackOutcome]:
    return [a for a in report.attacks if a.distances and a.complete]


def _curved(report: EvaluationReport) -> List[AttackOutcome]:
    """Minimum-norm attacks whose distances give a curve of their own; that of the sweep has one already."""
    return [a for a in _minimizing(report) if not (report.eps_sweep and a.name == swept_attack(report))]


def eps_header(report: EvaluationReport) -> Tuple[str, ...]:
    """Header of `eps_rows`."""
    return 'eps', *(f'{name} (%)' for name in eps_curves(report))


def eps_rows(report: EvaluationReport) -> List[Tuple[str, ...]]:
    """Accuracy at each eps of the sweep, or at fractions and multiples of the threat model's eps."""
    swept = {p.eps: p.accuracy for p in report.eps_sweep}
    points = list(swept) or [report.threat.eps * k / 4 for k in (0, 1, 2, 3, 4, 6, 8)]
    return [
        (_eps_text(report.threat.norm, eps), *([_number(swept[eps])] if swept else []),
         *(_number(a.accuracy_at(eps)) for a in _curved(report))) for eps in points]


def _distances(report: EvaluationReport) -> List[str]:
    texts = []
    for outcome in _minimizing(report):
        found = sorted(math.inf if d is None else d for d in outcome.distances)
        median = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
        texts.append(
            f'{outcome.name}: the median distance of the nearest adversarial image is {median:.4g} in '
            f'{outcome.threat and outcome.threat.norm} (misclassified clean images count as 0).')
    return texts


def _eps_text(norm: str, eps: float) -> str:
    in_255 = round(eps * 255)
    in_fractions = norm == 'Linf' and 1 <= in_255 <= 32 and abs(eps * 255 - in_255) < 1e-6
    return f'{in_255}/255' if in_fractions else f'{eps:g}'


def gamma_rows(report: EvaluationReport) -> List[Tuple[str, str, str]]:
    """Rows under `GAMMA_HEADER`."""
    return [(f'{p.gamma:g}', _number(p.clean), _number(p.robust)) for p in report.gamma_sweep]


def benchmark_rows(report: EvaluationReport) -> List[Tuple[str, str, str, str]]:
    """Rows under `BENCHMARK_HEADER`."""
    clean = next((b.accuracy for b in report.benchmarks if b.name == 'clean'), None)
    rows = []
    for b in report.benchmarks:
        remarks = []
        if b.accuracy_all_classes is not None:
            remarks.append(f'among its {b.num_classes} classes; {b.accuracy_all_classes:.1f} among all classes')
        if b.errors:
            remarks.append(f'mean error {b.mean_error:.1f} % over {len(b.mean_errors)} corruptions')
        for value, text in ((b.mce, 'mCE'), (b.relative_mce(clean), 'relative mCE')):
            remarks += [] if value is None else [f'{text} {value:.1f}']
        if b.resized_to:
            remarks.append(f"resized to {'x'.join(map(str, b.resized_to))}")
        if b.expected and b.num_images != b.expected:
            remarks.append(f'of {b.expected:,} published images')
        rows.append((b.name, f'{b.num_images:,}', f'{b.accuracy:.1f}', ', '.join(remarks)))
    return rows


def _severities(benchmark: BenchmarkResult) -> List[int]:
    return sorted(next(iter(benchmark.errors.values())))


def severity_header(benchmark: BenchmarkResult) -> Tuple[str, ...]:
    """Header for the errors of a corruption benchmark."""
    return ('corruption', *map(str, _severities(benchmark)), 'mean')


def severity_rows(benchmark: BenchmarkResult) -> List[Tuple[str, ...]]:
    """Rows under `severity_header`."""
    return [
        (name, *(f'{own[s]:.1f}' for s in _severities(benchmark)), f'{sum(own.values()) / len(own):.1f}')
        for name, own in benchmark.errors.items()]


def example_rows(report: EvaluationReport) -> List[Tuple[str, ...]]:
    """Rows under `EXAMPLE_HEADER`."""
    name = report.data.class_name
    return [
        (name(e.label), f'{100 * e.clean_confidence:.1f}', e.attack, name(e.prediction), f'{100 * e.confidence:.1f}',
         'fooled' if e.fooled else 'not fooled') for e in report.examples]


def swept_attack(report: EvaluationReport) -> str:
    """The attack behind the curves over eps and gamma: the last one."""
    if not report.real_attacks:
        return 'no attack'
    last, surrogate = report.real_attacks[-1].name, report.settings.surrogate
    return f'{last} crafted on {surrogate}' if surrogate else last


def _settings(attack: Dict[str, object], members: Sequence[Dict[str, object]] = ()) -> str:
    shown = [
        f"{key} {f'{value:g}' if isinstance(value, float) else value}" for key, value in attack.items()
        if key != 'attack' and value is not None]
    return ', '.join([*shown, *(f"{m.get('attack')} ({_settings(m)})" for m in members)])


def _group(content: object, hidden: Sequence[str]) -> List[Tuple[str, str]]:
    return [
        (key, ', '.join(map(str, value)) if isinstance(value, tuple) else str(value))
        for key, value in vars(content).items() if key not in hidden and value not in (None, '', {}, [], ())]


def facts(report: EvaluationReport) -> Dict[str, List[Tuple[str, str]]]:
    """What is needed to reproduce the evaluation, except the command: pairs of name and value, by group."""
    groups = {
        'Settings': _group(report.settings, ('command', 'suspicions')),
        'Threat model': _group(report.threat, ('norm', 'eps') if len(report.threats) > 1 else ()),
        'Model': _group(report.model, ('logits',)) + [('resizing', r) for r in [report.model.resizing] if r],
        'Data': _group(report.data, ('indices', 'labels', 'class_names')),
        'Versions': list(report.versions.items()),
        'Attacks': [(a.name, _settings(a.attack, a.members)) for a in report.real_attacks],
    }
    return {group: rows for group, rows in groups.items() if rows}
