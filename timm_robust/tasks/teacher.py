"""Robust distillation: a robust network's probabilities on clean images replace the labels.

With all weight on the teacher, `SAT(weight=5 / 6)` is RSLAD, whose loss and attack use divergences from the teacher:
Zi et al. 2021, `Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better` -
https://arxiv.org/abs/2108.07969, equations 4 to 6.
"""
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..attacks import attack_mode
from ..errors import InputError, check_range
from ..settings import check_types, setting

__all__ = ['RobustTeacher', 'Teacher']


@dataclass(frozen=True, kw_only=True)
class RobustTeacher:
    """Settings of robust distillation, which works with every objective that crafts images and takes soft targets.

    Raises:
        InputError: On bad values.
    """
    prefix: ClassVar[str] = 'robust_teacher'

    model: str = setting(
        '', 'robust distillation: train on the probabilities of this network for clean images; a timm model with '
        'pretrained weights, or an exported folder', metavar='MODEL', flat='robust_teacher')
    checkpoint: str = setting('', 'weights of the teacher', metavar='PATH')
    weight: float = setting(
        1., "weight of the teacher's probabilities in the targets, in (0, 1]; labels get the rest", metavar='WEIGHT')

    def __post_init__(self) -> None:
        check_types(self)
        check_range('weight', self.weight, 0, 1, open_low=True)
        for field, given in (('checkpoint', self.checkpoint), ('weight', self.weight != 1)):
            if given and not self.model:
                raise InputError('needs a teacher', 'pass `model`, or leave it out', argument=field,
                                 value=getattr(self, field))


class Teacher:
    """Soft targets from another network.

    Args:
        model: Maps pixels in [0, 1], shape (N, C, H, W), to logits (N, K). It is run in eval mode.
        weight: Weight of its probabilities, in (0, 1]; the labels get the rest.

    Raises:
        InputError: If `weight` is out of range.
    """

    def __init__(self, model: nn.Module, weight: float = 1.):
        check_range('weight', weight, 0, 1, open_low=True)
        self.model, self.weight = model, weight

    def targets(self, pixels: torch.Tensor, target: torch.Tensor, smoothing: float = 0.) -> torch.Tensor:
        """Soft targets (N, K) for images in [0, 1].

        Args:
            pixels: Clean images, shape (N, C, H, W).
            target: Class indices (N,) or soft targets (N, K).
            smoothing: Label smoothing of class indices.
        """
        with attack_mode(self.model), torch.no_grad():
            probabilities = self.model(pixels).float().softmax(dim=1)
        num_classes = probabilities.shape[1]
        if target.ndim == 1:
            target = (1 - smoothing) * F.one_hot(target, num_classes) + smoothing / num_classes
        return torch.lerp(target.to(probabilities), probabilities, self.weight)
