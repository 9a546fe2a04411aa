"""Test the papers' claims under all attacks, with the figures in tables/*.json."""
import json
from itertools import zip_longest
from statistics import mean
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from common import DATA, HERE, as_printed, cells, table
from nofrost import ATTACKS, PAPER, PAPER_PROPERTIES, RELEASED, REPORT
from power import ATTACKS as POWER_ATTACKS
from robustnorm import BATCH, COLUMNS, PAPER_ATTACKS, STRONGEST, TABLE_3_BATCHNORM
from robustnorm import PAPER as ROBUSTNORM_PAPER
from scipy.stats import binomtest, ttest_ind, ttest_rel

LEVEL = .05
FEWEST_RUNS = 3


class Row(NamedTuple):
    """Two accuracies in one setting; the claim is that the first is higher.

    Attributes:
        setting: The setting of both.
        first, second: In percent.
        pvalue: Of a test of their difference.
        beside: Further cells.
        runs: Training runs for each of the two.
    """
    setting: str
    first: float
    second: float
    pvalue: float
    beside: Sequence[str] = ()
    runs: int = 1


class Claim(NamedTuple):
    """A claim of a paper.

    Attributes:
        title: The claim and its source.
        text: Explanation of the figures.
        header: Names of the columns from `first` to the last cell of `beside`.
        rows: One for each setting; none if there is no test.
    """
    title: str
    text: str
    header: Sequence[str] = ()
    rows: Sequence[Row] = ()


def significant(row: Row, tests: Sequence[Row]) -> bool:
    """Whether one of several tests shows a difference, corrected for their number (Holm)."""
    ordered = sorted(test.pvalue for test in tests)
    return all(p * (len(ordered) - i) < LEVEL for i, p in enumerate(ordered) if p <= row.pvalue)


def verdict(row: Row, tests: Sequence[Row]) -> str:
    """The verdict of one of several tests of claims."""
    differ = significant(row, tests)
    if row.runs < FEWEST_RUNS:
        return 'these networks differ' if differ else 'no difference shown'
    return 'not settled' if not differ else 'reproduced' if row.first > row.second else 'reversed'


def sign_test(a: str, b: str) -> float:
    """p-value of the difference of two accuracies, from the outcomes of the same images."""
    pairs = list(zip(a, b, strict=True))
    wins, losses = pairs.count(('1', '0')), pairs.count(('0', '1'))
    return binomtest(wins, wins + losses).pvalue if wins + losses else 1.


def compared(
        setting: str,
        first: Sequence[Tuple[float, str]],
        second: Sequence[Tuple[float, str]],
        beside: Sequence[str] = (),
        paired: bool = False,
) -> Row:
    """Two networks, given accuracy and outcomes of each of their training runs.

    Uses a t-test over the runs if there are enough, else a sign test over the images for the first run of each.

    Args:
        setting: The setting of both.
        first, second: Accuracy in percent and outcomes by run.
        beside: Further cells.
        paired: Whether to pair runs by position (paired t-test, else Welch's).
    """
    runs = min(len(first), len(second))
    if runs < FEWEST_RUNS:
        (ours, a), (theirs, b) = first[0], second[0]
        if not (a and b):
            raise ValueError(f'{setting}: a sign test needs the outcomes of all images, or {FEWEST_RUNS} runs')
        return Row(setting, ours, theirs, sign_test(a, b), beside)
    ours, theirs = ([accuracy for accuracy, _ in found] for found in (first, second))
    differences = [{round(a - b, 6) for a, b in zip(ours, theirs)}] if paired else [{*ours}, {*theirs}]
    # without spread there is nothing to test against
    pvalue = 1. if all(len(found) == 1 for found in differences) else (
        ttest_rel(ours, theirs) if paired else ttest_ind(ours, theirs, equal_var=False)).pvalue
    return Row(setting, mean(ours), mean(theirs), pvalue, beside, runs)


