"""AutoAttack: an ensemble of parameter-free attacks, each on the images that withstood those before it.

Croce & Hein 2020, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks` -
https://arxiv.org/abs/2003.01690, section 5; the versions and their parameters are those of the authors' code.
"""
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from ..errors import InputError
from .adaptive import adaptive_batch
from .apgd import apgd_ce, apgd_dlr, apgd_t
from .context import crafting
from .cw_l2 import cw_l2
from .fab import fab, fab_t
from .losses import hard_labels
from .noise import image_seeds
from .pgd import bim, cw_linf, fgsm, fgsm_rs, mim, pgd, pgd_targeted
from .rays import rays
from .search import logits_of
from .square import square
from .threat import InputSpace, Seed, ThreatModel

__all__ = ['ATTACKS', 'AUTOATTACK_VERSIONS', 'autoattack', 'autoattack_parts']

ATTACKS: Dict[str, Callable] = {
    'fgsm': fgsm,
    'fgsm_rs': fgsm_rs,
    'bim': bim,
    'pgd': pgd,
    'pgd_targeted': pgd_targeted,
    'mim': mim,
    'cw_linf': cw_linf,
    'cw_l2': cw_l2,
    'apgd_ce': apgd_ce,
    'apgd_dlr': apgd_dlr,
    'apgd_t': apgd_t,
    'fab': fab,
    'fab_t': fab_t,
    'square': square,
    'rays': rays,
    'adaptive_batch': adaptive_batch,
}

_STANDARD = (('apgd_ce', {}), ('apgd_t', {}), ('fab_t', {}), ('square', {}))

AUTOATTACK_VERSIONS: Dict[str, Tuple[Tuple[str, Dict[str, Any]], ...]] = {
    'standard': _STANDARD,
    'plus': (
        ('apgd_ce', {'restarts': 5}),
        ('apgd_dlr', {'restarts': 5}),
        ('fab', {'restarts': 5}),
        ('square', {}),
        ('apgd_t', {}),
        ('fab_t', {}),
    ),
    'rand': (('apgd_ce', {'eot_iter': 20}), ('apgd_dlr', {'eot_iter': 20})),
}

CLASSES_NEEDED = {'apgd_dlr': 3, 'apgd_t': 4}  # 2 for all others


def autoattack_parts(version: str, num_classes: int) -> Tuple[Tuple[str, Dict[str, Any]], ...]:
    """Attacks of a version with their settings, for a network with `num_classes` classes.

    Targeted attacks steer towards 9 classes, or all wrong ones if there are fewer.

    Raises:
        InputError: On an unknown version, and if a part needs more classes.
    """
    if version not in AUTOATTACK_VERSIONS:
        raise InputError(f"version={version!r} is unknown: choose one of {', '.join(AUTOATTACK_VERSIONS)}")
    parts = AUTOATTACK_VERSIONS[version]
    for name, _ in parts:
        if num_classes < CLASSES_NEEDED.get(name, 2):
            raise InputError(
                f'version={version!r} needs {CLASSES_NEEDED[name]} classes for {name}, the model has {num_classes}: '
                'run apgd_ce, fab_t and square by themselves')
    return parts


def autoattack(
        model: Callable,
        x: torch.Tensor,
        y: torch.Tensor,
        threat: ThreatModel,
        *,
        version: str = 'standard',
        space: Optional[InputSpace] = None,
        batch_size: Optional[int] = None,
        search_model: Optional[Callable] = None,
        seed: Seed = 0,
) -> torch.Tensor:
    """AutoAttack.

    Args:
        model: Maps images to logits.
        x: Clean images, shape (N, C, H, W), pixels in [0, 1] or in `space`.
        y: True class indices, shape (N,).
        threat: Norm and eps.
        version: 'standard' (APGD-CE, APGD-T, FAB-T, Square), 'plus' (with restarts, APGD-DLR and untargeted FAB) or
            'rand' (for networks with noise inside).
        space, batch_size, search_model, seed: See `apgd_ce`.

    Returns:
        Images like x: one that fools within eps of x, x itself where none was found.

    Raises:
        InputError: See `apgd_ce`, and on an unknown version or too few classes.
    """
    labels, seeds = hard_labels(y), image_seeds(seed, len(x), x.device)
    with crafting(model):
        logits = logits_of(model, x, batch_size)
        adv, holds = x.detach().clone(), logits.argmax(1) == labels
        for name, settings in autoattack_parts(version, logits.shape[1]):
            left = holds.nonzero().squeeze(1)
            if not len(left):
                break
            candidate = ATTACKS[name](
                model, x[left], labels[left], threat, space=space, batch_size=batch_size, search_model=search_model,
                seed=seeds[left], **settings)
            withstood = logits_of(model, candidate, batch_size).argmax(1) == labels[left]
            fallen = left[~withstood]
            adv[fallen], holds[fallen] = candidate[~withstood], False
    return adv
