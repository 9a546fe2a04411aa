"""Accuracy under attack, image by image.

Every verdict comes from one place: a plain float32 forward pass, after the attack is over, on the image it returned,
which must lie within eps of the clean one and within [0, 1].
"""
import logging
import math
import time
from itertools import islice
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from tqdm import tqdm

from ..attacks import Clean, logits_of
from ..errors import InputError
from ..layers import at_gamma, has_batch_statistics
from ..precision import float32_proper
from .journal import Journal
from .outcome import AttackResult, AttackSpec, Evaluation, assemble, check_specs, keyed_steps
from .report import EpsPoint, GammaPoint

__all__ = ['MBNAT_GAMMAS', 'evaluate_attacks', 'image_seeds', 'sweep_eps', 'sweep_mbnat_gamma']

MBNAT_GAMMAS = tuple(i / 10 for i in range(11))

# float32 cannot hold clean + eps exactly: a pixel near 1 is half an ulp (6e-8) off, and the comparison as much again
_FLOAT32_SLACK = 1.2e-7
_FEWEST_FOR_CHANCE = 50

_logger = logging.getLogger(__name__)


def _logits(model: Callable, x: torch.Tensor, labels: torch.Tensor, batch_size: int) -> torch.Tensor:
    logits = logits_of(model, x, batch_size)
    if labels.max() >= logits.shape[1]:
        raise InputError(
            f'--num-classes {logits.shape[1]}: the data has label {labels.max().item()}, pass --num-classes '
            f'{labels.max().item() + 1} or the data set the model was trained on')
    return logits


def _assert_allowed(adv: torch.Tensor, x: torch.Tensor, spec: AttackSpec) -> None:
    size = spec.threat.size(adv.double() - x.double())
    slack = _FLOAT32_SLACK * spec.threat.unbounded(x.shape[1:]).eps
    if size.max() > spec.threat.eps + slack or adv.min() < 0 or adv.max() > 1:
        raise RuntimeError(
            f'{spec.name} left its threat model: perturbation {size.max():.8g} for eps {spec.threat.eps:.8g}, '
            f'pixels in [{adv.min():.8g}, {adv.max():.8g}]')


def image_seeds(seed: int, indices: Sequence[int]) -> List[int]:
    """A seed for each image of a data set, whatever batch it comes in."""
    return [(seed * 0x9E3779B1 + i) % (1 << 62) for i in indices]


def _refuse_chance(correct: int, count: int, num_classes: int) -> None:
    """Three standard deviations above chance is what a network has to reach that has seen its labels."""
    chance = 1 / num_classes
    limit = count * chance + 3 * math.sqrt(count * chance * (1 - chance))
    if count >= _FEWEST_FOR_CHANCE and correct <= limit:
        raise InputError(
            f'--model: classifies {100 * correct / count:.1f} % of the first {count} clean images correctly, as good '
            f'as guessing among {num_classes} classes: its classes are not those of the data, or it has no trained '
            'weights (--allow-chance evaluates all the same)')


