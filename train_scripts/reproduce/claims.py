"""The papers' claims beside what all attacks at hand leave of them, from tables/*.json."""
import json
from statistics import mean
from typing import Any, Dict, List, Tuple

import yaml
from common import DATA, DIGITS_RECIPE, HERE, cells
from nofrost import PAPER, REPORT
from robustnorm import BATCH, PAPER_ATTACKS, STRONGEST
from scipy.stats import binomtest, ttest_rel

LEVEL = .05
ONE_RUN = 'One training run each: the verdict allows for the choice of test images alone.'


def verdict(better: float, worse: float, pvalue: float) -> str:
    """What a test of their difference says of the claim that one figure is above another."""
    return 'not settled' if pvalue >= LEVEL else 'holds' if better > worse else 'does not hold'


def sign_test(a: str, b: str) -> float:
    """p-value of the difference of two accuracies, from the outcomes of the same images."""
    pairs = list(zip(a, b, strict=True))
    wins, losses = pairs.count(('1', '0')), pairs.count(('0', '1'))
    return binomtest(wins, wins + losses).pvalue if wins + losses else 1.


def worst_case(found: Dict[str, Any]) -> Tuple[float, str]:
    """Accuracy in percent under all attacks, and which images withstand them all."""
    withstood = ''.join(map(min, zip(*found['outcomes'])))
    return 100 * withstood.count('1') / len(withstood), withstood


def worst_batches(found: Dict[str, Any]) -> Tuple[float, str]:
    """Accuracy in percent where an attacker picks one of the paper's attacks for each whole batch.

    Where predictions hang on the whole batch no attack can be picked for a single image. Also which images withstand.
    """
    outcomes = found['outcomes'][:len(PAPER_ATTACKS)]
    batches = ([o[i:i + BATCH] for o in outcomes] for i in range(0, len(outcomes[0]), BATCH))
    withstood = ''.join(min(batch, key=lambda o: o.count('1')) for batch in batches)
    return 100 * withstood.count('1') / len(withstood), withstood


def robustnorm(rows: List[Dict[str, Any]]) -> List[str]:
    """Claims of the RobustNorm paper, of every network and data set."""
    settings: Dict[str, Dict[str, Any]] = {}
    for r in rows:
        one = r['statistics']['population']
        name = (f"{r['network']}, {DATA[r['data']]}, {one['threat_model']}, {one['num_examples']:,} images, "
                f"seed {one['seed']}")
        settings.setdefault(name, {})[r['norm']] = r['statistics']

    lines = []
    for norm, title in (('batchnorm', 'BatchNorm'), ('robustnorm', 'RobustNorm')):
        lines.append(
            f"- **{title} is more robust with the batch's statistics than with tracked ones (RobustNorm, table 1).** "
            f"What the paper's attacks leave, the best of them for each batch of {BATCH}, and in brackets further "
            f"ones ({STRONGEST['batch']}; {STRONGEST['population']}), which cannot be put beside each other. The "
            'verdict takes images of a batch as independent:')
        for name, found in settings.items():
            (batch, a), (tracked, b) = (worst_batches(found[norm][mode]) for mode in ('batch', 'population'))
            last = [found[norm][mode]['accuracy'][-1] for mode in ('batch', 'population')]
            lines.append(
                f'  - {name}: {verdict(batch, tracked, sign_test(a, b))}, {batch:.1f} % ({last[0]:.1f} %) against '
                f'{tracked:.1f} % ({last[1]:.1f} %).')
    lines.append(
        '- **Without adversarial images RobustNorm is more robust than BatchNorm (RobustNorm).** What all attacks, '
        f'AutoAttack among them, leave with tracked statistics, and in brackets clean accuracy. {ONE_RUN}')
    for name, found in settings.items():
        (ours, a), (theirs, b) = (worst_case(found[norm]['population']) for norm in ('robustnorm', 'batchnorm'))
        clean = [found[norm]['population']['accuracy'][0] for norm in ('robustnorm', 'batchnorm')]
        lines.append(
            f'  - {name}: {verdict(ours, theirs, sign_test(a, b))}, {ours:.1f} % (of {clean[0]:.1f} %) against '
            f'{theirs:.1f} % (of {clean[1]:.1f} %).')
    return lines


def nofrost(rows: List[Dict[str, Any]]) -> List[str]:
    """Claims of the NoFrost paper."""
    found, epochs = {r['norm']: r for r in rows}, yaml.safe_load(DIGITS_RECIPE.read_text())['epochs']
    one, norm = found['none'], found['batchnorm2d']
    (ours, a), (theirs, b) = worst_case(one), worst_case(norm)
    clean, norm_clean = one['accuracy'][0], norm['accuracy'][0]
    clean_verdict = verdict(clean, norm_clean, sign_test(one['outcomes'][0], norm['outcomes'][0]))
    where = (f'{epochs} epochs, MNIST digits, {one["threat_model"]}, {one["num_examples"]:,} images, '
             f'seed {one["seed"]}. {ONE_RUN}')
    bn = PAPER['adversarial', 'BatchNorm']
    paper, released = PAPER['NoFrost', 'none'], PAPER['NoFrost, released weights', 'none']
    return [
        '- **Adversarial training gives a more robust network without BatchNorm (NoFrost).** '
        f'{verdict(ours, theirs, sign_test(a, b)).capitalize()} here: '
        f'all attacks, AutoAttack among them, leave {ours:.1f} % of a normalizer-free network and {theirs:.1f} % of '
        f'one with BatchNorm and convolutions of the same shapes; {where} The paper: {paper[1]} % against {bn[1]} % '
        f'under PGD (ResNet-50, ImageNet, Linf eps 8/255); of the released weights, {released[1]} % under PGD, '
        f'AutoAttack leaves {released[2]} %, as [others found]({REPORT}).',
        '- **It costs less clean accuracy without BatchNorm (NoFrost).** '
        f'{clean_verdict.capitalize()} here: {clean:.1f} % against {norm_clean:.1f} %; the same networks and images. '
        f'The paper: {paper[0]} % against {bn[0]} %.',
        '- **Margins are larger and the network is smoother without BatchNorm (NoFrost, table 5).** No test of it '
        f"here: mean margin {one['properties'][0]} against {norm['properties'][0]}, KL divergence within eps "
        f"{one['properties'][2]} against {norm['properties'][2]}, of which the smaller is the smoother; in brackets "
        'for how many images a boundary was met.']


def apart(tables: List[Dict[str, Any]]) -> List[str]:
    """Claims of the APART paper, of every data set."""
    lines = ['- **APART gains clean accuracy (APART).** Means over seeds. The verdict allows for seeds alone, the test '
             'images being the same:']
    for found in tables:
        plain, ours = found['top1']['standard'], found['top1']['apart']
        gains = ', '.join(cells((b - a for a, b in zip(plain, ours)), 2))
        lines.append(
            f"  - {found['setting']}: {verdict(mean(ours), mean(plain), ttest_rel(ours, plain).pvalue)}, "
            f'{mean(ours):.2f} % against {mean(plain):.2f} %, gains of {gains} points with seeds '
            f"{', '.join(map(str, found['seeds']))}.")
    return lines


def claims() -> str:
    """All claims, as a list in Markdown."""
    def table(name: str) -> Dict[str, Any]:
        return json.loads((HERE / 'tables' / f'{name}.json').read_text())

    return '\n'.join([
        *robustnorm(table('robustnorm')['rows']), *nofrost(table('nofrost')['norms']),
        *apart([table('apart_cifar10'), table('apart')])])