def worst_case(found: Dict[str, Any]) -> Tuple[float, str]:
    """Accuracy in percent under all attacks, and which images survive them all."""
    withstood = ''.join(map(min, zip(*found['outcomes'])))
    return 100 * withstood.count('1') / len(withstood), withstood


def worst_batches(found: Dict[str, Any]) -> Tuple[float, str]:
    """Accuracy in percent if an attacker picks one of the paper's attacks for each batch, and which images survive.

    If predictions depend on the whole batch, the attack cannot be picked per image.
    """
    outcomes = found['outcomes'][:len(PAPER_ATTACKS)]
    batches = ([o[i:i + BATCH] for o in outcomes] for i in range(0, len(outcomes[0]), BATCH))
    withstood = ''.join(min(batch, key=lambda o: o.count('1')) for batch in batches)
    return 100 * withstood.count('1') / len(withstood), withstood


def robustnorm(rows: List[Dict[str, Any]]) -> List[Claim]:
    """Claims of the RobustNorm paper, for every network and data set."""
    settings: Dict[Tuple[str, str, str], Dict[str, List[Dict[str, Any]]]] = {}
    for r in rows:
        one = next(iter(r['statistics'].values()))
        name = (f"{r['network']}, {DATA[r['data']]}, {one['threat_model']}, {one['num_examples']:,} images, "
                f"seed {one['seed']}")
        settings.setdefault((name, r['data'], r['network']), {}).setdefault(r['norm'], []).append(r['statistics'])

    def average(found: Sequence[Dict[str, Any]], mode: str, attack: int) -> float:
        return mean(run[mode]['accuracy'][attack] for run in found[:1 if len(found) < FEWEST_RUNS else None])

    def paper(data: str, network: str, norm: str, *modes: str) -> List[str]:
        found = (ROBUSTNORM_PAPER.get((data, network, norm, mode)) for mode in modes)
        return as_printed([figures and figures[COLUMNS['pgd20']] for figures in found])

    claims = []
    for norm, title, source in (('batchnorm', 'BatchNorm', 'RobustNorm, table 1'),
                                ('robustnorm', 'RobustNorm', 'not in the paper')):
        claims.append(Claim(
            f'{title} is more robust with batch statistics than with tracked ones ({source}).',
            f"Accuracy under the paper's attacks ({', '.join(PAPER_ATTACKS[1:])}), taking the strongest for each batch "
            f'of {BATCH} images. The next two columns show one more attack each, {STRONGEST["batch"]} with batch '
            f'statistics and {STRONGEST["population"]} with tracked ones; they are not comparable with each other. '
            "The paper's figures are of ResNet-20 or VGG-11 and under PGD. "
            f'With fewer than {FEWEST_RUNS} runs, the test treats the images of a batch as independent, although one '
            f'attack is chosen for all of them, and there are few batches. With {FEWEST_RUNS} or more, it is a paired '
            't-test.',
            ('batch %', 'tracked %', f'{STRONGEST["batch"]}, batch %', f'{STRONGEST["population"]}, tracked %',
             'the paper, batch %', 'the paper, tracked %'),
            [compared(
                name, *([worst_batches(run[mode]) for run in found[norm]] for mode in ('batch', 'population')),
                [*cells(average(found[norm], mode, -1) for mode in ('batch', 'population')),
                 *paper(data, network, norm, 'batch', 'population')], paired=True)
             for (name, data, network), found in settings.items()]))
    attacked = f"Accuracy under all attacks ({', '.join(PAPER_ATTACKS[1:])}, {STRONGEST['population']})"
    return [*claims, Claim(
        'Without adversarial images RobustNorm is more robust than BatchNorm (RobustNorm, figure 3).',
        f"{attacked}, tracked statistics. The paper's text has 70 against 22 % for ResNet-20 on CIFAR-10 and names no "
        'attack; its RobustNorm uses statistics of the batch.',
        ('RobustNorm %', 'BatchNorm %', 'RobustNorm, clean %', 'BatchNorm, clean %'),
        [compared(
            name, *([worst_case(run['population']) for run in found[norm]] for norm in ('robustnorm', 'batchnorm')),
            cells(average(found[norm], 'population', 0) for norm in ('robustnorm', 'batchnorm')))
         for (name, *_), found in settings.items()]),
        Claim(
            'Without adversarial images a network without BatchNorm is more robust than with it (RobustNorm, table 3).',
            f"{attacked}, tracked statistics. The paper's figures are of ResNet-20 on CIFAR-10, under PGD. Our network "
            'without normalization has standardized weights, as NF-ResNets do.',
            ('other %', 'BatchNorm %', 'other, clean %', 'BatchNorm, clean %', 'the paper, other %',
             'the paper, BatchNorm %'),
            [compared(
                f'{title}, {name}', [worst_case(run['-']) for run in found[norm]],
                [worst_case(run['population']) for run in found['batchnorm']],
                [*cells((average(found[norm], '-', 0), average(found['batchnorm'], 'population', 0))),
                 *paper('cifar10', 'resnet20', norm, '-'), str(TABLE_3_BATCHNORM)])
             for (name, *_), found in settings.items()
             for norm, title in (('none', 'no norm'), ('layernorm', 'LayerNorm')) if norm in found])]


