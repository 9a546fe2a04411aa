"""Gradient attacks that step along the input gradient inside an Linf or L2 ball.

All share one loop and one signature, `attack(model, x, y, threat, ...)`, and return adversarial images in the space
of x. By default x holds pixels in [0, 1] (wrap a network for normalized images in `NormalizedModel`); pass `space` for
normalized images, as timm's loaders deliver them. eps and step sizes are in pixel units either way.

With `keep='best'` (evaluation) an image that fools the network is kept from the moment it does, each restart attacks
only what resists, and images that resist to the end have the highest loss of the last run. With `keep='last'`
(training) the last iterate is returned and one evaluation of the network is saved.
"""
from functools import partial
from typing import Callable, Optional

import torch

from ..errors import InputError
from .context import crafting, input_gradient
from .losses import cross_entropy, hard_labels, margin
from .threat import Ball, InputSpace, Seed, ThreatModel, madry_step_size

__all__ = ['ATTACKS', 'bim', 'cw_linf', 'fgsm', 'fgsm_rs', 'mim', 'pgd', 'pgd_targeted']

_PIXEL_SLACK = 1e-5
_RESTART_STRIDE = 1_000_003  # keeps the seeds of restarts apart from those of neighbouring images


def _check_inputs(x: torch.Tensor, y: torch.Tensor, steps: int, step_size: Optional[float], restarts: int) -> None:
    if x.ndim != 4:
        raise InputError(f'x has shape {tuple(x.shape)}: images must have shape (N, C, H, W)')
    if len(y) != len(x):
        raise InputError(f'y has {len(y)} labels for {len(x)} images')
    if steps < 1:
        raise InputError(f'steps={steps} must be at least 1')
    if step_size is not None and not step_size > 0:
        raise InputError(f'step_size={step_size} must be positive, in pixel units on [0, 1]')
    if restarts < 1:
        raise InputError(f'restarts={restarts} must be at least 1')


def _check_pixels(x: torch.Tensor) -> None:
    low, high = torch.aminmax(x)
    if low < -_PIXEL_SLACK or high > 1 + _PIXEL_SLACK:
        raise InputError(
            f'x spans [{low.item():.3g}, {high.item():.3g}] but pixels in [0, 1] are expected: for normalized images '
            'pass space=InputSpace(mean, std), or wrap the network in NormalizedModel and give it pixels')


