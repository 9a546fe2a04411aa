"""A second BatchNorm beside every BatchNorm, for images of another kind.

Xie et al. 2020, `Adversarial Examples Improve Image Recognition` - https://arxiv.org/abs/1911.09665; Xie & Yuille 2020,
`Intriguing Properties of Adversarial Training at Scale` - https://arxiv.org/abs/1906.03787
"""
import copy
from contextlib import contextmanager
from functools import cache
from typing import Any, Dict, Iterator, List, Type

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    'convert_aux_norm',
    'has_aux_norm',
    'at_gamma',
    'plain_branch',
    'set_gamma',
    'branch_state_dict',
]

_AUX = '.aux.'


class _Branches:
    """Mixin over a BatchNorm class: `gamma` 0 is the layer itself, 1 its auxiliary twin, between they are mixed."""
    gamma = 0.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gamma == 0:
            return super().forward(x)
        if self.gamma == 1:
            return self.aux(x)
        if self.training:
            raise RuntimeError(f'gamma={self.gamma}: in training one branch normalizes, 0 or 1')
        main, aux = (
            F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0., n.eps)
            for n in (self, self.aux))
        x = torch.lerp(main, aux, self.gamma)
        # timm's fused layers have more to do, plain and synchronized
        return self.act(self.drop(x)) if hasattr(self, 'act') else x


@cache
def _with_branches(norm_class: Type[nn.Module]) -> Type[nn.Module]:
    return type(f'Branches{norm_class.__name__}', (_Branches, norm_class), {})


def _branched(model: nn.Module) -> List[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _Branches)]


def has_aux_norm(model: nn.Module) -> bool:
    """Whether a model has auxiliary normalization."""
    return bool(_branched(model))


def convert_aux_norm(model: nn.Module) -> nn.Module:
    """Give every BatchNorm of a model an auxiliary twin with statistics and affine parameters of its own.

    The twin starts as a copy. Names in the state dict stay, the twin's are added under `aux.`. Convert to synchronized
    BatchNorm before, not after: timm's conversion makes new layers.

    Args:
        model: A built model, changed in place.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no BatchNorm with tracked statistics.
    """
    if has_aux_norm(model):
        return model
    norms = [
        m for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(f'{type(model).__name__} has no BatchNorm to give an auxiliary twin')
    for norm in norms:
        twin = copy.deepcopy(norm)
        norm.__class__ = _with_branches(type(norm))
        norm.aux = twin
    return model


def set_gamma(model: nn.Module, gamma: float) -> nn.Module:
    """Choose what normalizes: 0 the main BatchNorm, 1 the auxiliary one; between, at inference, a mixture of outputs.

    Args:
        model: A model of `convert_aux_norm`, changed in place.
        gamma: In [0, 1].

    Returns:
        The model.

    Raises:
        ValueError: If `gamma` is outside [0, 1] or the model has no auxiliary normalization.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f'gamma={gamma} must be in [0, 1]: 0 is the main BatchNorm, 1 the auxiliary one')
    if not has_aux_norm(model):
        raise ValueError(f'gamma={gamma}: {type(model).__name__} has no auxiliary normalization')
    for norm in _branched(model):
        norm.gamma = gamma
    return model


@contextmanager
def at_gamma(model: nn.Module, gamma: float) -> Iterator[None]:
    """`set_gamma` for a while."""
    before = [(norm, norm.gamma) for norm in _branched(model)]
    set_gamma(model, gamma)
    try:
        yield
    finally:
        for norm, value in before:
            norm.gamma = value


def plain_branch(model: nn.Module, branch: str) -> nn.Module:
    """A copy of a model with auxiliary normalization as the plain model it was, with one branch.

    Args:
        model: A model of `convert_aux_norm`.
        branch: 'main' or 'aux'.
    """
    weights = branch_state_dict(model.state_dict(), branch)
    plain = copy.deepcopy(model)
    for norm in _branched(plain):
        del norm.aux
        norm.__dict__.pop('gamma', None)
        norm.__class__ = type(norm).__mro__[2]
    plain.load_state_dict(weights)
    return plain


def branch_state_dict(state_dict: Dict[str, Any], branch: str) -> Dict[str, Any]:
    """A state dict for the plain model out of one with auxiliary normalization.

    Args:
        state_dict: Of a model of `convert_aux_norm`.
        branch: 'main' or 'aux'.

    Raises:
        ValueError: On another branch.
    """
    if branch not in ('main', 'aux'):
        raise ValueError(f"branch={branch!r}: choose 'main' or 'aux'")
    plain = {k: v for k, v in state_dict.items() if _AUX not in k}
    if branch == 'aux':
        plain.update({k.replace(_AUX, '.'): v for k, v in state_dict.items() if _AUX in k})
    return plain
