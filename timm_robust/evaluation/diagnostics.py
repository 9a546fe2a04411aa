"""Checks that distinguish real from false robustness.

Accuracy under attack is an upper bound on robust accuracy, and a loose one if gradients mislead the attack. Each check
measures one symptom of false robustness.

Athalye et al. 2018, `Obfuscated Gradients Give a False Sense of Security` - https://arxiv.org/abs/1802.00420,
section 3.1; Carlini et al. 2019, `On Evaluating Adversarial Robustness` - https://arxiv.org/abs/1902.06705, section 5.
"""
import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Callable, List, Optional, Sequence, Union, cast

import torch
import torch.nn as nn
from tqdm import tqdm

from ..attacks import (
    APGD,
    APGDT,
    FGSM,
    PGD,
    Attack,
    Ball,
    GradientAttack,
    Square,
    ThreatModel,
    check_batch,
    check_images,
    cross_entropy,
    image_seeds,
    logit_gap,
    logits_of,
    parse_threat,
)
from ..devices import in_float64, naming_batch_size
from ..errors import InputError
from ..layers import has_batch_statistics
from ..precision import float32_proper
from .batch_dependence import (
    POINT,
    ROUNDING,
    adaptive_accuracy,
    compare_batches,
    even_batch_size,
    judge_adaptive,
    judge_batches,
)
from .facts import Finding
from .surface import directions, input_gradients, mean_loss, seeded

__all__ = ['diagnose']

_RESTARTS = 5
_UNBOUNDED_STEPS = 50


