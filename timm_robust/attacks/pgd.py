"""Gradient attacks that step along the input gradient inside an Linf or L2 ball.

All share one loop and one signature, `attack(model, x, y, threat, ...)`, and return adversarial images in the space
of x. By default x holds pixels in [0, 1] (wrap a network for normalized images in `NormalizedModel`); pass `space` for
normalized images, as timm's loaders deliver them. eps and step sizes are in pixel units either way.

With `keep='best'` (evaluation) an image that fools the network leaves the batch, each restart attacks only what
resists, and images that resist to the end have the highest loss of any run. Where it stops is the decision boundary: in
low precision another pass may classify such an image correctly. With `keep='last'` (training) the last iterate is
returned and one evaluation of the network is saved. With `keep='batch'` the images stay together, and the iterate, of
any restart, in which most of them fool the network at once is returned: the choice for a network that normalizes by the
batch, where an image's best iterate means nothing without its neighbours'.
"""
from functools import partial
from typing import Callable, Dict, Optional, Tuple

import torch

from ..errors import InputError
from .context import crafting, input_gradient
from .losses import cross_entropy, hard_labels, margin
from .noise import image_seeds
from .search import RUN_STRIDE, Jobs, Search, State, check_images, keep_best, run_search
from .threat import Ball, InputSpace, Seed, ThreatModel, madry_step_size

__all__ = ['bim', 'cw_linf', 'fgsm', 'fgsm_rs', 'mim', 'pgd', 'pgd_targeted']

KEEP = ('best', 'last', 'batch')


def check_steps(steps: int, step_size: Optional[float]) -> None:
    """Refuse what is no number or length of steps."""
    if steps < 1:
        raise InputError(f'steps={steps} must be at least 1')
    if step_size is not None and not step_size > 0:
        raise InputError(f'step_size={step_size} must be positive, in pixel units on [0, 1]')


class _Ascent:
    """The step all attacks of this file share."""

    def __init__(self, threat: ThreatModel, step_size: float, decay: float):
        self.threat = threat
        self.step_size = step_size
        self.decay = decay

    def move(self, ball: Ball, rows: Dict[str, torch.Tensor], gradient: torch.Tensor) -> None:
        direction = ball.pixel_gradient(gradient)
        if self.decay > 0:
            unit = direction / direction.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
            direction = rows['velocity'] = self.decay * rows.get('velocity', 0.) + unit
        rows['point'] = ball.ascend(rows['point'], direction, self.step_size)


class PGDSearch(Search):
    """PGD on a pool of images; the arguments are those of `pgd`."""

    def __init__(
            self,
            threat: ThreatModel,
            steps: int,
            step_size: float,
            random_start: bool,
            loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
            decay: float,
    ):
        self.threat = threat
        self.steps = steps
        self.random_start = random_start
        self.loss_fn = loss_fn
        self.ascent = _Ascent(threat, step_size, decay)

    def start(self, jobs: Jobs) -> State:
        ball = Ball(jobs.x, self.threat, InputSpace())
        point = ball.random(jobs.seeds) if self.random_start else ball.x
        state = jobs.state(**ball.rows(), point=point)
        if self.ascent.decay > 0:
            state['velocity'] = torch.zeros_like(point)
        return state

    def step(self, model: Callable, state: State) -> None:
        def loss_fn(logits: torch.Tensor) -> torch.Tensor:
            return -self.loss_fn(logits, state['target']) if 'target' in state else self.loss_fn(logits, state['y'])

        point = state['point']
        # looking costs nothing on a CPU; a GPU would have to be waited for
        all_last = point.device.type == 'cpu' and bool((state['step'] == self.steps).all())
        if all_last:
            with torch.no_grad():
                logits = model(point)
                loss = loss_fn(logits)
        else:
            gradient, logits, loss = input_gradient(model, point, loss_fn)
        keep_best(state, point, logits.argmax(1) != hard_labels(state['y']), loss)
        state['done'] = (state['rank'] == float('inf')) | (state['step'] >= self.steps)
        state['step'] = state['step'] + 1
        if not all_last:
            self.ascent.move(Ball.of_rows(state, self.threat), state, gradient)


