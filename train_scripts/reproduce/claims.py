"""The papers' claims beside what the strongest attacks at hand leave of them, from tables/*.json."""
import json
import statistics
from typing import Any, Dict, List

from common import DATA, HERE
from robustnorm import PAPER_ATTACKS

CLEAN, PGD, STRONGEST = 0, PAPER_ATTACKS.index('pgd20'), len(PAPER_ATTACKS)


def verdict(claim: str, better: float, worse: float, error: float, measured: str) -> str:
    """A claim that one figure is above another, whether it is by two standard errors of the difference, and figures."""
    found = 'Does not hold' if better <= worse else 'Holds' if better - worse > 2 * error else 'Not settled'
    return f'- **{claim}** {found} here: {measured}'


def sampling_error(a: float, b: float, images: int) -> float:
    """Standard error of the difference of two accuracies in percent, as if on images of their own."""
    return ((a * (100 - a) + b * (100 - b)) / images) ** .5


def robustnorm(rows: List[Dict[str, Any]]) -> List[str]:
    """Claims of the RobustNorm paper."""
    found = {r['norm']: r['statistics'] for r in rows if r['data'] == 'cifar10'}
    one = found['batchnorm']['population']
    images = one['num_examples']
    sample = f"ResNet-20, {DATA['cifar10']}, {one['threat_model']}, {images:,} images, seed {one['seed']}"
    lines = []
    for norm, title in (('batchnorm', 'BatchNorm'), ('robustnorm', 'RobustNorm')):
        batch, tracked = (found[norm][mode]['accuracy'] for mode in ('batch', 'population'))
        lines.append(verdict(
            f"{title} is more robust with the batch's statistics than with tracked ones (RobustNorm, table 1).",
            batch[STRONGEST], tracked[STRONGEST], sampling_error(batch[STRONGEST], tracked[STRONGEST], images),
            f"PGD-20 leaves {batch[PGD]:.1f} % with the batch's statistics and {tracked[PGD]:.1f} % with tracked ones, "
            f'the adaptive attack on whole batches {batch[STRONGEST]:.1f} % and AutoAttack on tracked statistics '
            f'{tracked[STRONGEST]:.1f} % ({sample}).'))
    ours, theirs = (found[norm]['population']['accuracy'] for norm in ('robustnorm', 'batchnorm'))
    return [*lines, verdict(
        'Without adversarial images RobustNorm is more robust than BatchNorm (RobustNorm).',
        ours[STRONGEST], theirs[STRONGEST], sampling_error(ours[STRONGEST], theirs[STRONGEST], images),
        f'AutoAttack leaves {ours[STRONGEST]:.1f} % and {theirs[STRONGEST]:.1f} %, PGD-20 {ours[PGD]:.1f} % and '
        f'{theirs[PGD]:.1f} %, of {ours[CLEAN]:.1f} % and {theirs[CLEAN]:.1f} % clean ({sample}, tracked statistics).')]


def nofrost(rows: List[Dict[str, Any]]) -> List[str]:
    """Claims of the NoFrost paper."""
    found = {(r['objective'], r['norm']): r for r in rows}
    one = found['nofrost', 'none']
    ours, theirs = (found['nofrost', norm]['accuracy'] for norm in ('none', 'batchnorm2d'))
    return [verdict(
        'Adversarial training gives a more robust network without BatchNorm (NoFrost).',
        ours[-1], theirs[-1], sampling_error(ours[-1], theirs[-1], one['num_examples']),
        f'AutoAttack leaves {ours[-1]:.1f} % of a normalizer-free network and {theirs[-1]:.1f} % of one of about its '
        f'size with BatchNorm, of {ours[0]:.1f} % and {theirs[0]:.1f} % clean (MNIST digits, {one["threat_model"]}, '
        f"{one['num_examples']:,} images, seed {one['seed']}).")]


def apart(top1: Dict[str, List[float]]) -> List[str]:
    """Claims of the APART paper."""
    (plain, a), (ours, b) = (
        (statistics.mean(top1[name]), statistics.stdev(top1[name])) for name in ('standard', 'apart'))
    seeds = len(top1['apart'])
    return [verdict(
        'APART gains clean accuracy (APART).', ours, plain, ((a * a + b * b) / seeds) ** .5,
        f'{ours:.2f} % against {plain:.2f} % in the mean of {seeds} seeds, whose standard deviations are {b:.2f} and '
        f'{a:.2f} (ResNet-8, 1,000 MNIST digits).')]


def claims() -> str:
    """All claims, as a list in Markdown."""
    def table(name: str) -> Dict[str, Any]:
        return json.loads((HERE / 'tables' / f'{name}.json').read_text())

    return '\n'.join([
        *robustnorm(table('robustnorm')['rows']), *nofrost(table('nofrost')['rows']), *apart(table('apart')['top1'])])
