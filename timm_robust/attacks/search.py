"""One loop for all attacks of an evaluation: a pool of images of which every one advances on its own.

An attack is a `Search`: it starts some images and advances them by one evaluation of the network. `search` keeps a
batch full of images at whatever step each of them is: an image that is fooled leaves at once, and the next image, the
next restart or the next target class takes its place. No image's outcome depends on its neighbours.
"""
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple

import torch

from ..errors import InputError
from .context import crafting
from .losses import hard_labels
from .noise import image_seeds
from .threat import InputSpace, Seed

__all__ = [
    'Found',
    'Jobs',
    'Search',
    'State',
    'check_images',
    'keep_best',
    'logits_of',
    'run_search',
    'search',
    'wrong_classes',
]

State = Dict[str, torch.Tensor]

RUN_STRIDE = 1_000_003  # keeps the seeds of runs apart from those of neighbouring images
_PIXEL_SLACK = 1e-5
_SPACE_SLACK = 1e-2  # half and bfloat16 cannot undo a normalization to the last digit
# Asking a GPU which images are fooled makes it wait, so it is asked once in so many steps.
_STEPS_PER_CHECK_ON_GPU = 8


@dataclass
class Jobs:
    """Images to start on.

    Attributes:
        x: Clean images, shape (N, C, H, W), pixels in [0, 1].
        y: Labels, one row per image.
        seeds: One seed per image and run, int64.
        restart: Number of the restart, 0 for the first run, shape (N,).
        target: Class to steer towards, shape (N,), or None.
    """
    x: torch.Tensor
    y: torch.Tensor
    seeds: torch.Tensor
    restart: torch.Tensor
    target: Optional[torch.Tensor] = None

    def state(self, **rows: torch.Tensor) -> State:
        """A new state: what every search has, the target class if there is one, and `rows`."""
        count = dict(size=(len(self.x),), device=self.x.device)
        state = {
            'x': self.x,
            'y': self.y,
            'seed': self.seeds,
            'best': self.x.clone(),
            'rank': torch.full(fill_value=float('-inf'), dtype=self.x.dtype, **count),
            'step': torch.zeros(dtype=torch.int64, **count),
            'done': torch.zeros(dtype=torch.bool, **count),
            **rows,
        }
        if self.target is not None:
            state['target'] = self.target
        return state


class Search:
    """An attack as a machine that advances each image of a batch by one evaluation of the network at a time.

    A state is a dict of tensors whose first dimension is the batch. Every state holds `best` (the image to return,
    frozen once it fools), `rank` (float: how good `best` is, infinite once it fools and is allowed) and `done` (bool).

    Attributes:
        queries: Evaluations of the network per image in one step.
        query_limit: Evaluations an image may spend, if they are the attack's budget.
        needs_float32: A faster copy in lower precision would make the attack weaker.
    """
    queries = 1
    query_limit: Optional[int] = None
    needs_float32 = False

    def start(self, jobs: Jobs) -> State:
        """State of images that have not been advanced yet."""
        raise NotImplementedError

    def step(self, model: Callable, state: State) -> None:
        """Advance every image by one evaluation, in place."""
        raise NotImplementedError


@dataclass
class Found:
    """What a search came to.

    Attributes:
        adv: Best image of each clean one, shape (N, C, H, W).
        fooled: Whether it fools the network, shape (N,).
        queries: Evaluations spent on each image, shape (N,); a last look at what was found is not counted.
    """
    adv: torch.Tensor
    fooled: torch.Tensor
    queries: torch.Tensor