def _whole_batch(
        model: Callable,
        ball: Ball,
        start: torch.Tensor,
        loss_fn: Callable[[torch.Tensor], torch.Tensor],
        fooled_fn: Callable[[torch.Tensor], torch.Tensor],
        steps: int,
        ascent: _Ascent,
        keep: str,
) -> Tuple[torch.Tensor, int]:
    """All images in step. Returns the last iterate, or the one in which most images fool, and their number."""
    rows, best, most = {'point': start}, start, -1

    def look(logits: torch.Tensor) -> None:
        nonlocal best, most
        count = int(fooled_fn(logits).sum())
        if count > most:
            best, most = rows['point'], count

    for _ in range(steps):
        gradient, logits, _ = input_gradient(model, rows['point'], loss_fn)
        if keep == 'batch':
            look(logits)
        ascent.move(ball, rows, gradient)
    if keep == 'batch':
        with torch.no_grad():
            look(model(rows['point']))
        return best, most
    return rows['point'], most


def start_of(ball: Ball, seed: Optional[Seed], random_start: bool, start_std: Optional[float]) -> torch.Tensor:
    """Where a training attack starts, see `pgd`."""
    if start_std is not None:
        return ball.jittered(start_std, seed)
    return ball.random(seed) if random_start else ball.x


def pgd(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        space: Optional[InputSpace] = None,
        steps: int = 10,
        step_size: Optional[float] = None,
        random_start: bool = True,
        start_std: Optional[float] = None,
        restarts: int = 1,
        targets: Optional[torch.Tensor] = None,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy,
        decay: float = 0.,
        keep: str = 'best',
        norm_mode: str = 'eval',
        batch_size: Optional[int] = None,
        search_model: Optional[Callable] = None,
        progress: Optional[Callable[[int], None]] = None,
        seed: Optional[Seed] = 0,
) -> torch.Tensor:
    """Projected gradient descent.

    Madry et al. 2018, `Towards Deep Learning Models Resistant to Adversarial Attacks` -
    https://arxiv.org/abs/1706.06083

    Args:
        model: Maps images to logits.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True labels, class indices (N,) or soft targets (N, K).
        threat: Norm and eps.
        space: Input space of the network if it is not pixels.
        steps: Number of gradient steps.
        step_size: Length of a step in pixel units, `madry_step_size` by default.
        random_start: Start from a random point of the ball.
        start_std: Start from the image under Gaussian noise of this standard deviation instead, in pixel units
            (TRADES: 0.001); for `keep='last'`.
        restarts: Number of runs; not with `keep='last'`.
        targets: Class indices (N,) to steer towards instead of away from y.
        loss_fn: What to ascend: maps logits and labels to one value per image.
        decay: Momentum decay over L1-normalized gradients (`mim`).
        keep: 'best', 'last' or 'batch', see the module's head.
        norm_mode: 'eval' or 'train', see `crafting`; 'train' not with `keep='best'`.
        batch_size: Images in the network at once with `keep='best'`, all by default.
        search_model: Faster network to search with, see `run_search`; for `keep='best'`.
        progress: Told how many images have come to their end, see `run_search`; for `keep='best'`.
        seed: Seed of the random start: one for the batch, one per image (then neither batch size nor order matters),
            or None for torch's global generator (not with `keep='best'`).

    Returns:
        Adversarial images like x, detached, within eps of x and within valid pixels.

    Raises:
        InputError: On bad arguments, and if x is not in [0, 1] although no `space` is given.
    """
    check_steps(steps, step_size)
    if keep not in KEEP:
        raise InputError(f"keep={keep!r} is unknown: choose one of {', '.join(KEEP)}")
    if start_std is not None and keep != 'last':
        raise InputError(f"start_std={start_std} needs keep='last'")
    if restarts < 1:
        raise InputError(f'restarts={restarts} must be at least 1')
    if restarts > 1 and keep == 'last':
        raise InputError(f"restarts={restarts} needs keep='best' or 'batch'")
    if norm_mode != 'eval' and keep == 'best':
        raise InputError(f"norm_mode={norm_mode!r} mixes the images of a batch: it needs keep='last' or 'batch'")
    step_size = step_size or madry_step_size(threat, steps) or 1.
    if keep == 'best':
        attack = PGDSearch(threat, steps, step_size, random_start, loss_fn, decay)
        return run_search(
            attack, model, x, y, space=space, restarts=restarts, targets=targets, batch_size=batch_size,
            search_model=search_model, progress=progress, seed=seed).adv
    check_images(x, y, space)
    labels = hard_labels(y)
    best, most = x.detach(), -1
    ball = Ball(x, threat, space or InputSpace())
    seeds = None if seed is None else image_seeds(seed, len(x), x.device)
    with crafting(model, norm_mode):
        for restart in range(restarts):
            adv, fooled = _whole_batch(
                model,
                ball,
                start_of(ball, seeds if seeds is None else seeds + restart * RUN_STRIDE, random_start, start_std),
                (lambda z: loss_fn(z, y)) if targets is None else (lambda z: -loss_fn(z, targets)),
                lambda z: z.argmax(dim=1) != labels,
                steps,
                _Ascent(threat, step_size, decay),
                keep,
            )
            if keep == 'last' or fooled > most:
                best, most = adv, fooled
    return best


