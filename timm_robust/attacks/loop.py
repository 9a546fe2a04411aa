"""Engine of attacks on single images: a pool in which every image advances independently.

The batch is kept full, with each image at its own step: when an image is done, the next image, restart or target class
takes its place. No result depends on the other images of the batch.
"""
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Tuple

import torch

from ..devices import without_wait
from ..errors import InputError, check_at_least
from .ball import PIXELS
from .checks import (
    Classifier,
    check_batch,
    check_classes,
    check_finite,
    check_images,
    check_targets,
    error_rates,
    logits_of,
    pixels_of,
    usable,
)
from .context import attack_mode
from .losses import precise
from .noise import image_seeds
from .state import AttackResult, Batch, Call, State
from .threat import ThreatModel

if TYPE_CHECKING:
    from .base import Attack

__all__ = ['RUN_STRIDE', 'longest_gap', 'run_attack']

RUN_STRIDE = 1_000_003  # seed offset between runs, to avoid the seeds of neighbouring images
_INF = float('inf')


def longest_gap(device: torch.device) -> int:
    """Maximum number of steps between two checks of which images are done; each check forces a GPU sync."""
    return 1 if device.type == 'cpu' else 8


@dataclass
class _Work:
    """Images to attack.

    Attributes:
        x, y, soft, seeds: See `Batch`; one row per image.
        runs: Restarts, or restarts times targets; a run starts only if no earlier run of its image has succeeded.
        targets: Target classes, shape (N, T), or None; run r uses column r modulo T.
        budget: Maximum evaluations of each image, or None for the attack's own limit.
    """
    x: torch.Tensor
    y: torch.Tensor
    soft: Optional[torch.Tensor]
    seeds: torch.Tensor
    runs: int
    targets: Optional[torch.Tensor]
    budget: Optional[List[int]] = None

    def take(self, index: torch.Tensor, budget: Optional[List[int]]) -> '_Work':
        """The same work for the images at `index` only, with a new budget."""
        soft, targets = (None if t is None else t[index] for t in (self.soft, self.targets))
        return _Work(self.x[index], self.y[index], soft, self.seeds[index], self.runs, targets, budget)

    def batch(self, run: torch.Tensor, image: torch.Tensor) -> Batch:
        """The batch for the given runs and images, both as indices of shape (N,)."""
        batch = Batch(self.x[image], self.y[image], self.seeds[image] + run * RUN_STRIDE, run)
        if self.soft is not None:
            batch.soft = self.soft[image]
        if self.targets is not None:
            count = self.targets.shape[1]
            batch.restart, batch.target = run // count, self.targets[image, run % count]
        return batch


