"""MBNAT: adversarial training with a separate BatchNorm for each kind of image.

Xie & Yuille 2020, `Intriguing Properties of Adversarial Training at Scale` - https://arxiv.org/abs/1906.03787; Xie et
al. 2020, `Adversarial Examples Improve Image Recognition` - https://arxiv.org/abs/1911.09665
"""
import logging
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn

from ..errors import InputError, check_range
from ..layers import at_gamma, convert_aux_norm, has_aux_norm, set_gamma
from ..settings import setting
from .adversarial import SatTask
from .base import RobustTask
from .objective import Objective, RunSettings, register_objective

__all__ = ['MBNAT', 'MbnatTask']

_logger = logging.getLogger(__name__)


@register_objective
@dataclass(frozen=True, kw_only=True)
class MBNAT(Objective):
    """MBNAT: (1 - λ) L(x) + λ L(x*), each kind of image through its own BatchNorm."""
    name: ClassVar[str] = 'mbnat'

    weight: float = setting(
        .5, 'weight of the adversarial loss, in (0, 1)', metavar='LAMBDA', flat='adv_weight')
    gamma: Optional[float] = setting(
        None, 'weight of the adversarial BatchNorm in validation with mbnat, in [0, 1] (default: 0)',
        metavar='GAMMA')

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(self.weight)
        if self.gamma is not None:
            check_range('gamma', self.gamma, 0, 1,
                        note='0 is the BatchNorm for clean images, 1 the one for adversarial images')

    def task_class(self) -> Type[RobustTask]:
        """`MbnatTask`."""
        return MbnatTask

    def task_kwargs(self) -> Dict[str, Any]:
        """Only the weight, since `prepare_model` sets gamma on the network."""
        return {'weight': self.weight}

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Add auxiliary BatchNorms."""
        with self.naming_itself():
            return set_gamma(convert_aux_norm(model), self.gamma or 0.)

    def check_run(self, run: RunSettings) -> None:
        """Reject gradient checkpointing, and robust validation without a choice of BatchNorm."""
        super().check_run(run)
        check_checkpointing(self, run)
        if run.eval_metric == 'robust_top1' and self.gamma is None:
            raise InputError(
                'by default attacks mbnat through its BatchNorm for clean images',
                'choose a BatchNorm with `objective.gamma`; 1 is the one for adversarial images',
                argument='eval_metric', value='robust_top1')


def check_checkpointing(objective: Objective, run: RunSettings) -> None:
    """Reject gradient checkpointing for an objective whose passes normalize differently."""
    if run.grad_checkpointing:
        raise InputError(
            f'recomputes activations in the backward pass, after {objective.name} has changed the normalization',
            'leave it out', argument='grad_checkpointing', value=True)


def _check_weight(weight: float) -> None:
    if not 0 < weight < 1:
        raise InputError(
            'leaves one of the two BatchNorms untrained', 'must be in (0, 1)', argument='weight', value=weight)


class MbnatTask(SatTask):
    """(1 - λ) L(x) + λ L(x*), with clean images through the main BatchNorm, adversarial images through the auxiliary.

    Adversarial images are also crafted through the auxiliary BatchNorm. Outside training steps, for example in
    validation, `set_gamma` chooses the BatchNorm.

    Args:
        model: A model from `convert_aux_norm`, without gradient checkpointing.
        criterion: Any timm criterion.
        weight: λ, the weight of the adversarial loss, in (0, 1).
        **kwargs: Further arguments of `RobustTask`.

    Raises:
        InputError: If the model has no auxiliary BatchNorm, or λ is not in (0, 1), which would leave one BatchNorm
            untrained; in `forward`, if the model uses gradient checkpointing.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            weight: float = 0.5,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, weight=weight, **kwargs)
        _check_weight(weight)
        if not has_aux_norm(model):
            raise InputError('model has no auxiliary BatchNorm', 'call convert_aux_norm(model) first')

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'MbnatTask':
        """See `TwoPassTask`. Ignores `find_unused_parameters`, since each pass leaves one BatchNorm unused."""
        if ddp_kwargs.pop('find_unused_parameters', False):
            _logger.info('find_unused_parameters is ignored: the two passes of mbnat together use all parameters.')
        super().prepare_distributed(device_ids, **ddp_kwargs)
        return self

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adversarial images for a batch, crafted through the auxiliary BatchNorm."""
        with at_gamma(self.bare_model, 1.):
            return super().craft(input, target)

    def forward_both(self, input: torch.Tensor, adv: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Clean logits through the main BatchNorm, adversarial logits through the auxiliary one."""
        self.refuse_checkpointing()
        with at_gamma(self.bare_model, 0.):
            output = self.trainable_module(input)
        with at_gamma(self.bare_model, 1.):
            return output, self.trainable_module(adv)
