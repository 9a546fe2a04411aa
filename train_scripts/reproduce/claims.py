"""The papers' claims beside what the strongest attacks at hand leave of them, from tables/*.json."""
import json
import statistics
from typing import Any, Dict, List, Sequence, Tuple

import yaml
from common import DATA, DIGITS_RECIPE, HERE
from nofrost import PAPER, REPORT
from robustnorm import PAPER_ATTACKS, STRONGEST

NETWORK = 'resnet20'
ONE_RUN = 'One training run each: the verdict allows for the choice of test images alone.'


def verdict(claim: str, better: float, worse: float, error: float, measured: str) -> str:
    """A claim that one figure is above another, what two standard errors of the difference say of it, and figures."""
    difference = better - worse
    found = 'Not settled' if abs(difference) <= 2 * error else 'Holds' if difference > 0 else 'Does not hold'
    return f'- **{claim}** {found} here: {measured}'


def paired_error(a: str, b: str) -> float:
    """Standard error of the difference of two accuracies in percent, from the outcomes of the same images."""
    return 100 * statistics.stdev(int(x) - int(y) for x, y in zip(a, b, strict=True)) / len(a) ** .5


def weakest(names: Sequence[str], found: Dict[str, Any]) -> Tuple[float, str, str]:
    """Lowest accuracy under an attack, the attack and its outcomes; the first of all is clean."""
    return min(list(zip(found['accuracy'], names, found['outcomes']))[1:], key=lambda one: one[0])


def robustnorm(rows: List[Dict[str, Any]]) -> List[str]:
    """Claims of the RobustNorm paper."""
    found = {r['norm']: r['statistics'] for r in rows if (r['network'], r['data']) == (NETWORK, 'cifar10')}
    one = found['batchnorm']['population']
    pgd = PAPER_ATTACKS.index('pgd20')
    sample = f"{NETWORK}, {DATA['cifar10']}, {one['threat_model']}, {one['num_examples']:,} images, seed {one['seed']}"

    def robust(norm: str, mode: str) -> Tuple[float, str, str]:
        return weakest((*PAPER_ATTACKS, STRONGEST[mode]), found[norm][mode])

    lines = []
    for norm, title in (('batchnorm', 'BatchNorm'), ('robustnorm', 'RobustNorm')):
        (batch, by, a), (tracked, tracked_by, b) = robust(norm, 'batch'), robust(norm, 'population')
        lines.append(verdict(
            f"{title} is more robust with the batch's statistics than with tracked ones (RobustNorm, table 1).",
            batch, tracked, paired_error(a, b),
            f"PGD-20 leaves {found[norm]['batch']['accuracy'][pgd]:.1f} % and "
            f"{found[norm]['population']['accuracy'][pgd]:.1f} %, the strongest attack {batch:.1f} % ({by}) and "
            f"{tracked:.1f} % ({tracked_by}); {sample}. The batch's statistics were attacked in whole batches of 100, "
            'without AutoAttack, which says nothing of other batches.'))
    (ours, by, a), (theirs, theirs_by, b) = robust('robustnorm', 'population'), robust('batchnorm', 'population')
    clean = [found[norm]['population']['accuracy'][0] for norm in ('robustnorm', 'batchnorm')]
    return [*lines, verdict(
        'Without adversarial images RobustNorm is more robust than BatchNorm (RobustNorm).',
        ours, theirs, paired_error(a, b),
        f'the strongest attack leaves {ours:.1f} % ({by}) and {theirs:.1f} % ({theirs_by}) of {clean[0]:.1f} % and '
        f'{clean[1]:.1f} % clean; {sample}, tracked statistics. {ONE_RUN}')]


def nofrost(rows: List[Dict[str, Any]], attacks: Sequence[str]) -> List[str]:
    """Claims of the NoFrost paper."""
    found, epochs = {r['norm']: r for r in rows}, yaml.safe_load(DIGITS_RECIPE.read_text())['epochs']
    one, norm = found['none'], found['batchnorm2d']
    paper, paper_norm = PAPER['NoFrost', 'none'], PAPER['adversarial', 'BatchNorm']
    (ours, by, a), (theirs, theirs_by, b) = weakest(attacks, one), weakest(attacks, norm)
    return [verdict(
        'Adversarial training gives a more robust network without BatchNorm (NoFrost).',
        ours, theirs, paired_error(a, b),
        f'the strongest attack leaves {ours:.1f} % ({by}) of a normalizer-free network and {theirs:.1f} % '
        f'({theirs_by}) of one of the same convolutions with BatchNorm, of {one["accuracy"][0]:.1f} % '
        f'and {norm["accuracy"][0]:.1f} % clean; {epochs} epochs, MNIST digits, {one["threat_model"]}, '
        f'{one["num_examples"]:,} images, seed {one["seed"]}. {ONE_RUN} The paper has {paper[1]} % against '
        f'{paper_norm[1]} % under PGD (ResNet-50, ImageNet, Linf eps 8/255); AutoAttack leaves {paper[2]} % of the '
        f'released weights [others found]({REPORT}).')]


def apart(content: Dict[str, Any]) -> List[str]:
    """Claims of the APART paper."""
    (plain, a), (ours, b) = (
        (statistics.mean(content['top1'][name]), statistics.stdev(content['top1'][name]))
        for name in ('standard', 'apart'))
    return [verdict(
        'APART gains clean accuracy (APART).', ours, plain, ((a * a + b * b) / len(content['seeds'])) ** .5,
        f"{ours:.2f} % against {plain:.2f} % in the mean of seeds {', '.join(map(str, content['seeds']))}, with "
        f"standard deviations of {b:.2f} and {a:.2f}; ResNet-8, {content['epochs']} epochs, 1,000 MNIST digits.")]


def claims() -> str:
    """All claims, as a list in Markdown."""
    def table(name: str) -> Dict[str, Any]:
        return json.loads((HERE / 'tables' / f'{name}.json').read_text())

    small = table('nofrost')
    return '\n'.join([
        *robustnorm(table('robustnorm')['rows']), *nofrost(small['norms'], small['attacks']), *apart(table('apart'))])