class _Pool:
    """A queue of runs, and the batch that processes them."""

    def __init__(self, attack: 'Attack', threat: ThreatModel, work: _Work, call: Call):
        count = len(work.x)
        self.attack, self.threat, self.x, self.work, self.budget = attack, threat, work.x, work, work.budget
        self.batch_size, self.progress = call.batch_size or count, call.progress
        self.queue = deque((run, image) for run in range(work.runs) for image in range(count))
        self.in_turn = attack.runs_in_turn(threat)
        self.best, self.score = work.x.clone(), [-_INF] * count
        self.queries, self.runs_left = [0] * count, [work.runs] * count
        # for each slot of the batch, the image it holds and its steps so far
        self.owners: List[int] = []
        self.ages: List[int] = []

    def _index(self, places: Sequence[int]) -> torch.Tensor:
        return without_wait(torch.tensor(places, dtype=torch.int64, device='cpu'), self.x.device)

    def _take(self, count: int, busy: Counter[int]) -> List[Tuple[int, int]]:
        """Up to `count` runs from the queue, skipping images that already fool the network or have no budget left.

        `busy` counts the runs in progress of each image; the new ones are added.
        """
        items: List[Tuple[int, int]] = []
        later: List[Tuple[int, int]] = []
        while len(items) < count and self.queue:
            item = self.queue.popleft()
            image = item[1]
            if self.score[image] < _INF and (self.budget is None or self.queries[image] < self.budget[image]):
                if self.in_turn and busy[image] >= max(self.work.runs - self.runs_left[image], 1):
                    later.append(item)
                else:
                    items.append(item)
                    busy[image] += 1
        self.queue.extendleft(reversed(later))
        return items

    def _start(self, items: List[Tuple[int, int]], slots: List[int]) -> Tuple[State, torch.Tensor]:
        """Initial state of some runs, and their slots as a tensor, with a single copy to the device."""
        runs, images = zip(*items)
        run, image, index = self._index([*runs, *images, *slots]).view(3, -1)
        return self.attack.start(self.work.batch(run, image), self.threat), index

    def _steps_to_next_look(self, gap: int) -> int:
        """Steps until the next check for finished images: at most `gap`, and not past the end of a run or budget."""
        length, cost = self.attack.run_length, self.attack.queries
        if length is not None:
            gap = min(gap, *(length - age for age in self.ages))
        if self.budget is not None:
            gap = min(gap, *(-(-(self.budget[i] - self.queries[i]) // cost) for i in self.owners))
        return max(gap, 1)

    def _advance(self, model: Callable, state: State, steps: int) -> None:
        for _ in range(steps):
            state.ages, self.ages = self.ages, [age + 1 for age in self.ages]
            state.ends = all(age == self.attack.run_length for age in self.ages)
            self.attack.step(model, state, self.threat)
        for image in self.owners:
            self.queries[image] += steps * self.attack.queries

    def _finish(self, state: State, slots: List[int], scores: List[float]) -> None:
        """Store the results of the runs in these slots."""
        winners, ended = {}, 0
        for slot in slots:
            image, score = self.owners[slot], scores[slot]
            self.runs_left[image] -= 1
            if self.score[image] < _INF:
                ended += score == _INF or not self.runs_left[image]
            if score > self.score[image]:
                self.score[image], winners[image] = score, slot
        if winners:
            images, places = self._index([*winners, *winners.values()]).view(2, -1)
            self.best[images] = state['best'][places]
        if self.progress is not None and ended:
            self.progress(ended)

    def _replace(self, state: State, finished: List[int]) -> State:
        """Refill slots with the next runs, and add slots up to the batch size, or drop them if there are none."""
        ended, count = set(finished), len(self.owners)
        busy = Counter(image for slot, image in enumerate(self.owners) if slot not in ended)
        items = self._take(len(finished) + self.batch_size - count, busy)
        left, added = set(finished[len(items):]), max(len(items) - len(finished), 0)
        if items:
            slots = [*finished, *range(count, count + added)][:len(items)]
            fresh, index = self._start(items, slots)
            self.owners, self.ages = [*self.owners, *[0] * added], [*self.ages, *[0] * added]
            for slot, (_, image) in zip(slots, items):
                self.owners[slot], self.ages[slot] = image, 0
            for name, rows in fresh.items():
                rows = rows.to(state[name].dtype)
                if added:
                    state[name] = torch.cat([state[name], rows[-added:]])
                state[name].index_copy_(0, index, rows)
        if left:
            kept = [slot for slot in range(len(self.owners)) if slot not in left]
            self.owners, self.ages = [self.owners[s] for s in kept], [self.ages[s] for s in kept]
            index = self._index(kept)
            state = State((name, rows[index]) for name, rows in state.items())
        return state

    def run(self, model: Callable) -> AttackResult:
        """Process the queue."""
        longest, gap = longest_gap(self.x.device), 1
        items = self._take(self.batch_size, Counter())
        self.owners, self.ages = [image for _, image in items], [0] * len(items)
        state = self._start(items, list(range(len(items))))[0] if items else State()
        while self.owners:
            self._advance(model, state, self._steps_to_next_look(gap))
            # most attacks that succeed do so in their first steps
            gap = min(2 * gap, longest)
            done, scores = torch.stack((state['done'].to(state['score'].dtype), state['score'])).tolist()
            if self.budget is not None:
                done = [flag or self.queries[i] >= self.budget[i] for flag, i in zip(done, self.owners)]
            finished = [slot for slot, flag in enumerate(done) if flag]
            self._finish(state, finished, scores)
            if self.work.runs > 1:
                # another run of the same image may have succeeded
                finished = [s for s, flag in enumerate(done) if flag or self.score[self.owners[s]] == _INF]
            if finished:
                state, gap = self._replace(state, finished), 1
        fools = [score > -_INF if self.attack.minimizes else score == _INF for score in self.score]
        return AttackResult(self.best, self._index(fools).bool(), self._index(self.queries))


def _logits_at(model: Classifier, x: torch.Tensor, index: torch.Tensor, batch_size: Optional[int]) -> torch.Tensor:
    """Logits of the images at `index`, copied one batch at a time to save memory."""
    return torch.cat([logits_of(model, x[part]) for part in index.split(batch_size or max(len(index), 1))])


def _verify(
        found: AttackResult,
        model: Classifier,
        fast_model: Classifier,
        y: torch.Tensor,
        batch_size: Optional[int],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Verify the results of a fast copy on the network, and update `found.fooled`.

    An image that fools the copy must also fool the network. On other images, the logits of both must agree.

    Returns:
        Indices of images that fool only the copy, and of images that fool neither but on which the logits differ.
    """
    claimed, resists = (flags.nonzero().squeeze(1) for flags in (found.fooled, ~found.fooled))
    holds = _logits_at(model, found.adversarial, claimed, batch_size).argmax(1) == y[claimed]
    found.fooled[claimed] = ~holds
    own, copied = (_logits_at(m, found.adversarial, resists, batch_size) for m in (model, fast_model))
    if own.shape != copied.shape:
        raise InputError(f'has {copied.shape[1]} classes, but the model has {own.shape[1]}', argument='fast_model')
    agree = (own - copied).abs().amax(1) <= fast_model.tolerance * own.abs().amax(1)
    found.fooled[resists] = own.argmax(1) != y[resists]
    return claimed[holds], resists[~agree & ~found.fooled[resists]]


def _search(
        attack: 'Attack',
        model: Classifier,
        fast_model: Optional[Classifier],
        threat: ThreatModel,
        work: _Work,
        call: Call,
) -> AttackResult:
    """Run the attack on the fast copy if there is one, and rerun it on the network for images that fail `_verify`."""
    found = _Pool(attack, threat, work, call).run(fast_model or model)
    if fast_model is None or not len(work.x):
        return found
    only_copy, disagreeing = _verify(found, model, fast_model, work.y, call.batch_size)
    found.queries[disagreeing] = 0
    again, budget = torch.cat([only_copy, disagreeing]).sort().values, None
    if attack.counts_queries and attack.run_length is not None:
        limit = work.runs * attack.run_length
        again = again[found.queries[again] < limit]
        budget = (limit - found.queries[again]).tolist()
    if len(again):
        found.put(again, _Pool(attack, threat, work.take(again, budget), replace(call, progress=None)).run(model))
    return found


def run_attack(
        attack: 'Attack',
        model: Any,
        images: torch.Tensor,
        labels: Any,
        threat: ThreatModel,
        call: Call,
) -> AttackResult:
    """Implementation of `Attack.run` for attacks on single images."""
    attack.check(threat)
    if not attack.image_by_image:
        raise InputError(
            'attacks whole batches, not single images', f'call {type(attack).__name__}().craft',
            argument='attack', value=str(attack))
    targets, fast_model, space = call.targets, call.fast_model, call.space or PIXELS
    if call.batch_size is not None:
        check_at_least('batch_size', call.batch_size)
    if targets is not None and not attack.steerable:
        raise InputError(f'{attack} cannot target a class', 'leave it out, or use pgd', argument='targets')
    highest = 0

    def check(logits: torch.Tensor) -> None:
        num_classes = logits.shape[1]
        attack.check(threat, num_classes)
        check_classes(checked, num_classes)
        check_finite(logits)
        if highest >= num_classes:
            raise InputError(f'contain class {highest}, but the model has {num_classes} classes', argument='targets')

    with attack_mode(model), attack_mode(fast_model):
        check_images(images, call.space, model)
        checked = check_batch(images, labels)
        x = pixels_of(images, call.space)
        classifier = Classifier(model, space, images.dtype, check)
        fast: Optional[Classifier] = None
        if fast_model is not None:
            if attack.needs_float32 and hasattr(fast_model, 'float32'):
                fast_model = fast_model.float32()
            fast = Classifier(fast_model, space, images.dtype, check)
        if targets is not None:
            targets = check_targets(images, targets)
            highest = int(targets.max()) if targets.numel() else 0
            if (targets == checked.labels[:, None]).any():
                raise InputError('contain the true class of an image', 'a target must be another class',
                                 argument='targets')
        # one pass of a randomized network is not conclusive
        looks = len(x) > 0 and attack.queries == 1 and not call.all_correct
        if len(x) and attack.targeted and targets is None:
            targets = attack.choose_targets(classifier, x, checked.labels, threat, call.batch_size)
        runs = getattr(attack, 'restarts', 1) * (1 if targets is None else targets.shape[1])
        seeds = image_seeds(call.seed, len(x), x.device)
        work = _Work(x, checked.labels, checked.soft, seeds, runs, targets)
        if looks:
            wrong = logits_of(classifier, x, call.batch_size).argmax(1) != checked.labels
            left = (~wrong).nonzero().squeeze(1)
            found = AttackResult(x.clone(), wrong, torch.zeros_like(checked.labels))
            if call.progress is not None:
                call.progress(len(x) - len(left))
            found.put(left, _search(attack, classifier, fast, threat, work.take(left, None), call))
        else:
            found = _search(attack, classifier, fast, threat, work, call)
        if attack.queries > 1 and len(x):
            # one noisy pass is not conclusive, so the loop never marks an image as fooled
            found.error_rates = error_rates(
                lambda: logits_of(classifier, found.adversarial, call.batch_size), checked.labels, attack.passes)
            found.fooled = found.error_rates >= .5
        if call.space is not None:
            # unchanged pixels stay bit-identical
            found.adversarial = torch.where(
                found.adversarial == x, precise(usable(images)), space.normalize(found.adversarial))
    return found
