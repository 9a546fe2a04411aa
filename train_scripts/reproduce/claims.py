"""The papers' claims beside what all attacks at hand leave of them, from tables/*.json."""
import json
from statistics import mean
from typing import Any, Dict, List, Optional, Tuple

import yaml
from common import DATA, DIGITS_RECIPE, HERE, cells
from nofrost import PAPER, REPORT
from robustnorm import PAPER_ATTACKS, STRONGEST
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


def worst_case(found: Dict[str, Any], attacks: Optional[int] = None) -> Tuple[float, str]:
    """Accuracy in percent under all attacks, or the first of them, and which images withstand them all."""
    withstood = ''.join(map(min, zip(*found['outcomes'][:attacks])))
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
            "What the paper's attacks leave in whole batches of 100, and in brackets further ones "
            f"({STRONGEST['batch']}; {STRONGEST['population']}), which cannot be put beside each other:")
        for name, found in settings.items():
            (batch, a), (tracked, b) = (
                worst_case(found[norm][mode], len(PAPER_ATTACKS)) for mode in ('batch', 'population'))
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
    paper, released = PAPER['NoFrost', 'none'], PAPER['NoFrost, released weights', 'none']
    return [
        '- **Adversarial training gives a more robust network without BatchNorm (NoFrost).** '
        f'{verdict(ours, theirs, sign_test(a, b)).capitalize()} here: '
        f'all attacks, AutoAttack among them, leave {ours:.1f} % of a normalizer-free network and {theirs:.1f} % of '
        f'one with BatchNorm and convolutions of the same shapes, of {one["accuracy"][0]:.1f} % and '
        f'{norm["accuracy"][0]:.1f} % clean; {epochs} epochs, MNIST digits, {one["threat_model"]}, '
        f'{one["num_examples"]:,} images, seed {one["seed"]}. {ONE_RUN} The paper: {paper[1]} % against '
        f"{PAPER['adversarial', 'BatchNorm'][1]} % under PGD (ResNet-50, ImageNet, Linf eps 8/255); of the released "
        f'weights, {released[1]} % under PGD, AutoAttack leaves {released[2]} %, as [others found]({REPORT}).']


def apart(content: Dict[str, Any]) -> List[str]:
    """Claims of the APART paper."""
    plain, ours = content['top1']['standard'], content['top1']['apart']
    gains = ', '.join(cells((b - a for a, b in zip(plain, ours)), 2))
    return [
        '- **APART gains clean accuracy (APART).** '
        f'{verdict(mean(ours), mean(plain), ttest_rel(ours, plain).pvalue).capitalize()} here: '
        f"{mean(ours):.2f} % against {mean(plain):.2f} %, gains of {gains} points with seeds "
        f"{', '.join(map(str, content['seeds']))}; ResNet-8, {content['epochs']} epochs, 1,000 MNIST digits. "
        'The verdict allows for seeds alone, the test images being the same.']


def claims() -> str:
    """All claims, as a list in Markdown."""
    def table(name: str) -> Dict[str, Any]:
        return json.loads((HERE / 'tables' / f'{name}.json').read_text())

    return '\n'.join([
        *robustnorm(table('robustnorm')['rows']), *nofrost(table('nofrost')['norms']), *apart(table('apart'))])