def keep_best(state: State, point: torch.Tensor, fooled: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Keep points that fool, from the first on, and otherwise those of the highest rank; returns what was better.

    What an image does after it is done, while nobody has looked yet, counts for nothing.
    """
    rank = torch.where(fooled, float('inf'), rank.to(state['rank'].dtype))
    better = (rank > state['rank']) & ~state['done']
    state['best'] = torch.where(better.view(-1, 1, 1, 1), point, state['best'])
    state['rank'] = torch.where(better, rank, state['rank'])
    return better


def wrong_classes(logits: torch.Tensor, y: torch.Tensor, num_targets: Optional[int]) -> torch.Tensor:
    """The likeliest wrong classes by descending logit, shape (N, num_targets).

    Args:
        logits: Of the clean images, shape (N, K).
        y: True classes, shape (N,).
        num_targets: Number of target classes; by default 9, or all wrong classes if there are fewer.

    Raises:
        InputError: If there are fewer than `num_targets` wrong classes.
    """
    available = logits.shape[1] - 1
    num_targets = min(9, available) if num_targets is None else num_targets
    if not 1 <= num_targets <= available:
        raise InputError(
            f'num_targets={num_targets} must be between 1 and {available}, the number of wrong classes')
    return logits.scatter(1, y[:, None], float('-inf')).topk(num_targets, dim=1).indices


def search(
        attack: Search,
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        seeds: torch.Tensor,
        *,
        runs: int = 1,
        targets: Optional[torch.Tensor] = None,
        batch_size: Optional[int] = None,
        budget: Optional[List[int]] = None,
        progress: Optional[Callable[[int], None]] = None,
) -> Found:
    """Attack every image, `runs` times at most, with full batches.

    Args:
        attack: The attack.
        model: Maps pixels (N, C, H, W) to logits (N, K).
        x: Clean images, pixels in [0, 1].
        y: Labels, one row per image.
        seeds: One seed per image, int64.
        runs: Restarts, or restarts times targets; a run starts only while its image resists.
        targets: Target classes, shape (N, T); run r steers towards column r modulo T.
        batch_size: Images in the network at once, all by default.
        budget: Evaluations each image may spend, if the attack's own limit is not to hold.
        progress: Told how many images have come to their end since it was last told.
    """
    best, rank, runs_left = x.clone(), [float('-inf')] * len(x), [runs] * len(x)
    queries = Counter()
    queue = ((run, image) for run in range(runs) for image in range(len(x)))
    batch_size = batch_size or len(x)
    every = 1 if x.device.type == 'cpu' or attack.query_limit else _STEPS_PER_CHECK_ON_GPU

    def take(count: int) -> List[Tuple[int, int]]:
        items: List[Tuple[int, int]] = []
        while len(items) < count and (item := next(queue, None)) is not None:
            if rank[item[1]] < float('inf') and (budget is None or queries[item[1]] < budget[item[1]]):
                items.append(item)
        return items

    def start(items: List[Tuple[int, int]]) -> State:
        run, image = torch.tensor(items, device=x.device).T
        seed = seeds[image] + run * RUN_STRIDE
        if targets is None:
            return attack.start(Jobs(x[image], y[image], seed, run))
        count = targets.shape[1]
        return attack.start(Jobs(x[image], y[image], seed, run // count, targets[image, run % count]))

    def keep(finished: List[int]) -> None:
        ranks = state['rank'][finished].tolist()
        winners, ended = {}, 0
        for slot, value in zip(finished, ranks):
            image = owners[slot]
            runs_left[image] -= 1
            if rank[image] < float('inf'):
                ended += value == float('inf') or not runs_left[image]
            if value > rank[image]:
                rank[image], winners[image] = value, slot
        if winners:
            best[list(winners)] = state['best'][list(winners.values())]
        if progress is not None and ended:
            progress(ended)

    items = take(batch_size)
    owners = [image for _, image in items]
    state = start(items) if items else {}
    while owners:
        for _ in range(every):
            attack.step(model, state)
        for image in owners:
            queries[image] += every * attack.queries
        done = state['done'].tolist()
        if budget is not None:
            done = [flag or queries[image] >= budget[image] for flag, image in zip(done, owners)]
        finished = [slot for slot, flag in enumerate(done) if flag]
        keep(finished)
        if runs > 1:
            # another run of the same image may have made this one pointless
            finished = [s for s, flag in enumerate(done) if flag or rank[owners[s]] == float('inf')]
        if not finished:
            continue
        items = take(len(finished))
        refilled, left = finished[:len(items)], set(finished[len(items):])
        if items:
            fresh = start(items)
            for slot, (_, image) in zip(refilled, items):
                owners[slot] = image
            for name, rows in fresh.items():
                state[name][refilled] = rows
        if left:
            kept = [slot for slot in range(len(owners)) if slot not in left]
            owners = [owners[slot] for slot in kept]
            state = {name: rows[kept] for name, rows in state.items()}
    return Found(
        best,
        torch.tensor(rank, device=x.device) == float('inf'),
        torch.tensor([queries[i] for i in range(len(x))], device=x.device))


def check_images(x: torch.Tensor, y: torch.Tensor, space: Optional[InputSpace] = None) -> None:
    """Refuse what is no batch of images with labels.

    Raises:
        InputError: If shapes do not fit, and if x is not in [0, 1] although no `space` is given.
    """
    if x.ndim != 4:
        raise InputError(f'x has shape {tuple(x.shape)}: images must have shape (N, C, H, W)')
    if len(y) != len(x):
        raise InputError(f'y has {len(y)} labels for {len(x)} images')
    if space is not None or not len(x):
        return
    low, high = torch.aminmax(x)
    if low < -_PIXEL_SLACK or high > 1 + _PIXEL_SLACK:
        raise InputError(
            f'x spans [{low.item():.3g}, {high.item():.3g}] but pixels in [0, 1] are expected: for normalized images '
            'pass space=InputSpace(mean, std), or wrap the network in NormalizedModel and give it pixels')


def logits_of(model: Callable, x: torch.Tensor, batch_size: Optional[int] = None) -> torch.Tensor:
    """Logits without gradients, shape (N, K), in batches.

    Raises:
        InputError: If the network returns no tensor of that shape or values that are not finite.
    """
    with torch.no_grad():
        parts = [model(part) for part in x.split(batch_size or max(len(x), 1))]
    for part in parts:
        if not isinstance(part, torch.Tensor) or part.ndim != 2:
            raise InputError(f'model returns {type(part).__name__}: it must return logits of shape (N, K)')
    logits = torch.cat(parts)
    if not torch.isfinite(logits).all():
        raise InputError('model returns logits that are not finite: its weights are broken')
    return logits


def run_search(
        attack: Search,
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        space: Optional[InputSpace] = None,
        restarts: int = 1,
        num_targets: Optional[int] = None,
        targeted: bool = False,
        targets: Optional[torch.Tensor] = None,
        batch_size: Optional[int] = None,
        search_model: Optional[Callable] = None,
        progress: Optional[Callable[[int], None]] = None,
        seed: Seed = 0,
) -> Found:
    """What every attack function of an evaluation does around its `Search`.

    Args:
        attack: The attack.
        model: Maps images to logits; parameters rest and modules are in eval mode meanwhile.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True labels, class indices (N,) or soft targets (N, K).
        space: Input space of the network if it is not pixels.
        restarts: Runs per image, or per image and target.
        num_targets: Number of targets per image, see `wrong_classes`.
        targeted: Steer towards the likeliest wrong classes.
        targets: Target classes of the caller's own, shape (N,) or (N, T).
        batch_size: Images in the network at once, all by default.
        search_model: A faster network to search with. What fools it counts only if it fools `model`; what does not is
            searched again with `model`.
        progress: Told how many images have come to their end since it was last told.
        seed: One seed for all images, or one per image.

    Raises:
        InputError: On bad arguments, pixels outside [0, 1], and logits that are not finite or not (N, K).
    """
    if restarts < 1:
        raise InputError(f'restarts={restarts} must be at least 1')
    if batch_size is not None and batch_size < 1:
        raise InputError(f'batch_size={batch_size} must be at least 1')
    if space is not None:
        check_images(x, y, space)
        pixels = space.to_pixels(x)
        if len(x) and not -_SPACE_SLACK < pixels.min() <= pixels.max() < 1 + _SPACE_SLACK:
            raise InputError(
                f'x spans [{pixels.min().item():.3g}, {pixels.max().item():.3g}] in pixels of space={space}: images '
                'to evaluate must be in [0, 1], without random erasing')
        found = run_search(
            attack, _on_pixels(model, space), pixels.clamp(0, 1), y, restarts=restarts,
            num_targets=num_targets, targeted=targeted, targets=targets, batch_size=batch_size,
            search_model=search_model and _on_pixels(search_model, space), progress=progress, seed=seed)
        found.adv = space.normalize(found.adv)
        return found
    check_images(x, y)
    if attack.needs_float32 and hasattr(search_model, 'float32'):
        search_model = search_model.float32()
    x = x.detach()
    labels = hard_labels(y)
    seeds = image_seeds(seed, len(x), x.device)
    with crafting(getattr(model, 'wrapped', model)), crafting(getattr(search_model, 'wrapped', search_model)):
        if targets is not None:
            targets = targets.view(len(x), -1)
        elif targeted:
            targets = wrong_classes(logits_of(model, x, batch_size), labels, num_targets)
        runs = restarts * (1 if targets is None else targets.shape[1])
        common = dict(runs=runs, batch_size=batch_size)
        found = search(attack, search_model or model, x, y, seeds, targets=targets, progress=progress, **common)
        if search_model is not None and found.fooled.any():
            claimed = found.fooled.nonzero().squeeze(1)
            holds = logits_of(model, found.adv[claimed], batch_size).argmax(1) == labels[claimed]
            found.fooled[claimed] = ~holds
            again, budget = claimed[holds], None
            if attack.query_limit:
                limit = runs * attack.query_limit
                again = again[found.queries[again] < limit]
                budget = (limit - found.queries[again]).tolist()
            if len(again):
                own_targets = None if targets is None else targets[again]
                second = search(
                    attack, model, x[again], y[again], seeds[again], targets=own_targets, budget=budget, **common)
                found.adv[again], found.fooled[again] = second.adv, second.fooled
                found.queries[again] += second.queries
    return found


def _on_pixels(model: Callable, space: InputSpace) -> Callable:
    def on_pixels(pixels: torch.Tensor) -> torch.Tensor:
        return model(space.normalize(pixels))

    on_pixels.wrapped = model
    return on_pixels
