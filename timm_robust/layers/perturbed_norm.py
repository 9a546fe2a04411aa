"""Normalization with adversarially perturbed scale and shift (APART).

`Adversarially Perturbed Batch Normalization: A Simple Way to Improve Image Recognition` -
https://openreview.net/forum?id=2EQzEE5seF
"""
from contextlib import contextmanager
from functools import partial
from typing import Dict, Iterator, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from ..errors import InputError, check_at_least
from .norms import Norm, run_fused, tracking_norms
from .robust_norm import RobustNorm2d

__all__ = ['NormPerturbation']

# SyncBatchNorm and RobustNorm compute their statistics over the whole batch
_DIVISIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


def _forward_by_groups(
        norm: Norm,
        scale: torch.Tensor,
        shift: torch.Tensor,
        first: bool,
        x: torch.Tensor,
) -> torch.Tensor:
    """BatchNorm with scale and shift per group, (groups, C); in the second training pass also statistics per group."""
    groups, channels = scale.shape
    if len(x) % groups:
        raise InputError(f'must divide the {len(x)} images of a pass', argument='groups', value=groups)
    # merge one image of each group into one image, along channels, so that each channel belongs to one group
    grouped = (len(x) // groups, groups * channels, *x.shape[2:])
    scale, shift = scale.flatten().to(x.dtype), shift.flatten().to(x.dtype)
    if norm.training and not first:
        y = F.batch_norm(x.reshape(grouped), None, None, scale, shift, True, 0., norm.eps)
    else:
        momentum = norm.momentum
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
        y = F.batch_norm(x, norm.running_mean, norm.running_var, None, None, norm.training, momentum, norm.eps)
        one = (1, -1, *[1] * (x.ndim - 2))
        y = y.reshape(grouped) * scale.view(one) + shift.view(one)
    y = y.reshape(x.shape)
    return run_fused(norm, y)


class NormPerturbation:
    r"""The perturbation d of every normalization layer: out = γ (1 + d_var) (x̂ - d_mean · mean / spread) + β.

    x̂ is the input normalized by its batch, with gradients as usual. mean and spread in the shift are the tracked
    statistics at the start of a pass, without gradients (spread is sqrt(var + eps), for RobustNorm range^p + eps).
    d has one value per channel and group: image i belongs to group i modulo the number of groups, and in the
    adversarial pass each group has its own batch statistics.

    The model keeps its layers and its state dict keys. The perturbation applies only inside `clean_pass` and
    `adversarial_pass`.

    Args:
        model: A network with BatchNorm or RobustNorm layers.
        groups: Number of groups; more than one only for BatchNorm that is not synchronized.

    Raises:
        InputError: If there is no layer to perturb, or a layer cannot be split into groups. `clean_pass` raises it too,
            since layers may have been replaced.
    """

    def __init__(self, model: nn.Module, groups: int = 1):
        check_at_least('groups', groups)
        self.model = model
        self.groups = groups
        self.d: Dict[Norm, Tuple[torch.Tensor, torch.Tensor]] = {}
        self._find()

    def _find(self) -> None:
        """Look up the layers again, since conversions of the model may have replaced them."""
        self.tracking = list(tracking_norms(self.model).values())
        self.norms = [m for m in self.tracking if m.weight is not None]
        if not self.norms:
            raise InputError(
                f'{type(self.model).__name__} has no BatchNorm or RobustNorm layer with affine parameters')
        for norm in self.norms if self.groups > 1 else ():
            if type(norm) not in _DIVISIBLE:
                raise InputError(
                    f'{type(norm).__name__} cannot be split into groups, only a plain BatchNorm can',
                    'leave it at 1', argument='groups', value=self.groups)

    @property
    def tensors(self) -> List[torch.Tensor]:
        """d_mean and d_var of all layers; leaves of the graph after `clean_pass`."""
        return [t for pair in self.d.values() for t in pair]

    def ascend(self, gradients: List[torch.Tensor], epsilon: float) -> None:
        """Set d = epsilon · sign(gradient), or 0 where the gradient is NaN because the loss overflowed.

        Args:
            gradients: In the order of `tensors`; None for a layer that was not used.
            epsilon: Size of the step.
        """
        steps = iter([
            torch.zeros_like(d) if g is None else epsilon * torch.nan_to_num(g, nan=0.).sign()
            for d, g in zip(self.tensors, gradients)])
        self.d = {norm: (next(steps), next(steps)) for norm in self.norms}

    def _affine(self, norm: Norm) -> Tuple[torch.Tensor, torch.Tensor]:
        """Perturbed scale and shift, shape (groups, C)."""
        d_mean, d_var = self.d[norm]
        if isinstance(norm, RobustNorm2d):
            spread = norm.running_var.pow(norm.power) + norm.eps
        else:
            spread = (norm.running_var + norm.eps).sqrt()
        scale = norm.weight * (1 + d_var)
        return scale, norm.bias - scale * d_mean * (norm.running_mean / spread)

    @contextmanager
    def clean_pass(self) -> Iterator[None]:
        """The first pass: d is zero and requires a gradient; running statistics are updated as usual."""
        self._find()
        self.d = {
            norm: tuple(norm.weight.new_zeros(self.groups, norm.num_features, requires_grad=True) for _ in range(2))
            for norm in self.norms}
        with self._swapped(first=True):
            yield

    @contextmanager
    def adversarial_pass(self) -> Iterator[None]:
        """The second pass: uses the current d; running statistics are not updated."""
        with self._swapped(first=False):
            yield

    @contextmanager
    def _swapped(self, first: bool) -> Iterator[None]:
        before = [
            (norm, dict(norm.__dict__), dict(norm._parameters), norm._buffers.get('num_batches_tracked'))
            for norm in self.tracking]
        try:
            for norm in self.norms:
                scale, shift = self._affine(norm)
                if self.groups > 1:
                    norm.forward = partial(_forward_by_groups, norm, scale, shift, first)
                else:
                    norm._parameters.update(weight=scale[0], bias=shift[0])
            for norm in () if first else self.tracking:
                norm.momentum = 0.
                if norm._buffers.get('num_batches_tracked') is not None:
                    norm._buffers['num_batches_tracked'] = norm.num_batches_tracked.clone()
            yield
        finally:
            for norm, attributes, parameters, count in before:
                norm._parameters.update(parameters)
                if 'num_batches_tracked' in norm._buffers:
                    norm._buffers['num_batches_tracked'] = count
                # restore momentum, and a forward that other code may have set on the instance
                norm.__dict__.pop('forward', None)
                norm.__dict__.update({k: v for k, v in attributes.items() if k in ('momentum', 'forward')})
