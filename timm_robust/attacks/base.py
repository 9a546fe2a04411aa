"""Base class of attacks. Fields are the settings of an attack; class attributes describe what it supports.

A custom attack is one class with two methods: `start` returns the initial state of a batch, and `step` advances every
image by one evaluation of the network. loop.py handles batching, restarts, targets, seeds and bookkeeping.

    @register_attack
    class Noise(Attack):
        name = 'noise'
        budget = 'tries'
        tries: int = setting(10, 'random images to try')

        @property
        def run_length(self):
            return self.tries

        def start(self, batch, threat):
            return batch.state()

        def step(self, model, state, threat):
            noise = threat.random(state['seed'] + state['step'], state['x'][0].numel())
            point = (state['x'] + noise.view_as(state['x'])).clamp(0, 1)
            with torch.no_grad():
                logits = model(point)
            keep_best(state, point, logits.argmax(1) != state['y'], logit_gap(logits, state['y']))
            state['step'] = state['step'] + 1
            state['done'] = (state['score'] == math.inf) | (state['step'] >= self.tries)
"""
import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Mapping, Optional, Tuple, Union

import torch

from ..errors import InputError
from ..settings import check_types
from .ball import InputSpace
from .checks import logits_of, wrong_classes
from .context import without_ddp
from .loop import run_attack
from .state import AttackResult, Batch, Call, State
from .threat import Seed, ThreatModel, parse_eps, parse_threat

__all__ = ['Attack']