@dataclass(eq=False)
class _Case:
    """State shared by all checks; the fields are arguments of `diagnose`."""
    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    threat: ThreatModel
    batch_size: int
    seed: int
    surrogate: Optional[nn.Module]
    steps: Sequence[int]
    black_box_queries: int
    fast_model: Optional[Callable]

    def __post_init__(self) -> None:
        self.usual_steps = self.steps[len(self.steps) // 2]
        self.joint = has_batch_statistics(self.model)
        self.seeds = image_seeds(self.seed, len(self.x), self.x.device)
        self.logits = logits_of(self.model, self.x, self.batch_size)
        self.correct = self.logits.argmax(1) == self.y
        self.remaining = self.correct  # images that withstand all gradient attacks so far
        self.random = False

    def finding(self, name: str, verdict: str, text: str, **measured: object) -> Finding:
        return Finding(name, verdict, f'{text} ({len(self.x)} images, seed {self.seed}.)', {
            'num_examples': len(self.x),
            'num_correct': int(self.correct.sum()),
            'norm': self.threat.norm,
            'eps': self.threat.eps,
            'seed': self.seed,
            'batch_size': self.batch_size,
            **measured,
        })

    def percent(self, held: torch.Tensor) -> float:
        return 100. * int(held.sum()) / len(self.x)

    def holds(self, adv: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """Mask of the images in `among` that are still classified correctly, given their adversarial images."""
        held = logits_of(self.model, adv, self.batch_size).argmax(1) == self.y[among]
        return among.masked_scatter(among, held)

    def withstood(
            self,
            attack: Attack,
            among: torch.Tensor,
            threat: Optional[ThreatModel] = None,
    ) -> torch.Tensor:
        """Mask of the images in `among` that withstand an attack; with batch statistics, whole batches are attacked."""
        threat = threat or self.threat
        if self.joint:
            batches = zip(*(t.split(self.batch_size) for t in (self.x, self.y, self.seeds)))
            gradient_attack = cast(GradientAttack, attack)
            adv = torch.cat([
                gradient_attack.craft(self.model, x, y, threat, keep='most_fooled', seed=s.tolist())
                for x, y, s in batches])
            return among & self.holds(adv, torch.ones_like(among))
        if not among.any():
            return among
        return self.holds(
            attack(
                self.model, self.x[among], self.y[among], threat, seed=self.seeds[among].tolist(),
                batch_size=self.batch_size, fast_model=self.fast_model),
            among)


def _grade(count: int, total: int, alarm_above: float = .01) -> str:
    """'ok' for no image, 'alarm' for more than the share `alarm_above` of the images, else 'warning'."""
    return 'ok' if count == 0 else 'alarm' if count > alarm_above * total else 'warning'


def _randomness(case: _Case) -> Finding:
    again = logits_of(case.model, case.x, case.batch_size)
    largest = ((again - case.logits).abs().amax(1) / case.logits.abs().amax(1).clamp_min(1e-12)).max().item()
    changed = int((again.argmax(1) != case.logits.argmax(1)).sum())
    case.random = largest > ROUNDING
    text = f'Two passes differ by up to {largest:.2g} of the largest logit, and {changed} predictions change. '
    verdict = 'alarm' if case.random else 'warning' if largest else 'ok'
    text += {
        'ok': 'The network is deterministic.',
        'warning': 'A difference this small is rounding error.',
        'alarm': 'The network is randomized, so the gradient of a single pass is noisy: average over passes (eot_iter, '
                 "AutoAttack 'rand') before trusting any accuracy under attack.",
    }[verdict]
    return case.finding('randomness', verdict, text, passes=2, largest_change=largest, predictions_changed=changed)


def _zero_gradients(case: _Case) -> Finding:
    precise = in_float64(copy.deepcopy(case.model)), in_float64(case.x)
    images, entries = {}, {}
    for name, (model, x) in {'float32': (case.model, case.x), 'float64': precise}.items():
        zero = input_gradients(model, x, case.y.to(x.device), case.batch_size).cpu()[case.correct.cpu()].flatten(1) == 0
        images[name], entries[name] = int(zero.all(1).sum()), zero.double().mean().item()
    total = int(case.correct.sum())
    verdict = _grade(images['float32'], total)
    text = (
        f'The input gradient of the cross-entropy is exactly zero for {images["float32"]} of {total} correctly '
        f'classified images in float32 and {images["float64"]} in float64 (share of zero entries: '
        f'{entries["float32"]:.1%} and {entries["float64"]:.1%}). ')
    if images['float32'] > images['float64']:
        text += ('The cross-entropy saturates in float32: attacks on it get a zero gradient, although the true one is '
                 'not zero. Attack in float64, or with a loss on the logits (DLR, logit gap).')
    elif images['float32']:
        text += ('The network is not differentiable, masks its gradients or saturates even in float64: accuracy '
                 'under gradient attacks is meaningless here.')
    elif entries['float32'] > entries['float64'] + .1:
        verdict = 'warning'
        text += 'Gradients begin to vanish in float32: compare with attacks in float64 or on the logits.'
    else:
        text += 'Gradient attacks have a direction to follow.'
    return case.finding('zero_gradients', verdict, text, images=images, share_of_entries=entries)


def _saturated_logits(case: _Case) -> Finding:
    logits, labels = case.logits[case.correct].float(), case.y[case.correct]
    zero_loss = int((cross_entropy(logits, labels) == 0).sum())
    certain = int((logits.softmax(1).amax(1) == 1).sum())
    gap = -logit_gap(logits, labels).median().item()
    verdict = _grade(max(zero_loss, certain), len(labels), alarm_above=.1)
    text = (
        f'In float32 the cross-entropy is exactly 0 for {zero_loss} of {len(labels)} correctly classified images and '
        f'the probability exactly 1 for {certain}; the median gap between the two highest logits is {gap:.3g}. ')
    text += 'No image is saturated.' if verdict == 'ok' else (
        'An attack makes no progress where the loss is flat: use a loss that ignores the scale of the logits '
        '(APGD-DLR).')
    return case.finding(
        'saturated_logits', verdict, text, zero_loss=zero_loss, probability_one=certain, median_logit_gap=gap)


def _more_steps(case: _Case) -> Finding:
    runs = []
    for steps, restarts in [*((steps, 1) for steps in case.steps), (case.usual_steps, _RESTARTS)]:
        case.remaining = case.withstood(APGD(steps=steps, restarts=restarts), case.remaining)
        runs.append({'steps': steps, 'restarts': restarts, 'accuracy': case.percent(case.remaining)})
    last_drop = max(a['accuracy'] - b['accuracy'] for a, b in list(pairwise(runs))[-2:])
    verdict = 'warning' if last_drop > POINT else 'ok'
    found = ', '.join(f'{r["accuracy"]:.1f} % after {r["steps"]} steps' for r in runs)
    text = (
        f'Accuracy under APGD-CE at {case.threat}, each run on the images remaining after the previous one: {found} '
        f'and {_RESTARTS} restarts. ')
    text += (
        f'Accuracy still fell by {last_drop:.1f} points: the attack has not converged, increase steps and restarts.'
        if verdict == 'warning' else 'More steps and restarts barely lower it.')
    return case.finding('more_steps', verdict, text, runs=runs, last_drop=last_drop)


def _black_box(case: _Case) -> Finding:
    gradient_attacks = 'APGD-CE'
    # cross-entropy alone may follow a poor target class, and is flat where logits are large
    for name, attack, classes in (
            ('APGD-DLR', APGD(loss='dlr', steps=case.usual_steps), 3), ('APGD-T', APGDT(steps=case.usual_steps), 4)):
        if case.logits.shape[1] >= classes:
            case.remaining = case.withstood(attack, case.remaining)
            gradient_attacks += f', {name}'
    before = int(case.remaining.sum())
    broken = before - int(case.withstood(
        Square(query_limit=case.black_box_queries, rescale_schedule=True), case.remaining).sum())
    verdict = _grade(broken, len(case.x))
    text = (
        f'Square with {case.black_box_queries} queries at {case.threat} breaks {broken} of {before} images that '
        f'withstand {gradient_attacks} ({case.usual_steps} steps or more). ')
    text += 'Gradient attacks break every image that Square breaks.' if verdict == 'ok' else (
        'A gradient-free attack succeeds where gradient attacks fail: the gradients are misleading, and accuracy under '
        'gradient attacks overstates robustness.')
    return case.finding(
        'black_box', verdict, text, queries=case.black_box_queries, steps=case.usual_steps,
        gradient_attacks=gradient_attacks, left_by_gradients=before, broken=broken)


def _transfer(case: _Case) -> Finding:
    if case.surrogate is None:
        return case.finding(
            'transfer', 'skipped', 'No surrogate to craft images on: pass one, for example a network trained without '
            'the defence.')
    adv = case.x.clone()
    for index in case.remaining.nonzero().squeeze(1).split(case.batch_size):
        # the last iterate: an image that barely fools the surrogate rarely fools another network
        adv[index] = PGD(steps=case.usual_steps).craft(
            case.surrogate, case.x[index], case.y[index], case.threat, seed=case.seeds[index].tolist())
    before = int(case.remaining.sum())
    broken = before - int(case.holds(adv[case.remaining], case.remaining).sum())
    verdict = _grade(broken, len(case.x))
    text = (
        f'Images crafted on the surrogate (PGD, {case.usual_steps} steps, {case.threat}) break {broken} of {before} '
        'images that withstand gradient attacks on the network itself. ')
    text += 'The gradients of the network itself work better, as expected.' if verdict == 'ok' else (
        "Gradients of the surrogate succeed where the network's own gradients fail: these are masked.")
    return case.finding(
        'transfer', verdict, text, steps=case.usual_steps, left_by_gradients=before, broken=broken)


def _adaptive(case: _Case) -> Finding:
    settings = dict(few_steps=case.steps[0], steps=case.usual_steps, restarts=_RESTARTS)
    measured = adaptive_accuracy(
        case.model, case.x, case.y, case.threat, batch_size=case.batch_size, seed=case.seed, **settings)
    verdict, text = judge_adaptive(measured, case.threat, **settings)
    return case.finding('adaptive', verdict, text, **settings, **measured)


def _unbounded(case: _Case) -> Finding:
    threat = case.threat.unbounded(case.x.shape[1:])
    # no random start, which could fool a network without gradients by chance
    survivors = int(case.withstood(
        PGD(steps=_UNBOUNDED_STEPS, random_start=False), case.correct, threat).sum())
    total = int(case.correct.sum())
    text = f'Unbounded PGD ({threat}, {_UNBOUNDED_STEPS} steps) fails to break {survivors} of {total} images. '
    text += (
        'It can turn any image into any other, so it can only fail for lack of a usable gradient. Bounded attacks fail '
        'for the same reason.' if survivors else 'Accuracy falls to 0 %, as it must.')
    return case.finding(
        'unbounded', 'alarm' if survivors else 'ok', text, unbounded_eps=threat.eps, steps=_UNBOUNDED_STEPS,
        survivors=survivors)


def _noise(case: _Case) -> Finding:
    noisy = Ball(case.x, case.threat).random(case.seeds.tolist())
    clean = case.percent(case.correct)
    under_noise = case.percent(case.correct & case.holds(noisy, torch.ones_like(case.correct)))
    under_fgsm = case.percent(case.withstood(FGSM(), case.correct))
    text = f'Clean {clean:.1f} %, uniform noise {under_noise:.1f} %, FGSM {under_fgsm:.1f} % at {case.threat}. '
    if under_noise - under_fgsm > POINT:
        verdict = 'ok'
        text += 'The gradient beats a random direction.'
    elif under_noise < clean:
        verdict = 'alarm'
        text += 'The gradient is no better than a random direction: it is masked.'
    else:
        verdict = 'warning'
        text += 'Neither lowers accuracy: eps is small for this network, or its gradient is masked.'
    return case.finding('noise', verdict, text, clean=clean, noise=under_noise, fgsm=under_fgsm, steps=1)


def _single_step(case: _Case) -> Finding:
    steps = case.steps[0]
    single = case.correct & ~case.withstood(FGSM(), case.correct)
    only_single = int((single & case.withstood(PGD(steps=steps), case.correct)).sum())
    verdict = 'ok' if only_single <= 2 else _grade(only_single, len(case.x))
    text = f'Images broken by FGSM but not by PGD-{steps} at {case.threat}: {only_single}. '
    text += 'More steps help, as they should.' if verdict == 'ok' else (
        'One step beats many: the loss is far from linear around the image, a classic sign of masked gradients.')
    return case.finding('single_step', verdict, text, steps=steps, only_by_single_step=only_single)


def _rugged_loss(case: _Case) -> Finding:
    loss = partial(mean_loss, case.model, y=case.y, batch_size=case.batch_size)
    gradient, random = directions(case.model, case.x, case.y, case.threat, case.batch_size, case.seed)
    clean = loss(case.x)
    rise, random_rise = loss(case.x + gradient) - clean, loss(case.x + random) - clean
    ratio = rise / random_rise if random_rise > 0 else None
    verdict = 'ok' if rise > max(random_rise, 0) else 'warning'
    text = (
        f'At {case.threat} the mean cross-entropy ({clean:.3g} on clean images) rises by {rise:.3g} along the gradient '
        f'and by {random_rise:.3g} along random signs. ')
    text += 'The gradient increases the loss more than a random direction.' if verdict == 'ok' else (
        'A random direction is as good as the gradient: the loss surface is rugged or flat.')
    return case.finding(
        'loss_surface', verdict, text, clean_loss=clean, gradient_rise=rise, random_rise=random_rise, ratio=ratio)


def _batch_dependence(case: _Case) -> Finding:
    if case.random and not case.joint:
        return case.finding(
            'batch_dependence', 'skipped', 'The network is randomized: its predictions change even in the same batch.')
    # if all images were in one batch, shuffling would change nothing
    size = min(case.batch_size, max(len(case.x) // 2, 1))
    measured = compare_batches(case.model, case.x, case.y, batch_size=size, seed=case.seed + 1)
    verdict, text = judge_batches(measured, case.joint, size)
    return case.finding('batch_dependence', verdict, text, **measured, batch_size=size)


_GRADIENTS = (_randomness, _zero_gradients, _saturated_logits)
_PER_IMAGE = (_more_steps, _black_box, _transfer, _unbounded)
_REST = (_noise, _single_step, _rugged_loss, _batch_dependence)


@float32_proper()
def diagnose(
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: Union[str, ThreatModel],
        *,
        batch_size: int = 128,
        seed: int = 0,
        surrogate: Optional[nn.Module] = None,
        steps: Sequence[int] = (20, 100, 1000),
        black_box_queries: int = 1000,
        fast_model: Optional[Callable] = None,
        progress: Optional[bool] = None,
) -> List[Finding]:
    """Look for signs that a network's robust accuracy is an artefact of the attack.

    Attacks that restart single images are not defined for a network that normalizes by the batch: there, a joint attack
    on fixed, shuffled batches ('adaptive') replaces 'more_steps', 'black_box', 'transfer' and 'unbounded'.

    Args:
        model: Maps pixels in [0, 1], shape (N, C, H, W), to logits (N, K); in eval mode. The checks work on a copy.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1]; 100 to 200 are enough.
        y: True class indices, shape (N,).
        threat: Norm and eps, or a string such as 'Linf 8/255'.
        batch_size: Largest batch size.
        seed: Seed of the batches, of every attack and of the network's own noise; the same seed gives the same
            findings on a CPU.
        surrogate: Another network to craft images on.
        steps: Steps of APGD-CE, ascending. Other attacks take the middle number, plain PGD the first.
        black_box_queries: Queries of Square for each image.
        fast_model: Faster copy of the network to attack, see `Attack.run`.
        progress: Show a progress bar; by default only on a terminal.

    Returns:
        Findings, always in the same order.

    Raises:
        InputError: If the network does not return finite logits (N, K), pixels are not in [0, 1], a label is not a
            class of the network, or no image is classified correctly.
    """
    threat = parse_threat(threat)
    check_images(x, None, model)
    y = check_batch(x, y).labels
    model = copy.deepcopy(model).requires_grad_(False)
    if model.training:
        model.eval()
    order = torch.randperm(len(x), generator=torch.Generator('cpu').manual_seed(seed), device='cpu')
    batch_size = even_batch_size(len(x), batch_size) if len(x) else batch_size
    findings = []
    with seeded(seed, x.device), naming_batch_size(batch_size):
        case = _Case(
            model, x[order].detach(), y[order], threat, batch_size, seed, surrogate, steps, black_box_queries,
            fast_model)
        if (y >= case.logits.shape[1]).any():
            raise InputError(f'y has label {y.max().item()} but the model has {case.logits.shape[1]} classes')
        if not case.correct.any():
            raise InputError('model classifies no image of the sample correctly: there is no robustness to diagnose')
        checks = _GRADIENTS + ((_adaptive,) if case.joint else _PER_IMAGE) + _REST
        bar = tqdm(checks, unit='check', disable=None if progress is None else not progress)
        for check in bar:
            bar.set_postfix_str(check.__name__.strip('_'))
            findings.append(check(case))
    return findings
