"""Accuracy under attack, image by image.

Every verdict comes from a plain float32 forward pass on the image that the attack returned. That image must be within
eps of the clean one and within [0, 1].
"""
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Callable, Iterable, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
import torch.nn as nn
from tqdm import tqdm

from ..attacks import Attack, Clean, ThreatModel, error_rates, logits_of
from ..devices import halving, in_float64
from ..errors import InputError
from ..layers import has_batch_statistics
from ..precision import float32_proper
from .journal import Journal, Measured, batch_hashes, image_hashes
from .outcome import AttackOutcome
from .plan import Plan, effort, threat_facts
from .probes import Probe, probe

__all__ = ['Batches', 'Runner', 'assemble', 'index_seeds']

# float32 cannot hold clean + eps exactly: near 1 a pixel is off by 6e-8, and the comparison adds as much
_FLOAT32_SLACK = 1.2e-7
_MIN_FOR_CHANCE = 50
_FEW = .01  # share of images that another device may classify differently
_BATCHES_IN_POOL = 8

T = TypeVar('T')

_logger = logging.getLogger(__name__)

Batches = Iterable[Tuple[torch.Tensor, torch.Tensor]]


def index_seeds(seed: int, indices: Sequence[int]) -> List[int]:
    """A seed for each image of a data set, independent of its batch."""
    return [(seed * 0x9E3779B1 + i) % (1 << 62) for i in indices]


def assemble(plan: Plan, journal: Journal, indices: Sequence[int], num_classes: int) -> Tuple[AttackOutcome, ...]:
    """The outcome of each attack, for images in the order of `indices`."""
    clean = [journal.correct[plan.clean_key][i] for i in indices]
    remaining, chosen, found = clean, set(indices), []
    for attack in plan.attacks:
        members = plan.members(attack, num_classes)
        keys = [key for key, _ in members]
        changes = not isinstance(attack, Clean)
        correct: List[Optional[bool]] = []
        for i, right, remains in zip(indices, clean, remaining):
            skipped = plan.worst_case and right and not remains and changes
            # members of an ensemble after the one that succeeded have no outcome
            correct.append(None if skipped else right and all(journal.correct[key][i] for key in keys))
        remaining = [remains and right is not False for remains, right in zip(remaining, correct)]
        rates: List[Optional[float]] = []
        if plan.passes > 1:
            rates = [None if right is None else max(
                journal.measured[key].get(i, Measured()).error_rate or 0. for key in (plan.clean_key, *keys))
                for i, right in zip(indices, correct)]
        distances: List[Optional[float]] = []
        if attack.minimizes:
            measured = journal.measured[keys[0]]
            distances = [measured.get(i, Measured()).distance if right else 0. for i, right in zip(indices, clean)]
        attacked = len({i for key in keys for i in journal.correct[key]} & chosen)
        found.append(AttackOutcome(
            str(attack), attack.to_dict(), threat_facts(plan.threat) if changes else None, effort(attack),
            tuple(correct), attacked, round(sum(journal.seconds[key] for key in keys or [plan.clean_key]), 3),
            tuple(m.to_dict() for _, m in members) if len(members) > 1 else (), plan.passes, tuple(rates),
            tuple(distances)))
    return tuple(found)


def _assert_allowed(adv: torch.Tensor, x: torch.Tensor, threat: ThreatModel, name: str, batch_size: int) -> None:
    """Assert that adversarial images are within the threat model, up to float32 rounding."""
    batches = zip(adv.split(batch_size), x.split(batch_size))
    size = torch.cat([threat.size(in_float64(a) - in_float64(b)) for a, b in batches]).max()
    slack = _FLOAT32_SLACK * threat.unbounded(x.shape[1:]).eps
    if not (size <= threat.eps + slack and adv.min() >= 0 and adv.max() <= 1):
        raise RuntimeError(
            f'{name} left its threat model: perturbation {size:.8g} for eps {threat.eps:.8g}, '
            f'pixels in [{adv.min():.8g}, {adv.max():.8g}]')