def pgd_targeted(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        num_targets: Optional[int] = None,
        steps: int = 10,
        step_size: Optional[float] = None,
        random_start: bool = True,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy,
        **kwargs,
) -> torch.Tensor:
    """Multi-targeted PGD: one targeted run for each of the likeliest wrong classes, on the images that still resist.

    Targets go by descending logit of the clean image (Gowal et al. 2019, https://arxiv.org/abs/1910.09338); a single
    random target is a weak attack. For targets of your own, pass `targets` to `pgd`.

    Args:
        model, x, y, threat, steps, step_size, random_start, loss_fn: See `pgd`.
        num_targets: Number of target classes per image; by default 9, or all wrong classes if there are fewer.
        **kwargs: `restarts`, `space`, `batch_size`, `search_model`, `progress` and `seed` of `pgd`.

    Raises:
        InputError: See `pgd`, and if there are fewer than `num_targets` wrong classes.
    """
    check_steps(steps, step_size)
    attack = PGDSearch(threat, steps, step_size or madry_step_size(threat, steps) or 1., random_start, loss_fn, 0.)
    return run_search(attack, model, x, y, targeted=True, num_targets=num_targets, **kwargs).adv


def fgsm(model: Callable, x: torch.Tensor, y: torch.Tensor, threat: ThreatModel, **kwargs) -> torch.Tensor:
    """Fast gradient sign method: one step of length eps from the clean image; arguments of `pgd`.

    Goodfellow et al. 2015, `Explaining and Harnessing Adversarial Examples` - https://arxiv.org/abs/1412.6572
    """
    return pgd(model, x, y, threat, **{**kwargs, 'steps': 1, 'step_size': threat.eps or None, 'random_start': False})


def fgsm_rs(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        step_size: Optional[float] = None,
        **kwargs,
) -> torch.Tensor:
    """FGSM from a random start: one step of 1.25 eps by default; arguments of `pgd`.

    Wong et al. 2020, `Fast is better than free` - https://arxiv.org/abs/2001.03994
    """
    step_size = step_size or 1.25 * threat.eps or None
    return pgd(model, x, y, threat, **{**kwargs, 'steps': 1, 'step_size': step_size, 'random_start': True})


def bim(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 10,
        step_size: Optional[float] = None,
        **kwargs,
) -> torch.Tensor:
    """Basic iterative method: steps of eps / steps by default, from the clean image; arguments of `pgd`.

    Kurakin et al. 2017, `Adversarial examples in the physical world` - https://arxiv.org/abs/1607.02533
    """
    step_size = step_size or threat.eps / max(steps, 1) or None
    return pgd(model, x, y, threat, **{**kwargs, 'steps': steps, 'step_size': step_size, 'random_start': False})


def mim(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        steps: int = 10,
        decay: float = 1.,
        **kwargs,
) -> torch.Tensor:
    """Momentum iterative method (also MIA, MI-FGSM): BIM along accumulated L1-normalized gradients.

    Dong et al. 2018, `Boosting Adversarial Attacks with Momentum` - https://arxiv.org/abs/1710.06081
    """
    return bim(model, x, y, threat, steps=steps, decay=decay, **kwargs)


def cw_linf(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        confidence: float = 50.,
        **kwargs,
) -> torch.Tensor:
    """PGD on Carlini & Wagner's margin loss, NoFrost's 'CW'; arguments of `pgd`.

    Carlini & Wagner 2017 (https://arxiv.org/abs/1608.04644) in the form of Madry et al. 2018.
    """
    return pgd(model, x, y, threat, loss_fn=partial(margin, confidence=confidence), **kwargs)
