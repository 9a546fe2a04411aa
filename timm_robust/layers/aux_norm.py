"""An auxiliary BatchNorm for every BatchNorm, for a second kind of images.

Xie et al. 2020, `Adversarial Examples Improve Image Recognition` - https://arxiv.org/abs/1911.09665; Xie & Yuille 2020,
`Intriguing Properties of Adversarial Training at Scale` - https://arxiv.org/abs/1906.03787
"""
import copy
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, SyncBatchNormAct

from ..errors import InputError, check_choice, check_range
from .conversion import recast, replace_modules
from .norms import BatchNormMode, Norm, is_batch_norm, plain_class, run_fused

__all__ = ['AUX_CLASSES', 'AuxNorm', 'at_gamma', 'convert_aux_norm', 'has_aux_norm', 'plain_branch', 'set_gamma']


class AuxNorm(BatchNormMode):
    """Mixin for a BatchNorm class: at `gamma` 0 the layer itself, at 1 its auxiliary twin, in between a mixture.

    Attributes:
        aux: The twin, a layer of the class without the mixin.
        gamma: Weight of the twin, in [0, 1].
    """
    aux: Norm
    gamma: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer itself, its twin or, at inference, a mixture of both."""
        if self.gamma == 0:
            return super().forward(x)
        if self.gamma == 1:
            return self.aux(x)
        if self.training:
            raise InputError(
                'mixes two BatchNorms, which only works in eval mode', 'choose 0 or 1', argument='gamma',
                value=self.gamma)
        main, aux = (
            F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0., n.eps)
            for n in (self, self.aux))
        x = torch.lerp(main, aux, self.gamma)
        return run_fused(self, x)

    def extra_repr(self) -> str:
        """Settings, gamma last."""
        return f'{super().extra_repr()}, gamma={self.gamma:g}'


class AuxBatchNorm1d(AuxNorm, nn.BatchNorm1d):
    """BatchNorm1d with an auxiliary twin."""


class AuxBatchNorm2d(AuxNorm, nn.BatchNorm2d):
    """BatchNorm2d with an auxiliary twin."""


class AuxBatchNorm3d(AuxNorm, nn.BatchNorm3d):
    """BatchNorm3d with an auxiliary twin."""


class AuxSyncBatchNorm(AuxNorm, nn.SyncBatchNorm):
    """SyncBatchNorm with an auxiliary twin."""


class AuxBatchNormAct2d(AuxNorm, BatchNormAct2d):
    """BatchNormAct2d with an auxiliary twin."""


class AuxSyncBatchNormAct(AuxNorm, SyncBatchNormAct):
    """SyncBatchNormAct with an auxiliary twin."""


AUX_CLASSES: Dict[Any, Any] = {c.__bases__[1]: c for c in AuxNorm.__subclasses__()}


def _aux_norms(model: nn.Module) -> List[AuxNorm]:
    """Layers with a twin.

    Raises:
        InputError: If there is none.
    """
    norms = [m for m in model.modules() if isinstance(m, AuxNorm)]
    if not norms:
        raise InputError(f'{type(model).__name__} has no auxiliary normalization', 'call convert_aux_norm first')
    return norms


def has_aux_norm(model: nn.Module) -> bool:
    """Whether a model has auxiliary normalization."""
    return any(isinstance(m, AuxNorm) for m in model.modules())


def _with_twin(norm: Norm) -> nn.Module:
    """A replacement for a BatchNorm layer, with a twin."""
    name = type(norm).__name__
    if isinstance(norm, BatchNormMode):
        raise InputError(
            f'{name} uses batch statistics, but auxiliary BatchNorm needs tracked statistics',
            "call set_bn_mode(model, 'population') first")
    if type(norm) not in AUX_CLASSES or norm.running_mean is None:
        raise InputError(
            f'{name} tracks no statistics or is a custom BatchNorm, so it cannot have a twin',
            'replace it with a BatchNorm of torch or timm')
    new = recast(norm, AUX_CLASSES[type(norm)])
    new.aux = copy.deepcopy(norm)
    new.gamma = 0.
    return new


def convert_aux_norm(model: nn.Module) -> nn.Module:
    """Give every BatchNorm of a model an auxiliary twin with its own statistics and affine parameters.

    The twin starts as a copy. State dict keys stay the same, and the twin's are added under `aux.`.

    Args:
        model: A built model, changed in place (a bare BatchNorm is not: use the return value).

    Returns:
        The converted model.

    Raises:
        InputError: If the model has no BatchNorm, or has one that tracks no statistics, uses batch statistics at
            inference, or is a custom class.
    """
    if has_aux_norm(model):
        return model
    norms = [m for m in model.modules() if is_batch_norm(m)]
    if not norms:
        raise InputError(f'{type(model).__name__} has no BatchNorm to give an auxiliary twin')
    return replace_modules(model, {norm: _with_twin(norm) for norm in norms})


def set_gamma(model: nn.Module, gamma: float) -> nn.Module:
    """Choose the active BatchNorm: 0 the main one, 1 the auxiliary one, in between (at inference only) a mixture.

    Args:
        model: A model from `convert_aux_norm`, changed in place.
        gamma: In [0, 1].

    Returns:
        The model.

    Raises:
        InputError: If `gamma` is outside [0, 1] or the model has no auxiliary normalization.
    """
    check_range('gamma', gamma, 0, 1, note='0 is the main BatchNorm, 1 the auxiliary one')
    for norm in _aux_norms(model):
        norm.gamma = gamma
    return model


@contextmanager
def at_gamma(model: nn.Module, gamma: float) -> Iterator[None]:
    """Set gamma as `set_gamma` does, and restore it afterwards."""
    before = [(norm, norm.gamma) for norm in _aux_norms(model)]
    set_gamma(model, gamma)
    try:
        yield
    finally:
        for norm, value in before:
            norm.gamma = value


def _main_branch(norm: AuxNorm) -> nn.Module:
    plain = recast(norm, plain_class(norm))
    del plain.aux, plain.gamma
    return plain


def plain_branch(model: nn.Module, branch: str) -> nn.Module:
    """Copy a model with auxiliary normalization, keeping one branch as plain BatchNorm.

    Args:
        model: A model from `convert_aux_norm`.
        branch: 'main' or 'aux'.

    Raises:
        InputError: On an unknown branch, or if the model has no auxiliary normalization.
    """
    check_choice('branch', branch, ('main', 'aux'))
    plain = copy.deepcopy(model)
    return replace_modules(
        plain, {norm: norm.aux if branch == 'aux' else _main_branch(norm) for norm in _aux_norms(plain)})