def _joined(batches: Batches, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Join batches on a device; a separate function, so that no reference to the single batches remains."""
    images, labels = zip(*batches)
    return torch.cat(images).to(device), torch.cat(labels).to(device)


def _refuse_chance(correct: int, count: int, num_classes: int) -> None:
    """Refuse a network that is not better than chance by three standard deviations."""
    chance = 1 / num_classes
    limit = count * chance + 3 * math.sqrt(count * chance * (1 - chance))
    if count >= _MIN_FOR_CHANCE and correct <= limit:
        raise InputError(
            f'classifies {100 * correct / count:.1f} % of the first {count} clean images correctly, no better '
            f'than guessing among {num_classes} classes: its classes do not match the data, or its weights are '
            'untrained', 'pass `allow_chance=True` to evaluate it anyway', argument='model')


@dataclass
class _Pool:
    """Images that are attacked together."""
    x: torch.Tensor
    labels: torch.Tensor
    indices: List[int]
    hashes: List[str]


@dataclass
class Runner:
    """Attacks a network and records which images withstand the attacks.

    Images are attacked in pools of several batches, so that batches stay full as fooled images drop out. Noise is
    seeded by image, so that neither batch size nor number of processes changes it. For a network with batch statistics,
    each batch of the loader is attacked as a whole, since a prediction holds only within its batch.

    Attributes:
        model: Maps pixels in [0, 1], shape (N, C, H, W), to logits; in eval mode.
        plan: The attacks.
        journal: Stores outcomes; those it already holds are not computed again.
        num_classes: Classes of the network.
        batch_size: Batch size; halved when memory runs out.
        device: Device of the network.
        seed: Seed of the noise.
        fast_model: Faster copy of the network to attack, see `Attack.run`.
        surrogate: Network to craft on instead of the model, for a black-box transfer attack.
        allow_chance: Attack a network even if it is no better than chance on the first pool.
        progress: Show a progress bar; by default only on a terminal. Without a terminal, a log line is written for each
            pool.
    """
    model: nn.Module
    plan: Plan
    journal: Journal
    num_classes: int
    batch_size: int
    device: torch.device
    seed: int = 0
    fast_model: Optional[Callable] = None
    surrogate: Optional[nn.Module] = None
    allow_chance: bool = True
    progress: Optional[bool] = None

    def __post_init__(self) -> None:
        if self.model.training:
            raise InputError('is in training mode', 'call model.eval() before an evaluation', argument='model')
        self.batch_dependent = has_batch_statistics(self.model)
        self.fixed_size = self.batch_dependent or self.surrogate is not None and has_batch_statistics(self.surrogate)
        self.probe: Optional[Probe] = None
        self._bar: Optional[tqdm] = None

    def run(self, batches: Batches, indices: Sequence[int]) -> None:
        """Attack images.

        Args:
            batches: Pixels and labels, in the order of `indices`.
            indices: Index of each image in the data set.

        Raises:
            InputError: If pixels are not in [0, 1], labels do not fit, logits are not finite, or an attack is not
                defined for the network.
        """
        self.plan.check(self.num_classes, self.batch_dependent, self.surrogate is not None)
        done, began = 0, time.perf_counter()
        steps = sum(len(self.plan.members(a, self.num_classes)) for a in self.plan.attacks)
        hidden = None if self.progress is None else not self.progress
        with tqdm(total=len(indices) * steps, unit='img', disable=hidden) as bar:
            self._bar = bar
            for x, labels in self._pools(batches):
                own = list(indices[done:done + len(x)])
                self._attack_pool(x, labels, own, first=done == 0)
                done += len(x)
                self._show_progress(indices[:done], time.perf_counter() - began, len(indices))
                del x, labels  # before the next pool is joined
        self.journal.say_changed()

    def _pools(self, batches: Batches) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        stream = iter(batches)
        count = 1 if self.batch_dependent else _BATCHES_IN_POOL
        for batch in stream:
            yield _joined([batch, *islice(stream, count - 1)], self.device)

    def _show_progress(self, indices: Sequence[int], seconds: float, total: int) -> None:
        assert self._bar is not None
        found = assemble(self.plan, self.journal, indices, self.num_classes)
        remaining = [True] * len(indices)
        texts = []
        for outcome in found:
            remaining = [s and c is not False for s, c in zip(remaining, outcome.correct)]
            accuracy = 100 * sum(remaining) / len(remaining) if outcome.accuracy is None else outcome.accuracy
            texts.append(f'{outcome.name} {accuracy:.1f}%')
        accuracies = '  '.join(texts)
        self._bar.set_postfix_str(accuracies)
        if self._bar.disable and self.progress is None:
            left = seconds * (total / len(indices) - 1)
            _logger.info(f'{len(indices)} of {total} images: {accuracies}, {tqdm.format_interval(left)} left')

    def logits(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Full float32 logits, which decide whether images are classified correctly; checks the labels too."""
        try:
            with float32_proper():
                logits = self._fitting(lambda size: logits_of(self.model, x, len(x) if self.batch_dependent else size))
        except AssertionError as error:  # of timm's layers
            raise InputError(f'does not take images of shape {tuple(x.shape[1:])} ({error})', 'resize them',
                             argument='model') from error
        if labels.max() >= logits.shape[1]:
            raise InputError(
                f'hold class {labels.max().item()}, but the network has {logits.shape[1]} classes',
                'choose a network with these classes', argument='labels')
        return logits

    def error_rates(self, x: torch.Tensor, labels: torch.Tensor) -> List[float]:
        """Share of the plan's passes that misclassify each image."""
        found: List[float] = error_rates(lambda: self.logits(x, labels), labels, self.plan.passes).tolist()
        return found

    def _fitting(self, work: Callable[[int], T]) -> T:
        result, self.batch_size = halving(work, self.batch_size, self.fixed_size)
        return result

    def _attack_pool(self, x: torch.Tensor, labels: torch.Tensor, indices: List[int], first: bool) -> None:
        if x.min() < 0 or x.max() > 1:
            raise InputError(
                f'pixels span [{x.min().item():.3g}, {x.max().item():.3g}]', 'they must be in [0, 1], without '
                'normalization', argument='data')
        hashes = image_hashes(x, labels)
        pool = _Pool(x, labels, indices, batch_hashes(hashes) if self.batch_dependent else hashes)
        self.journal.labels.update(zip(indices, labels.tolist()))
        self.journal.hashes.update(zip(indices, hashes))
        key = self.plan.clean_key
        start = time.perf_counter()
        rates = self.error_rates(x, labels)
        right = [rate < .5 for rate in rates]
        if first:
            gradients = self.surrogate is None and any(not a.counts_queries for a in self.plan.real_attacks)
            self.probe = self._fitting(lambda size: probe(
                self.model, x, labels, batch_size=size, batch_dependent=self.batch_dependent, gradients=gradients))
        if first and self.plan.real_attacks and not self.allow_chance:
            _refuse_chance(sum(right), len(right), self.num_classes)
        self.journal.take(key, indices, pool.hashes)
        new = [k for k, i in enumerate(indices) if i not in self.journal.correct[key]]
        if new:
            self._record(key, pool, new, [rates[k] for k in new], start)
        correct = remaining = [self.journal.correct[key][i] for i in indices]
        # after resuming on another device, a few images may be classified differently
        if self.plan.passes == 1 and sum(a != b for a, b in zip(correct, right)) > 1 + _FEW * len(right):
            raise InputError(
                'classifies images differently from the evaluation that is resumed', 'its code may have changed, or it '
                'is randomized: choose another output folder', argument='model')
        for attack in self.plan.attacks:
            withstood = list(remaining if self.plan.worst_case else correct)
            for key, member in self.plan.members(attack, self.num_classes):
                self._run(key, member, pool, withstood)
            remaining = [a and b for a, b in zip(remaining, withstood)]

    def _record(
            self,
            key: str,
            pool: _Pool,
            rows: Sequence[int],
            rates: Sequence[float],
            start: float,
            distances: Sequence[Optional[float]] = (),
    ) -> None:
        distances, several = distances or [None] * len(rows), self.plan.passes > 1
        self.journal.record(
            key, [pool.indices[k] for k in rows], [pool.hashes[k] for k in rows],
            [rate < .5 or (d or 0.) > self.plan.threat.eps for rate, d in zip(rates, distances)],
            time.perf_counter() - start, [Measured(r if several else None, d) for r, d in zip(rates, distances)])

    def _run(self, key: str, attack: Attack, pool: _Pool, withstood: List[bool]) -> None:
        assert self._bar is not None
        self._bar.set_description_str(key)
        end = self._bar.n + len(pool.x)
        self.journal.take(key, pool.indices, pool.hashes)
        known = self.journal.correct[key]
        todo = [k for k, remains in enumerate(withstood) if remains and pool.indices[k] not in known]
        if self.batch_dependent and todo:
            todo = list(range(len(pool.x)))
        if todo:
            start = time.perf_counter()
            x, labels, threat = pool.x, pool.labels, self.plan.threat
            if len(todo) < len(x):  # no copy if the whole pool is attacked
                rows = torch.tensor(todo, device=x.device)
                x, labels = x[rows], labels[rows]
            if attack.minimizes:
                threat = threat.unbounded(x.shape[1:])
            adv = self.craft(attack, x, labels, [pool.indices[k] for k in todo], threat)
            _assert_allowed(adv, x, threat, key, self.batch_size)
            rates = self.error_rates(adv, labels)
            distances: List[Optional[float]] = []
            if attack.minimizes:
                sizes = torch.cat([threat.size(in_float64(a) - in_float64(b)) for a, b in zip(
                    adv.split(self.batch_size), x.split(self.batch_size))]).tolist()
                distances = [size if rate >= .5 else None for size, rate in zip(sizes, rates)]
            self._record(key, pool, todo, rates, start, distances)
        for k, remains in enumerate(withstood):
            withstood[k] = remains and known[pool.indices[k]]
        self._bar.update(end - self._bar.n)

    def craft(
            self,
            attack: Attack,
            x: torch.Tensor,
            labels: torch.Tensor,
            indices: Sequence[int],
            threat: Optional[ThreatModel] = None,
    ) -> torch.Tensor:
        """Craft adversarial images with noise seeded by data set index, by default within the plan's threat model."""
        seeds = index_seeds(self.seed, indices)
        return self._fitting(lambda size: self._craft(attack, x, labels, seeds, size, threat or self.plan.threat))

    def _craft(
            self,
            attack: Attack,
            x: torch.Tensor,
            labels: torch.Tensor,
            seeds: List[int],
            batch_size: int,
            threat: ThreatModel,
    ) -> torch.Tensor:
        if not self.batch_dependent and self.surrogate is None:
            # the attack fills its batches from the pool
            progress = self._bar.update if self._bar is not None else None
            with float32_proper() if self.fast_model is None else nullcontext():
                return attack(
                    self.model, x, labels, threat, seed=seeds, batch_size=batch_size,
                    fast_model=self.fast_model, progress=progress, all_correct=True)
        # With batch statistics, the best iterates of several images were never evaluated together in one batch. With a
        # surrogate, an attack that stops once the surrogate is fooled is weak against the network itself.
        with float32_proper():
            parts = torch.arange(len(x), device=x.device).split(batch_size)
            return torch.cat([
                attack.craft(  # type: ignore[attr-defined]
                    self.surrogate or self.model, x[part], labels[part], threat,
                    seed=[seeds[k] for k in part.tolist()]) for part in parts])