def _read_step_size(size: Union[str, float]) -> float:
    try:
        number = parse_eps(size)
    except InputError as error:
        raise error.about('step_size', size) from error
    if not 0 < number < float('inf'):
        raise InputError(
            'must be positive, in pixel units on [0, 1]', 'write it as 2/255 or 0.01', argument='step_size', value=size)
    return number


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks.

    Attributes:
        name: Name in lists of attacks, with hyphens.
        aliases: Other names.
        variants: Names that imply settings: 'apgd-dlr' is APGD with loss='dlr'.
        norms: Supported norms, None for all.
        budget: The field that a number after the name sets ('pgd20'), None if it takes no number.
        shows_budget: Include that number in the attack's printed name even if it is the default.
        min_classes: Minimum number of classes.
        targeted: Runs once for each class from `choose_targets`, by default the likeliest wrong classes.
        steerable: Accepts target classes (`targets` of a call).
        counts_queries: The budget is a number of queries to the network.
        minimizes: Minimizes the perturbation, so that one run gives the result at every eps.
        needs_float32: Runs on a fast copy in float32 only, since low precision would weaken it.
        image_by_image: Attacks each image independently.
        whole_batch: Can perturb a batch jointly (`craft`), for networks with batch statistics.
        transfers: Images from `craft` are useful against other networks.
    """
    name: ClassVar[str] = ''
    aliases: ClassVar[Tuple[str, ...]] = ()
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    norms: ClassVar[Optional[Tuple[str, ...]]] = None
    budget: ClassVar[Optional[str]] = 'steps'
    shows_budget: ClassVar[bool] = False
    min_classes: ClassVar[int] = 2
    targeted: ClassVar[bool] = False
    steerable: ClassVar[bool] = False
    counts_queries: ClassVar[bool] = False
    minimizes: ClassVar[bool] = False
    needs_float32: ClassVar[bool] = False
    image_by_image: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = False
    transfers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        size = getattr(self, 'step_size', None)
        if isinstance(size, (str, int, float)):
            object.__setattr__(self, 'step_size', _read_step_size(size))
        check_types(self)

    @property
    def classes_needed(self) -> int:
        """Minimum number of classes for these settings."""
        return self.min_classes

    @property
    def queries(self) -> int:
        """Evaluations of the network per image in one step."""
        return 1

    @property
    def passes(self) -> int:
        """Forward passes that decide whether an image fools the network; above 1 for randomized networks."""
        return 1

    @property
    def run_length(self) -> Optional[int]:
        """Maximum number of steps of a run; None if unknown."""
        return None

    def runs_in_turn(self, threat: ThreatModel) -> bool:
        """Whether at most as many runs of an image go on at once as have failed before, or one.

        Parallel runs fill the batch, but waste work on images that an earlier run fools, if no run can succeed early.
        """
        return False

    def choose_targets(
            self,
            model: Callable[[torch.Tensor], torch.Tensor],
            x: torch.Tensor,
            y: torch.Tensor,
            threat: ThreatModel,
            batch_size: Optional[int],
    ) -> torch.Tensor:
        """Target classes of a targeted attack, shape (N, T), best first: by default the likeliest wrong classes."""
        return wrong_classes(logits_of(model, x, batch_size), y, getattr(self, 'num_targets', None))

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        """Initial state of the images."""
        raise NotImplementedError

    def step(self, model: Callable[[torch.Tensor], torch.Tensor], state: State, threat: ThreatModel) -> None:
        """Advance every image by one evaluation, in place; `model` maps pixels to logits."""
        raise NotImplementedError

    def __call__(self, model: Any, images: torch.Tensor, labels: Any, threat: Union[str, ThreatModel],
                 **how: Any) -> torch.Tensor:
        """Return the adversarial images, in float32 or better; takes the arguments of `run`."""
        return self.run(model, images, labels, threat, **how).adversarial

    def run(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: Union[str, ThreatModel],
            *,
            seed: Seed = 0,
            space: Optional[InputSpace] = None,
            targets: Any = None,
            batch_size: Optional[int] = None,
            fast_model: Optional[Callable] = None,
            progress: Optional[Callable[[int], None]] = None,
            all_correct: bool = False,
    ) -> AttackResult:
        """Attack each image. Images that are already misclassified are returned unchanged.

        If `images` are in half precision, adversarial images are rounded to it before each forward pass, but returned
        in float32: rounding them could exceed eps, several times over under L2.

        Args:
            model: Maps images to logits. A module is frozen in eval mode during the attack and restored afterwards.
            images: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
            labels: True classes (N,), of any integer type, or soft targets (N, K).
            threat: Threat model, or a string such as 'Linf 8/255'.
            seed: One seed for all images, or one per image. Seeds per image make results independent of the batch
                size and order. None draws one from torch's global generator.
            space: Input space of the network if it does not take pixels.
            targets: Target classes of a targeted attack, shape (N,) or (N, T); one run per target.
            batch_size: Images per forward pass, all by default.
            fast_model: A faster copy of the network to run the attack on (`make_fast_model`). Every result is verified
                on `model`, and images on which the two disagree are attacked again on `model`.
            progress: Called with the number of images finished since the last call.
            all_correct: Skip the clean forward pass, since all images are known to be classified correctly.

        Raises:
            InputError: On bad arguments, see `check_images` and `check_batch`; on an unsupported norm or number of
                classes; on logits that are not finite or not (N, K).
        """
        call = Call(seed, space, targets, batch_size, fast_model, progress, all_correct)
        return self.attack_images(without_ddp(model), images, labels, parse_threat(threat), call)

    def attack_images(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: ThreatModel,
            call: Call,
    ) -> AttackResult:
        """Implementation of `run`; by default attacks each image independently with `start` and `step`."""
        return run_attack(self, model, images, labels, threat, call)

    def members(self, num_classes: Optional[int] = None, threat: Optional[ThreatModel] = None) -> Tuple['Attack', ...]:
        """The attacks to run in sequence, each on the remaining images: itself, or the members of an ensemble.

        Args:
            num_classes: Number of classes of the network, which may affect the members; if None, assumed to be large.
            threat: The threat model, which may affect the members' settings.
        """
        return (self,)

    def check(self, threat: ThreatModel, num_classes: Optional[int] = None) -> None:
        """Reject settings that do not fit a threat model or a number of classes.

        Raises:
            InputError: On an unsupported norm, number of classes or `num_targets`, and on steps above 1 under Linf.
        """
        step_size = getattr(self, 'step_size', None)
        if threat.norm == 'Linf' and step_size is not None and step_size > 1:
            raise InputError('is larger than any change of a pixel in [0, 1]', 'write it as 2/255 or 0.01',
                             argument='step_size', value=step_size)
        norms = self.norms
        if norms is not None and threat.norm not in norms:
            names = ' and '.join((', '.join(norms[:-1]), norms[-1])[-len(norms):])
            raise InputError(f'supports only {names}, not {threat.norm}', argument='attack', value=str(self))
        if num_classes is None:
            return
        if num_classes < self.classes_needed:
            raise InputError(
                f'needs at least {self.classes_needed} classes, but the model has {num_classes}', argument='attack',
                value=str(self))
        asked = getattr(self, 'num_targets', None)
        if asked is not None and not 1 <= asked < num_classes:
            raise InputError(
                f'must be between 1 and {num_classes - 1}, the number of wrong classes', argument='num_targets',
                value=asked)

    def to_dict(self) -> Dict[str, Any]:
        """Name and settings, for JSON; `attack_from_dict` reads it."""
        return {'attack': self.name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    def __str__(self) -> str:
        names = (n for n, settings in self.variants.items() if all(getattr(self, k) == v for k, v in settings.items()))
        name = next(names, self.name)
        if self.budget is None:
            return name
        number = getattr(self, self.budget)
        default = next(f.default for f in dataclasses.fields(self) if f.name == self.budget)
        return f'{name}{number}' if self.shows_budget or number != default else name