def _ascend(
        model: Callable,
        ball: Ball,
        start: torch.Tensor,
        loss_fn: Callable[[torch.Tensor], torch.Tensor],
        fooled_fn: Callable[[torch.Tensor], torch.Tensor],
        steps: int,
        step_size: float,
        decay: float,
        keep: str,
) -> torch.Tensor:
    adv, best, best_rank = start, None, None
    velocity = torch.zeros_like(adv) if decay > 0 else None

    def keep_best(logits: torch.Tensor, loss: torch.Tensor) -> None:
        nonlocal best, best_rank
        # every fooling image ranks above every other, and the first one found stays
        rank = torch.where(fooled_fn(logits), float('inf'), loss)
        better = torch.ones_like(rank, dtype=torch.bool) if best is None else rank > best_rank
        best = adv if best is None else torch.where(better.view(-1, 1, 1, 1), adv, best)
        best_rank = rank if best_rank is None else torch.where(better, rank, best_rank)

    for _ in range(steps):
        gradient, logits, loss = input_gradient(model, adv, loss_fn)
        if keep == 'best':
            keep_best(logits, loss)
        direction = ball.pixel_gradient(gradient)
        if velocity is not None:
            velocity = decay * velocity + direction / direction.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
            direction = velocity
        adv = ball.ascend(adv, direction, step_size)
    if keep == 'best':
        with torch.no_grad():
            logits = model(adv)
            keep_best(logits, loss_fn(logits))
        return best
    return adv


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
        restarts: int = 1,
        targets: Optional[torch.Tensor] = None,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy,
        decay: float = 0.,
        keep: str = 'best',
        norm_mode: str = 'eval',
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
        restarts: Number of runs; each attacks the images that still resist. More than one needs `keep='best'`.
        targets: Class indices (N,) to steer towards instead of away from y.
        loss_fn: What to ascend: maps logits and labels to one value per image.
        decay: Momentum decay over L1-normalized gradients (`mim`).
        keep: 'best' or 'last', see the module's head.
        norm_mode: 'eval' or 'train', see `crafting`.
        seed: Seed of the random start: one for the batch, one per image (then neither batch size nor order matters),
            or None for torch's global generator.

    Returns:
        Adversarial images like x, detached, within eps of x and within valid pixels.

    Raises:
        InputError: On bad arguments, and if x is not in [0, 1] although no `space` is given.
    """
    _check_inputs(x, y, steps, step_size, restarts)
    if keep not in ('best', 'last'):
        raise InputError(f"keep={keep!r} is unknown: choose 'best' or 'last'")
    if restarts > 1 and keep != 'best':
        raise InputError(f"restarts={restarts} needs keep='best'")
    if space is None:
        _check_pixels(x)
    step_size = step_size or madry_step_size(threat, steps)
    labels = hard_labels(y)

    with crafting(model, norm_mode):
        adv = x.detach()
        pending = torch.arange(len(x), device=x.device)
        for restart in range(restarts):
            if len(pending) == 0:
                break
            ball = Ball(x[pending], threat, space or InputSpace())
            own_labels = labels[pending]
            if targets is None:
                ascent = partial(_untargeted, loss_fn, y[pending])
            else:
                ascent = partial(_targeted, loss_fn, targets[pending])
            candidate = _ascend(
                model,
                ball,
                ball.random(_restart_seed(seed, restart, pending)) if random_start else ball.x,
                ascent,
                lambda logits, own=own_labels: logits.argmax(dim=1) != own,
                steps,
                step_size,
                decay,
                keep,
            )
            adv = adv.index_copy(0, pending, candidate)
            if restart + 1 < restarts:
                with torch.no_grad():
                    pending = pending[model(candidate).argmax(dim=1) == own_labels]
    return adv


def _untargeted(loss_fn, y: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return loss_fn(logits, y)


def _targeted(loss_fn, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return -loss_fn(logits, targets)


def _restart_seed(seed: Optional[Seed], restart: int, pending: torch.Tensor) -> Optional[Seed]:
    if seed is None or isinstance(seed, int):
        return None if seed is None else seed + restart * _RESTART_STRIDE
    return [int(seed[i]) + restart * _RESTART_STRIDE for i in pending.tolist()]


def pgd_targeted(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        num_targets: Optional[int] = None,
        seed: Optional[Seed] = 0,
        **kwargs,
) -> torch.Tensor:
    """Multi-targeted PGD: one targeted run for each of the likeliest wrong classes, on the images that still resist.

    Targets go by descending logit of the clean image (Gowal et al. 2019, https://arxiv.org/abs/1910.09338); a single
    random target is a weak attack. For targets of your own, pass `targets` to `pgd`.

    Args:
        model, x, y, threat: See `pgd`.
        num_targets: Number of target classes per image; by default 9, or all wrong classes if there are fewer.
        seed: See `pgd`.
        **kwargs: Further arguments of `pgd`.

    Raises:
        InputError: See `pgd`, and if there are fewer than `num_targets` wrong classes.
    """
    labels = hard_labels(y)
    with crafting(model, kwargs.get('norm_mode', 'eval')), torch.no_grad():
        logits = model(x)
        num_targets = min(9, logits.shape[1] - 1) if num_targets is None else num_targets
        if not 1 <= num_targets < logits.shape[1]:
            raise InputError(
                f'num_targets={num_targets} must be between 1 and {logits.shape[1] - 1}, the number of wrong classes')
        ranked = logits.scatter(1, labels[:, None], float('-inf')).topk(num_targets, dim=1).indices
    adv = x.detach()
    pending = torch.arange(len(x), device=x.device)
    for k in range(num_targets):
        if len(pending) == 0:
            break
        own_seed = _restart_seed(seed, 0, pending)
        candidate = pgd(model, x[pending], y[pending], threat, targets=ranked[pending, k], seed=own_seed, **kwargs)
        adv = adv.index_copy(0, pending, candidate)
        with crafting(model, kwargs.get('norm_mode', 'eval')), torch.no_grad():
            pending = pending[model(candidate).argmax(dim=1) == labels[pending]]
    return adv


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


ATTACKS = {
    'fgsm': fgsm,
    'fgsm_rs': fgsm_rs,
    'bim': bim,
    'pgd': pgd,
    'pgd_targeted': pgd_targeted,
    'mim': mim,
    'cw_linf': cw_linf,
}