class _Evaluator:
    """Runs the attacks on one pool of images after the other and writes down what comes out."""

    def __init__(
            self,
            model: nn.Module,
            specs: Sequence[AttackSpec],
            journal: Journal,
            *,
            batch_size: int,
            seed: int,
            worst_case: bool,
            fast_model: Optional[Callable],
            surrogate: Optional[nn.Module],
            bar: tqdm,
    ):
        self.model = model
        self.specs = specs
        self.journal = journal
        self.batch_size = batch_size
        self.seed = seed
        self.worst_case = worst_case
        self.fast_model = fast_model
        self.surrogate = surrogate
        self.bar = bar
        self.whole_batches = has_batch_statistics(model)

    def clean(self, x: torch.Tensor, labels: torch.Tensor) -> Tuple[List[bool], int]:
        """Which clean images are classified correctly, and the number of classes."""
        if x.min() < 0 or x.max() > 1:
            raise InputError(
                f'pixels span [{x.min().item():.3g}, {x.max().item():.3g}]: the loader must deliver [0, 1], '
                'without normalization')
        logits = _logits(self.model, x, labels, self.batch_size)
        return (logits.argmax(1) == labels).tolist(), logits.shape[1]

    def attack(self, x: torch.Tensor, labels: torch.Tensor, indices: List[int], correct: List[bool]) -> None:
        """Run every attack on a pool of images of which `correct` are classified correctly."""
        standing = list(correct)
        for spec in self.specs:
            withstood = list(standing if self.worst_case else correct)
            for part, key in keyed_steps(spec):
                self.bar.set_description_str(key)
                end = self.bar.n + len(x)
                self._run(part, key, x, labels, indices, withstood)
                self.bar.update(end - self.bar.n)
            standing = [a and b for a, b in zip(standing, withstood)]

    def _run(self, spec: AttackSpec, key: str, x, labels, indices: List[int], withstood: List[bool]) -> None:
        known = self.journal.correct[key]
        todo = [i for i, stands in enumerate(withstood) if stands and indices[i] not in known]
        if self.whole_batches and todo:
            todo = list(range(len(x)))
        if todo:
            start = time.perf_counter()
            rows = torch.tensor(todo, device=x.device)
            own = [indices[i] for i in todo]
            # The best iterates of several images never stood in one batch, which matters if the batch does; and an
            # attack that stops where the surrogate is fooled is a weak one on another network.
            whole_batch = self.whole_batches or self.surrogate is not None
            how = {} if whole_batch else dict(
                batch_size=self.batch_size, fast_model=self.fast_model, progress=self.bar.update)
            # attacks on single images fill their batches from the pool themselves
            adv = torch.cat([
                spec(
                    self.surrogate or self.model, x[part], labels[part],
                    image_seeds(self.seed, [indices[i] for i in part.tolist()]), whole_batch=whole_batch, **how)
                for part in rows.split(self.batch_size if whole_batch else len(rows))])
            _assert_allowed(adv, x[rows], spec)
            right = _logits(self.model, adv, labels[rows], self.batch_size).argmax(1) == labels[rows]
            self.journal.record(key, own, right.tolist(), time.perf_counter() - start)
        for i, stands in enumerate(withstood):
            withstood[i] = stands and known[indices[i]]


def _pools(loader, batches: int, device: torch.device) -> Iterator[Tuple[torch.Tensor, torch.Tensor, int]]:
    """Images and labels of several batches together, and the size of the first batch."""
    stream = iter(loader)
    while pool := [(x.to(device), y.to(device)) for x, y in islice(stream, batches)]:
        images, labels = zip(*pool)
        yield torch.cat(images), torch.cat(labels), len(images[0])