def nofrost(rows: List[Dict[str, Any]], further: List[Dict[str, Any]]) -> List[Claim]:
    """Claims of the NoFrost paper, given the networks trained with seed 0 and with further seeds."""
    found = {r['norm']: r for r in rows}
    one, norm = found['none'], found['batchnorm2d']
    runs = [[first, *(r for r in further if r['norm'] == first['norm'])] for first in (one, norm)]
    bn, paper = (as_printed(PAPER['ResNet-50'][name]) for name in ('sat', 'nofrost'))
    images = f'{one["num_examples"]:,} images, seed {one["seed"]}'
    header = ('no norm %', 'BatchNorm %', 'the paper, no norm %', 'the paper, BatchNorm %')
    return [
        Claim(
            'Adversarial training gives a more robust network without BatchNorm (NoFrost).',
            f'Accuracy under all attacks ({", ".join(ATTACKS[1:])}) of a normalizer-free network and of one with '
            'BatchNorm and convolutions of the same shapes. Both were trained with one short recipe (λ = ½), tuned for '
            'neither. The network without BatchNorm has standardized weights and pre-activation blocks, so the two '
            'differ in more than the norm. The paper: AutoAttack, ResNet-50, ImageNet, Linf 8/255. Its released '
            f'weights have {RELEASED} % accuracy under AutoAttack, as [others found]({REPORT}).', header,
            [compared(
                f'MNIST digits, {one["threat_model"]}, {images}', *([*map(worst_case, network)] for network in runs),
                (paper[-1], bn[-1]))]),
        Claim(
            'After adversarial training clean accuracy is higher without BatchNorm (NoFrost).',
            'Clean accuracy of the same networks.', header,
            [compared(
                f'MNIST digits, {images}', *(
                    [(r['accuracy'][0], r['outcomes'][0]) for r in network] for network in runs), (paper[0], bn[0]))]),
        Claim(
            'Margins are larger and the network is smoother without BatchNorm (NoFrost, table 5).',
            "Not tested. For the networks with training seed 0 and the same images, the mean margin is "
            f"{one['properties'][0]} without and {norm['properties'][0]} with BatchNorm. Brackets give the number of "
            'images for which a boundary was found; if not for all, the mean is too low. The paper has '
            f"{PAPER_PROPERTIES['none'][0]:g} and {PAPER_PROPERTIES['batchnorm2d'][0]:g}. "
            f"The KL divergence within eps is {one['properties'][2]} without and {norm['properties'][2]} with "
            f"BatchNorm (the paper: {PAPER_PROPERTIES['none'][2]:g} and {PAPER_PROPERTIES['batchnorm2d'][2]:g}); "
            'smaller is smoother.')]


