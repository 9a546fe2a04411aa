"""RobustNorm: normalization by a power of the range instead of the standard deviation.

Paper: `Towards an Adversarially Robust Normalization Approach` - https://arxiv.org/abs/2006.11007

Written from the paper's equations.
"""
import warnings
from functools import partial
from typing import Any, Dict, Optional, Tuple, Type, Union

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import create_act_layer, register_notrace_module

from ..errors import InputError, check_choice, check_range
from .range_norm import batch_mean_and_extrema, normalize_by, normalize_by_batch, statistics_dtype

__all__ = ['BN_MODES', 'RobustNorm2d', 'RobustNormAct2d']

BN_MODES = ('batch', 'mean', 'population')


def _warn_single_image(bn_mode: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"RobustNorm2d with bn_mode={bn_mode!r} normalizes a batch of one image; "
            "use a larger batch or set_bn_mode(model, 'population')",
            stacklevel=2,
        )


@torch.fx.wrap  # torch.fx traces it as a single call, like batch_norm
def robust_norm(
        x: torch.Tensor,
        running_mean: torch.Tensor,
        running_range: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        training: bool,
        momentum: float,
        power: float,
        eps: float,
        bn_mode: str,
) -> torch.Tensor:
    """The function behind `RobustNorm2d`, as `torch.nn.functional.batch_norm` is behind BatchNorm.

    Args:
        x: Input (N, C, H, W). An empty input gives an empty output and leaves the running averages unchanged.
        running_mean, running_range: Tracked statistics (C,), updated in place in training.
        weight, bias: Scale and shift (C,), or None.
        training: Normalize by the batch and update the running averages.
        momentum, power, eps, bn_mode: See `RobustNorm2d`.

    Returns:
        The normalized input, in the input's dtype.

    Raises:
        InputError: On an input that is not (N, C, H, W), and in training on a single value per channel.
    """
    if x.dim() != 4:
        raise InputError(f'Expected an input of shape (N, C, H, W), got {list(x.shape)}')
    if (not training and bn_mode == 'population') or x.numel() == 0:
        return normalize_by(x, running_mean, running_range, weight, bias, power, eps)
    if training and x.numel() == x.shape[1]:
        raise InputError(
            f'Expected more than 1 value per channel when training, got input size {list(x.shape)}',
            'use a larger batch')
    tracked_mean = running_mean if not training and bn_mode == 'mean' else None
    if not torch.jit.is_scripting():
        if not training and x.shape[0] == 1:
            _warn_single_image(bn_mode)
    y, mean, value_range = normalize_by_batch(x, weight, bias, tracked_mean, power, eps)
    if training:
        _track(running_mean, running_range, mean, value_range, momentum)
    return y


def _track(
        running_mean: torch.Tensor,
        running_range: torch.Tensor,
        mean: torch.Tensor,
        value_range: torch.Tensor,
        momentum: float,
) -> None:
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_range.lerp_(value_range.to(running_range.dtype), momentum)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes. It is its own adjoint, so its backward pass can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Tuple[torch.Tensor, None]:
        return _SumOverProcesses.apply(gradient.contiguous(), ctx.group), None