@float32_proper()
def evaluate_attacks(
        model: nn.Module,
        loader,
        indices: Sequence[int],
        specs: Sequence[AttackSpec],
        *,
        device: torch.device,
        seed: int = 0,
        worst_case: bool = False,
        batch_size: Optional[int] = None,
        batches_in_pool: int = 8,
        fast_model: Optional[Callable] = None,
        surrogate: Optional[nn.Module] = None,
        journal: Optional[Journal] = None,
        refuse_chance: bool = False,
        progress: Optional[bool] = None,
) -> Evaluation:
    """Attack a network on a data set.

    Images are attacked in pools of several batches, so that the batch stays full while images that are fooled leave it.
    Noise is seeded per image of the data set: neither batch size nor number of processes changes it. For a network with
    batch statistics each batch of the loader is attacked as a whole, since a prediction holds within its batch only.

    Args:
        model: Maps pixels in [0, 1], shape (N, C, H, W), to logits; in eval mode.
        loader: Delivers (pixels, labels), in the order of `indices`.
        indices: Index of each image in the data set.
        specs: Attacks by `plan_attacks`.
        device: Device of the network.
        seed: Seed of the noise.
        worst_case: Run each attack only on images that withstood those before it; otherwise each runs on all images
            classified correctly.
        batch_size: Images in the network at once; by default that of the loader's first batch.
        batches_in_pool: Batches of the loader attacked together.
        fast_model: Faster network to search with, see `Attack.run`.
        surrogate: Network to craft on instead of the model: a black-box transfer attack.
        journal: Where outcomes are kept; what it holds already is not done again.
        refuse_chance: Stop before any attack if the first pool is classified no better than by guessing.
        progress: Show a progress bar; by default on a terminal, and a line for each pool in a log.

    Returns:
        Outcomes of the images of `indices`, of this process alone.

    Raises:
        InputError: If the network is in training mode, pixels are not in [0, 1], labels do not fit, logits are not
            finite, or an attack is not defined for the network.
    """
    if model.training:
        raise InputError('model is in training mode: call model.eval() before an evaluation')
    batch_dependent = has_batch_statistics(model)
    journal = journal or Journal(None, {})
    attacks = [s for s in specs if s.is_attack]
    done, began = 0, time.perf_counter()
    total = len(indices) * sum(len(s.steps) for s in specs)
    with tqdm(total=total, unit='img', disable=None if progress is None else not progress) as bar:
        for x, labels, size in _pools(loader, 1 if batch_dependent else batches_in_pool, device):
            batch_size = size if batch_dependent else batch_size or size
            runner = _Evaluator(
                model, specs, journal, batch_size=batch_size, seed=seed, worst_case=worst_case,
                fast_model=fast_model, surrogate=surrogate, bar=bar)
            start, own = time.perf_counter(), list(indices[done:done + len(x)])
            correct, num_classes = runner.clean(x, labels)
            if done == 0:
                check_specs(specs, num_classes, batch_dependent, worst_case, surrogate is not None)
                if refuse_chance and attacks:
                    _refuse_chance(sum(correct), len(correct), num_classes)
            new = [k for k, i in enumerate(own) if i not in journal.labels]
            if new:
                journal.record(
                    'clean', [own[k] for k in new], [correct[k] for k in new], time.perf_counter() - start,
                    labels[new].tolist())
            # on another device an image may be classified otherwise than before a resume
            correct = [journal.correct['clean'][i] for i in own]
            runner.attack(x, labels, own, correct)
            done += len(x)
            so_far = assemble(specs, journal, indices[:done], worst_case)
            accuracies = '  '.join(
                f'{r.spec.name} {r.worst_case_accuracy if r.accuracy is None else r.accuracy:.1f}%'
                for r in so_far.results)
            bar.set_postfix_str(accuracies)
            if bar.disable and progress is None:
                left = (time.perf_counter() - began) * (len(indices) / done - 1)
                _logger.info(f'{done} of {len(indices)} images: {accuracies}, {tqdm.format_interval(left)} left')
    evaluation = assemble(specs, journal, indices, worst_case)
    evaluation.batch_dependent = batch_dependent
    return evaluation


def sweep_eps(
        model: nn.Module,
        make_loader: Callable,
        indices: Sequence[int],
        specs_by_eps: Dict[float, AttackSpec],
        **kwargs: Any,
) -> Tuple[EpsPoint, ...]:
    """Accuracy for each eps; 0 stands for clean images.

    Args:
        model: See `evaluate_attacks`.
        make_loader: Returns a fresh loader.
        indices: See `evaluate_attacks`.
        specs_by_eps: One attack for each eps.
        **kwargs: Arguments of `evaluate_attacks`.
    """
    return tuple(
        EpsPoint(eps, _num_correct(evaluate_attacks(model, make_loader(), indices, [spec], **kwargs).results[0]),
                 len(indices))
        for eps, spec in sorted(specs_by_eps.items()))


def _num_correct(result: AttackResult) -> int:
    return sum(map(bool, result.correct))


def sweep_mbnat_gamma(
        model: nn.Module,
        make_loader: Callable,
        indices: Sequence[int],
        attack: AttackSpec,
        make_fast_model: Callable[[], Optional[Callable]],
        **kwargs: Any,
) -> Tuple[GammaPoint, ...]:
    """The trade-off of a network with two BatchNorms, from clean images' (gamma 0) to adversarial images' (gamma 1).

    NoFrost, figure 2 - https://arxiv.org/abs/2207.01156

    Args:
        model: A network of `convert_aux_norm`, see `evaluate_attacks`.
        make_loader: Returns a fresh loader.
        indices: See `evaluate_attacks`.
        attack: The attack behind robust accuracy.
        make_fast_model: Returns the network to search with for the mixture at hand.
        **kwargs: Arguments of `evaluate_attacks`.

    Returns:
        A point for each of `MBNAT_GAMMAS`.
    """
    points = []
    for gamma in MBNAT_GAMMAS:
        with at_gamma(model, gamma):
            clean, robust = evaluate_attacks(
                model, make_loader(), indices, [AttackSpec(Clean()), attack], fast_model=make_fast_model(),
                **kwargs).results
        points.append(GammaPoint(gamma, _num_correct(clean), _num_correct(robust), len(indices)))
    return tuple(points)
