"""RobustNorm: normalization by a power of the range instead of the standard deviation.

Paper: `Towards an Adversarially Robust Normalization Approach` - https://arxiv.org/abs/2006.11007

Written from the paper's equations.
"""
import warnings
from typing import Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import create_act_layer, register_notrace_module

from .range_norm import batch_mean_and_extrema, normalize_by, normalize_by_batch

__all__ = ['RobustNorm2d', 'RobustNormAct2d', 'BN_MODES']

BN_MODES = ('batch', 'mean', 'population')


@register_notrace_module
class RobustNorm2d(nn.Module):
    r"""Robust normalization of a (N, C, H, W) tensor.

    Per channel, over N, H and W:

    .. math:: y = \gamma \frac{x - \mu}{r^p + \epsilon} + \beta, \qquad r = \max x - \min x

    Running averages of :math:`\mu` and :math:`r` are kept in training. At inference `bn_mode` chooses what
    normalizes: ``'batch'`` (the paper's RN: both of the batch at hand), ``'mean'`` (RN with tracked mean: tracked
    mean, range of the batch) or ``'population'`` (both tracked). In the first two the prediction for an image depends
    on its neighbours in the batch, so ``'population'`` is the default; see `set_bn_mode` to switch a model.

    The layer is no subclass of BatchNorm: helpers that convert BatchNorm would silently turn it back into one. Its
    tracked range lives in ``running_var``, the name by which timm's ``distribute_bn`` and the paper's checkpoints know
    it; read it as `running_range`.

    The gradient of the maximum and of the minimum goes to one element each, as in the paper's code: the first in the
    order (N, H, W). A channel that is constant over the batch has r = 0. Its output is :math:`\beta` and its input gets
    gradient zero (the derivative of :math:`r^p` has a pole there, which gives NaN in the paper's code).

    Args:
        num_features: Number of channels C.
        eps: Added to the denominator.
        momentum: Weight of the newest batch in the running averages.
        affine: Learn a scale and a shift per channel.
        power: Exponent p of the range, in [0, 1]; 0.2 in the paper.
        bn_mode: What normalizes at inference, one of 'batch', 'mean', 'population'.

    Raises:
        ValueError: On an unknown `bn_mode`, a `power` outside [0, 1], and in training on one value per channel.
    """

    def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            momentum: float = 0.1,
            affine: bool = True,
            power: float = 0.2,
            bn_mode: str = 'population',
            device=None,
            dtype=None,
    ):
        super().__init__()
        if bn_mode not in BN_MODES:
            raise ValueError(f"bn_mode={bn_mode!r}: choose one of {', '.join(BN_MODES)}")
        if not 0 <= power <= 1:
            raise ValueError(f'power={power}: choose a value in [0, 1], the paper uses 0.2')
        dd = {'device': device, 'dtype': dtype}
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.power = power
        self.bn_mode = bn_mode
        self.sync = False
        self.process_group = None
        self._warned = False
        if affine:
            self.weight = nn.Parameter(torch.empty(num_features, **dd))
            self.bias = nn.Parameter(torch.empty(num_features, **dd))
        else:
            self.register_parameter('weight', None)
            self.register_parameter('bias', None)
        self.register_buffer('running_mean', torch.empty(num_features, **dd))
        self.register_buffer('running_var', torch.empty(num_features, **dd))
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
    def _synchronize(
            self,
            mean: torch.Tensor,
            high: torch.Tensor,
            low: torch.Tensor,
            count: int,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Each process fills its own row and one differentiable sum shares all rows: the gradient of a shared extremum
        # returns to the process that holds it.
        from torch.distributed.nn.functional import all_reduce
        world_size = dist.get_world_size(self.process_group)
        slot = torch.zeros(world_size, 1, 1, dtype=mean.dtype, device=mean.device)
        slot[dist.get_rank(self.process_group)] = 1
        own = torch.stack([mean * count, high, low, torch.full_like(mean, count)])
        total, high, low, counts = all_reduce(slot * own, group=self.process_group or dist.group.WORLD).unbind(1)
        return total.sum(0) / counts.sum(0), high.max(dim=0)[0], low.min(dim=0)[0]

    @torch.jit.unused
    def _warn_single_image(self) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"RobustNorm2d normalizes by bn_mode={self.bn_mode!r} of a batch of one image; "
                "use a larger batch or set_bn_mode(model, 'population')",
                stacklevel=3,
            )

    @torch.jit.unused
    def _shared(self) -> bool:
        return self.sync and dist.is_available() and dist.is_initialized()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.numel() == x.shape[1]:
            raise ValueError(f'Expected more than 1 value per channel when training, got input size {list(x.shape)}')
        if not self.training and self.bn_mode == 'population':
            return normalize_by(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.power, self.eps)
        if torch.jit.is_scripting() or self._needs_plain_autograd():
            y, mean, value_range = self._plainly(x)
        else:
            if not self.training and x.shape[0] == 1:
                self._warn_single_image()
            tracked_mean = self.running_mean if not self.training and self.bn_mode == 'mean' else None
            y, mean, value_range = normalize_by_batch(
                x, self.weight, self.bias, tracked_mean, self.power, self.eps)
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(value_range.to(self.running_var.dtype), self.momentum)
        return y

    def _plainly(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, high, low = batch_mean_and_extrema(x)
        if not torch.jit.is_scripting():
            if self.training and self._shared():
                mean, high, low = self._synchronize(mean, high, low, x.numel() // x.shape[1])
        if not self.training and self.bn_mode == 'mean':
            mean = self.running_mean.to(mean.dtype)
        y = normalize_by(x, mean, high - low, self.weight, self.bias, self.power, self.eps)
        return y, mean, high - low

    @torch.jit.unused
    def _needs_plain_autograd(self) -> bool:
        # statistics of several processes are gathered by autograd; compilers fuse better what they can see
        return torch.compiler.is_compiling() or (self.training and self._shared())

    def extra_repr(self) -> str:
        return (
            f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, '
            f'power={self.power}, bn_mode={self.bn_mode!r}'
        )


@register_notrace_module
class RobustNormAct2d(RobustNorm2d):
    """RobustNorm followed by an activation, in the place of timm's BatchNormAct2d.

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
            act_layer='relu',
            act_kwargs: Optional[dict] = None,
            inplace: bool = True,
            drop_layer=None,
            **kwargs,
    ):
        super().__init__(num_features, **kwargs)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        act = create_act_layer(act_layer, inplace=inplace, **(act_kwargs or {})) if apply_act else None
        self.act = act if act is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))