@register_notrace_module
class RobustNorm2d(nn.Module):
    r"""Robust normalization of a (N, C, H, W) tensor.

    Per channel, over N, H and W:

    .. math:: y = \gamma \frac{x - \mu}{r^p + \epsilon} + \beta, \qquad r = \max x - \min x

    Running averages of :math:`\mu` and :math:`r` are updated in training. At inference `bn_mode` chooses the
    statistics: ``'batch'`` (the paper's RN: both of the current batch), ``'mean'`` (RN with tracked mean: tracked
    mean, range of the batch) or ``'population'`` (both tracked). With the first two the prediction for an image depends
    on the other images of the batch, so ``'population'`` is the default; see `set_bn_mode` to switch a model.

    The layer is not a subclass of BatchNorm, since helpers that convert BatchNorm would silently turn it back into one.
    Its tracked range is stored as ``running_var``, the name that timm's ``distribute_bn`` and the paper's checkpoints
    use; read it as `running_range`.

    The gradient of the maximum and of the minimum goes to one element each, as in the paper's code: the first in the
    order (N, H, W). A channel that is constant over the batch has r = 0. Its output is :math:`\beta` and its input gets
    gradient zero (the derivative of :math:`r^p` has a pole there, which gives NaN in the paper's code).

    Args:
        num_features: Number of channels C.
        eps: Added to the denominator.
        momentum: Weight of the newest batch in the running averages.
        affine: Learn a scale and a shift per channel.
        power: Exponent p of the range, in [0, 1]; 0.2 in the paper.
        bn_mode: Statistics used at inference: 'batch', 'mean' or 'population'.

    Raises:
        InputError: On an unknown `bn_mode` or a `power` outside [0, 1]; in `forward`, on an input of another shape, and
            in training on a single value per channel.
    """
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            momentum: float = 0.1,
            affine: bool = True,
            power: float = 0.2,
            bn_mode: str = 'population',
            device: Union[torch.device, str, None] = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        check_choice('bn_mode', bn_mode, BN_MODES)
        check_range('power', power, 0, 1, note='the paper uses 0.2')
        empty = partial(torch.empty, num_features, device=device, dtype=dtype)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.power = power
        self.bn_mode = bn_mode
        self.sync = False
        self.process_group: Any = None
        if affine:
            self.weight = nn.Parameter(empty())
            self.bias = nn.Parameter(empty())
        else:
            self.register_parameter('weight', None)
            self.register_parameter('bias', None)
        self.register_buffer('running_mean', empty())
        self.register_buffer('running_var', empty())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset scale, shift and running averages."""
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @property
    def running_range(self) -> torch.Tensor:
        """Tracked range per channel, shape (C,)."""
        return self.running_var

    @torch.jit.unused
    def _is_shared(self) -> bool:
        return self.sync and dist.is_available() and dist.is_initialized() and (
            dist.get_world_size(self.process_group) > 1)

    @torch.jit.unused
    def _normalize_together(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize with statistics over the batches of all processes, and track them."""
        dtype = statistics_dtype(x.dtype)
        if x.numel():
            mean, high, low = batch_mean_and_extrema(x)
        else:  # a process with an empty batch must still take part, in the backward pass too
            mean = x.sum(dtype=dtype).expand(x.shape[1])
            high, low = mean - float('inf'), mean + float('inf')
        count = x.numel() // x.shape[1]
        own = torch.stack([mean * count, high, low, torch.full_like(mean, count)])
        # Each process fills its own row and one differentiable sum shares all rows: the gradient of a shared extremum
        # returns to the process that holds it. Indexing the row would force a GPU sync.
        rank, processes = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        rows = torch.stack([own if row == rank else torch.zeros_like(own) for row in range(processes)])
        total, highs, lows, counts = _SumOverProcesses.apply(rows, self.process_group).unbind(1)
        mean = total.sum(0) / counts.sum(0)
        value_range = highs.max(dim=0)[0] - lows.min(dim=0)[0]
        _track(self.running_mean, self.running_var, mean, value_range, self.momentum)
        return normalize_by(x, mean, value_range, self.weight, self.bias, self.power, self.eps)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """The normalized input, before a subclass applies its activation."""
        if not torch.jit.is_scripting():
            if self.training and self._is_shared():
                return self._normalize_together(x)
        return robust_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.power,
            self.eps, self.bn_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize (N, C, H, W)."""
        return self.normalize(x)

    def extra_repr(self) -> str:
        return (
            f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, '
            f'power={self.power}, bn_mode={self.bn_mode!r}'
        )


@register_notrace_module
class RobustNormAct2d(RobustNorm2d):
    """RobustNorm followed by an activation, the counterpart of timm's BatchNormAct2d.

    Args:
        num_features: Number of channels C.
        apply_act: Apply the activation.
        act_layer: Activation name or class.
        act_kwargs: Arguments of the activation.
        inplace: Run the activation in place.
        drop_layer: Dropout class between norm and activation.
        **kwargs: Arguments of `RobustNorm2d`.
    """

    def __init__(
            self,
            num_features: int,
            apply_act: bool = True,
            act_layer: Union[str, Type[nn.Module]] = 'relu',
            act_kwargs: Optional[Dict[str, Any]] = None,
            inplace: bool = True,
            drop_layer: Optional[Type[nn.Module]] = None,
            **kwargs: Any,
    ):
        super().__init__(num_features, **kwargs)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        act = create_act_layer(act_layer, inplace=inplace, **(act_kwargs or {})) if apply_act else None
        self.act = act if act is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(self.normalize(x)))