def apart(tables: List[Dict[str, Any]]) -> Claim:
    """The claim of the APART paper, for every data set."""
    rows = []
    for found in tables:
        top1, outcomes = found['top1'], found.get('outcomes', {})  # digits: no outcomes, but enough runs
        runs = ([*zip_longest(top1[o], outcomes.get(o, ()))] for o in ('apart', 'standard'))
        gains = cells((b - a for a, b in zip(top1['standard'], top1['apart'])), 2)
        rows.append(compared(
            found['setting'], *runs, (', '.join(gains), ', '.join(map(str, found['seeds']))), paired=True))
    return Claim(
        'APART gains clean accuracy (APART).',
        'Means over seeds.',
        ('APART %', 'plain %', 'gains', 'seeds'), rows)


def spread(rows: List[Dict[str, Any]]) -> str:
    """A sentence on how much runs of the same network with different seeds vary."""
    worst = {r['norm']: [s['accuracy'][-1] for s in r['seeds']] for r in rows}  # worst case: attacks ran in sequence
    name = max(worst, key=lambda norm: max(worst[norm]) - min(worst[norm]))
    one = rows[0]['seeds'][0]
    network = name.replace(', p = ', ', exponent p = ')
    return (f"ResNet-8 with {network}, trained {len(worst[name])} times on digits, with different seeds, reaches "
            f"{', '.join(cells(worst[name]))} % under {', '.join(POWER_ATTACKS[1:])} ({one['threat_model']}, "
            f"{one['num_examples']} images, seed {one['seed']}; [table](train_scripts/reproduce/tables/power.md)).")


def shown(claims: Sequence[Claim], seeds: str) -> str:
    """The claims in Markdown, with verdicts corrected for the number of tests (Holm)."""
    every = [row for claim in claims for row in claim.rows]
    enough = sum(row.runs >= FEWEST_RUNS for row in every)
    parts = [
        f'A claim is decided only if there are at least {FEWEST_RUNS} training runs of each network, since the '
        f'training seed can matter more than the norm. {seeds}',
        f'Tests with that many runs (t-tests over the runs; p is 1 without any spread): {enough} of '
        f'{len(every)}. They cover variation between training seeds, not between test images. ' + (
            'The others compare one run of each network and show only whether these two networks differ (sign tests '
            'over the images). ' if enough < len(every) else '') +
        f'The level is {LEVEL} for all {len(every)} tests together (Holm): the smallest p has to be below {LEVEL} / '
        f'{len(every)} = {LEVEL / len(every):.2g}, the next below {LEVEL} / {len(every) - 1}, and so on.']
    headings = [('Settled at this scale', ('reproduced', 'reversed'))]
    if enough < len(every):
        headings.append(('Pairs of networks that differ', ('these networks differ',)))
    for heading, found in headings:
        rows = [f'- "{claim.title}" {verdict(r, every).capitalize()}: {r.first:.2f} % against {r.second:.2f} % '
                f'({r.setting}).' for claim in claims for r in claim.rows if verdict(r, every) in found]
        parts += [f'{heading}: {len(rows) or "none"}.', *(['\n'.join(rows)] if rows else [])]
    for claim in claims:
        parts.append(f'**{claim.title}** {claim.text}')
        if claim.rows:
            parts.append(table(['setting', *claim.header, 'p', 'verdict'], [
                [r.setting, f'{r.first:.2f}', f'{r.second:.2f}', *r.beside, f'{r.pvalue:.2g}', verdict(r, every)]
                for r in claim.rows]))
    return '\n\n'.join(parts)


def claims() -> str:
    """All claims in Markdown."""
    def stored(name: str) -> Dict[str, Any]:
        return json.loads((HERE / 'tables' / f'{name}.json').read_text())

    nofrosts = stored('nofrost')
    return shown([
        *robustnorm(stored('robustnorm')['rows']), *nofrost(nofrosts['norms'], nofrosts['further_seeds']),
        apart([stored('apart_cifar10'), stored('apart')])], spread(stored('power')['rows']))
