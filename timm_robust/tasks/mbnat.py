"""MBNAT: adversarial training with a BatchNorm of its own for each kind of image.

Xie & Yuille 2020, `Intriguing Properties of Adversarial Training at Scale` - https://arxiv.org/abs/1906.03787; Xie et
al. 2020, `Adversarial Examples Improve Image Recognition` - https://arxiv.org/abs/1911.09665
"""
import logging
from typing import Any, Callable, Optional, Tuple

import torch
import torch.nn as nn

from ..errors import InputError
from ..layers import at_gamma, has_aux_norm
from .adversarial import AdversarialTask

__all__ = ['MbnatTask']

_logger = logging.getLogger(__name__)


class MbnatTask(AdversarialTask):
    """(1 - λ) L(x) + λ L(x*), clean images through the main BatchNorm, adversarial ones through the auxiliary.

    Images are crafted through the auxiliary one too. At rest, in validation for example, the network normalizes by what
    `set_gamma` chose.

    Args:
        model: A model of `convert_aux_norm`, without gradient checkpointing.
        criterion, attack, adv_weight, **kwargs: See `AdversarialTask`.

    Raises:
        InputError: If the model has no auxiliary BatchNorm, or λ is 0 or 1, which would leave one of them untrained;
            in `forward` if it has gradient checkpointing.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            adv_weight: float = 0.5,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, adv_weight=adv_weight, **kwargs)
        if not has_aux_norm(model):
            raise InputError('model has no auxiliary BatchNorm: call convert_aux_norm(model) before')
        if adv_weight in (0, 1):
            raise InputError(f'adv_weight={adv_weight} leaves one of the two BatchNorms untrained: must be in (0, 1)')

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'MbnatTask':
        """See `TwoPassTask`; each pass leaves one BatchNorm unused, which `find_unused_parameters` would stumble on."""
        if ddp_kwargs.pop('find_unused_parameters', False):
            _logger.info('find_unused_parameters is left out: the two passes of mbnat use all parameters together.')
        return super().prepare_distributed(device_ids, **ddp_kwargs)

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adversarial images for a batch, by the network with auxiliary normalization."""
        with at_gamma(self.bare_model, 1.):
            return super().craft(input, target)

    def forward_both(self, input: torch.Tensor, adv: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Clean logits by the main BatchNorm, adversarial ones by the auxiliary."""
        self.refuse_checkpointing()
        with at_gamma(self.bare_model, 0.):
            output = self.trainable_module(input)
        with at_gamma(self.bare_model, 1.):
            return output, self.trainable_module(adv)
