"""Base classes of attacks that step along the input gradient.

`run` attacks each image independently. An image is done once it fools the network, and each restart attacks only the
remaining images. An image that never fools the network is returned at its highest loss over all runs. A run stops at
the first misclassified point, close to the decision boundary, so in low precision another pass may classify that point
correctly. `craft` perturbs whole batches.
"""
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, ClassVar, Dict, Optional, Tuple, Union

import torch

from ..errors import InputError, check_at_least, check_choice
from ..settings import setting
from .ball import PIXELS, Ball, InputSpace
from .base import Attack
from .checks import Classifier, check_batch, check_classes, check_images, check_targets, usable
from .context import attack_mode, input_gradient
from .loop import RUN_STRIDE
from .losses import cross_entropy, precise
from .noise import image_seeds
from .state import Batch, State, keep_best
from .threat import Seed, ThreatModel, madry_step_size, parse_threat
from .whole_batch import KEEP, Ascent, last_iterate, most_fooled

__all__ = ['GradientAttack', 'IterativeAttack']

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """One step of length eps along the gradient; subclasses change the number and size of steps, start and loss."""
    budget: ClassVar[Optional[str]] = None
    steerable = True
    whole_batch = True
    transfers = True

    @property
    def num_steps(self) -> int:
        """Number of gradient steps."""
        return 1

    @property
    def starts_at_random(self) -> bool:
        """Whether the attack starts from a random point of the ball."""
        return False

    @property
    def momentum(self) -> float:
        """Decay of the momentum over L1-normalized gradients; 0 for none."""
        return 0.

    def step_length(self, threat: ThreatModel) -> float:
        """Step size in pixel units."""
        return threat.eps

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss to maximize: one value per image, from logits (N, K) and labels (N,) or (N, K)."""
        return cross_entropy(logits, target)

    @property
    def run_length(self) -> int:
        return self.num_steps + 1

    def _ascent(self, threat: ThreatModel) -> Ascent:
        return Ascent(self.step_length(threat) or 1., self.momentum)  # with eps 0, any positive step size works

    def reach(self, threat: ThreatModel) -> ThreatModel:
        """The threat model that bounds the images of `craft`."""
        return threat

    def start_point(self, ball: Ball, seeds: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
        """Starting points, shape (N, C, H, W), from one seed per image."""
        return ball.random(seeds) if self.starts_at_random else ball.x

    def gradient(
            self,
            model: Callable,
            rows: Dict[str, torch.Tensor],
            loss_fn: Callable[[torch.Tensor], torch.Tensor],
            space: InputSpace = PIXELS,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradient to step along, the logits and the loss, all at `point`.

        Args:
            model: Maps points, in `space`, to logits.
            rows: `point`, `seed` and `step` (the number of steps so far), one row per image.
            loss_fn: Maps logits to one loss per image.
            space: Input space of the points.
        """
        return input_gradient(model, rows['point'], loss_fn)

    def start(self, batch: Batch, threat: ThreatModel) -> State:
        ball = Ball(batch.x, threat)
        point = self.start_point(ball, batch.seeds, threat)
        state = batch.state(**ball.rows(), point=point)
        if self.momentum > 0:
            state['velocity'] = torch.zeros_like(point)
        return state

    def step(self, model: Callable, state: State, threat: ThreatModel) -> None:
        def loss_fn(logits: torch.Tensor) -> torch.Tensor:
            if 'target' in state:
                return -self.loss(logits, state['target'])
            return self.loss(logits, state.get('soft', state['y']))

        point = state['point']
        if state.ends:
            with torch.no_grad():
                logits = model(point)
                loss = loss_fn(logits)
        else:
            gradient, logits, loss = self.gradient(model, state, loss_fn)
        keep_best(state, point, logits.argmax(1) != state['y'], loss)
        state['done'] = (state['score'] == float('inf')) | (state['step'] >= self.num_steps)
        state['step'] = state['step'] + 1
        if not state.ends:
            self._ascent(threat).move(Ball.of_rows(state, threat), state, gradient)

    def craft(
            self,
            model: Any,
            images: torch.Tensor,
            labels: Any,
            threat: Union[str, ThreatModel],
            *,
            space: Optional[InputSpace] = None,
            seed: Seed = 0,
            bn_mode: str = 'eval',
            start_std: Optional[float] = None,
            tau: Optional[int] = None,
            reference: Optional[torch.Tensor] = None,
            targets: Optional[torch.Tensor] = None,
            loss_fn: Optional[LossFn] = None,
            keep: Optional[str] = None,
    ) -> torch.Tensor:
        """Perturb a whole batch: for training, for transfer attacks and for networks with batch statistics.

        Args:
            model: Maps images to logits.
            images: Images (N, C, H, W), in `space`.
            labels: Class indices (N,).
            threat: Threat model.
            space: Input space of the images, by default pixels in [0, 1].
            seed: Seed of the noise.
            bn_mode: 'eval' or 'train', see `attack_mode`.
            start_std: Start from the images plus Gaussian noise of this standard deviation in pixel units (TRADES:
                0.001).
            tau: Stop perturbing an image once it has been misclassified `tau` + 1 times (friendly adversarial training:
                Zhang et al. 2020, https://arxiv.org/abs/2002.11242, algorithm 1).
            reference: Soft targets (N, K) for the cross-entropy to maximize, instead of the labels (TRADES).
            targets: Target classes (N,) of a targeted attack.
            loss_fn: Loss to maximize instead of `loss`: maps logits and labels to one value per image.
            keep: 'last' (default) returns the last iterate. 'most_fooled' returns the iterate, over all restarts, in
                which the most images fool the network at once. With batch statistics, iterates cannot be chosen per
                image.

        Returns:
            Images in the space of `images`, in float32 or better, detached, within eps and within valid pixels.

        Raises:
            InputError: On bad arguments.
        """
        keep = keep or 'last'
        check_choice('keep', keep, KEEP)
        restarts = getattr(self, 'restarts', 1)
        if keep == 'last' and restarts > 1:
            raise InputError(
                "`keep='last'` cannot choose between runs", "leave it out, or pass `keep='most_fooled'`",
                argument='restarts', value=restarts)
        if keep != 'last' and (start_std is not None or tau is not None):
            raise InputError("`start_std` and `tau` need `keep='last'`", argument='keep', value=keep)
        if tau is not None:
            check_at_least('tau', tau, 0)
        if not self.whole_batch:
            raise InputError(
                'attacks single images only', 'pass `targets` to `PGD().craft`' if self.targeted else '',
                argument='attack', value=str(self))
        threat = parse_threat(threat)
        self.check(threat)
        ascent, sign, loss_fn = self._ascent(threat), 1. if targets is None else -1., loss_fn or self.loss
        with attack_mode(model, bn_mode):
            check_images(images, space, model)
            checked = check_batch(images, labels, look=False)
            aim = checked.labels if checked.soft is None else checked.soft
            if targets is not None:
                aim = check_targets(images, targets)[:, 0]
            elif reference is not None:
                aim = usable(reference)

            def ascended(rows: Dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
                return sign * loss_fn(logits, rows['aim'])

            classifier = Classifier(model, PIXELS, images.dtype, lambda z: check_classes(checked, z.shape[1]))
            ball = Ball(precise(usable(images)), self.reach(threat), space or PIXELS)
            gradient = partial(self.gradient, classifier, space=ball.space)
            seeds = image_seeds(seed, len(images), images.device)
            best, most = ball.x, torch.full((), -1, device=images.device)
            for restart in range(restarts if len(images) else 0):
                own = seeds + restart * RUN_STRIDE
                start = self.start_point(ball, own, threat) if start_std is None else ball.jittered(start_std, own)
                rows = {'point': start, 'y': checked.labels, 'aim': aim, 'seed': own, 'step': torch.zeros_like(own)}
                if keep == 'last':
                    best = last_iterate(classifier, gradient, ball, rows, ascended, self.num_steps, ascent, tau)
                else:
                    adv, count = most_fooled(classifier, gradient, ball, rows, ascended, self.num_steps, ascent)
                    best, most = torch.where(count > most, adv, best), torch.maximum(count, most)
        return best


@dataclass(frozen=True, kw_only=True)
class IterativeAttack(GradientAttack):
    """Base of attacks with several steps."""
    budget = 'steps'
    shows_budget = True
    steps: int = setting(20, 'number of gradient steps')
    step_size: Optional[float] = setting(
        None, 'step size in pixel units, for example 2/255 (default: derived from steps)')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('steps', self.steps)

    @property
    def num_steps(self) -> int:
        return self.steps

    def step_length(self, threat: ThreatModel) -> float:
        return self.step_size or madry_step_size(threat, self.steps)
