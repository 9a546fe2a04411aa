"""The computation of RobustNorm, with autograd and with a closed-form backward pass."""
import math
from typing import Any, Optional, Tuple

import torch

from .._compat import are_functorch_transforms_active

__all__ = ['batch_mean_and_extrema', 'normalize_by', 'normalize_by_batch', 'statistics_dtype']

_Gradients = Tuple[Optional[torch.Tensor], ...]  # one per argument of the function, None if it has no gradient

# BatchNorm's backward kernel subtracts (x - mean) / spread^2 times a reduction. This spread makes that term vanish, and
# since it is a power of 2, scaling the reduction back is exact.
_SPREAD = 2. ** 40
_VECTOR = 64  # number of channels that fills the vector units of a CPU several times


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the statistics and the per-channel arithmetic for an input: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_mean_and_extrema(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, maximum and minimum of each channel over (N, H, W), in float32 or better, differentiable.

    The gradient of an extremum goes to one element of its channel, the first in the order (N, H, W).
    """
    per_image = x.flatten(2)
    mean = x.mean(dim=(0, 2, 3), dtype=statistics_dtype(x.dtype))
    high = per_image.max(dim=2)[0].max(dim=0)[0].to(mean.dtype)
    low = per_image.min(dim=2)[0].min(dim=0)[0].to(mean.dtype)
    return mean, high, low


def _inverse_and_slope(value_range: torch.Tensor, power: float, eps: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """1 / (range^power + eps) and minus its derivative, both 0 for a range of 0."""
    safe = value_range.clamp_min(1e-37)  # avoids subnormals in float32
    raised = safe.pow(power)
    inverse = (value_range > 0) / (raised + eps)
    return inverse, inverse * inverse * raised * power / safe


def _is_transformed() -> bool:
    """Whether a torch.func transform is active, which may differentiate tensors without `requires_grad`."""
    if torch.jit.is_scripting():
        return False
    else:
        return not torch.compiler.is_compiling() and are_functorch_transforms_active()


def _affine(
        x: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """(x - mean) · scale + bias in one pass, by BatchNorm with variance 1; no gradient for the mean."""
    return torch.batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0., 0., False)


def normalize_by(
        x: torch.Tensor,
        mean: torch.Tensor,
        value_range: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        power: float,
        eps: float,
) -> torch.Tensor:
    """weight · (x - mean) / (range^power + eps) + bias for a tensor (N, C, H, W) and vectors (C,)."""
    dtype = statistics_dtype(x.dtype)
    scale, _ = _inverse_and_slope(value_range.to(dtype), power, eps)
    if weight is not None:
        scale = scale * weight
    bias = None if bias is None else bias.to(dtype)
    mean = mean.to(dtype)
    if mean.requires_grad or _is_transformed():
        shift = -mean * scale if bias is None else bias - mean * scale
        return _affine(x, torch.zeros_like(scale), scale, shift)
    return _affine(x, mean, scale, bias)


def _image_extrema(x: torch.Tensor, channels_last: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """Maximum and minimum of each channel of each image, (N, C)."""
    if not channels_last:
        return x.amax((2, 3)), x.amin((2, 3))
    # few channels do not fill the vector units, so adjacent pixels are treated as extra channels
    n, c, h, w = x.shape
    pixels = math.gcd(h * w, _VECTOR // math.gcd(c, _VECTOR))
    rows = x.permute(0, 2, 3, 1).view(n, h * w // pixels, pixels * c)
    return rows.amax(1).view(n, pixels, c).amax(1), rows.amin(1).view(n, pixels, c).amin(1)


def _places(x: torch.Tensor, images: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Memory offsets of the first maximum and minimum of each channel, (2C,), given the images (2, C) they are in."""
    n, c, h, w = x.shape
    channels = torch.arange(c, device=x.device)
    rows = images * c + channels
    if channels_last:
        planes = x[images, channels].view(2, c, h * w)
    else:
        planes = x.view(n * c, h * w).index_select(0, rows.view(-1)).view(2, c, h * w)
    places = torch.stack([planes[0].argmax(1), planes[1].argmin(1)])
    if channels_last:
        return (images * (c * h * w) + places * c + channels).view(-1)
    return (rows * (h * w) + places).view(-1)


class _NormalizeByBatch(torch.autograd.Function):
    """`normalize_by` with batch statistics; saves only the input and per-channel vectors."""

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            weight: Optional[torch.Tensor],
            bias: Optional[torch.Tensor],
            tracked_mean: Optional[torch.Tensor],
            power: float,
            eps: float,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        x = x if channels_last else x.contiguous()
        dtype = statistics_dtype(x.dtype)
        mean = x.mean((0, 2, 3), dtype=dtype) if tracked_mean is None else tracked_mean.to(dtype)
        highs, lows = _image_extrema(x, channels_last)
        (high, highest), (low, lowest) = highs.max(0), lows.min(0)
        places = None
        if any(ctx.needs_input_grad):
            places = _places(x, torch.stack([highest, lowest]), channels_last)
        value_range = high.to(dtype) - low.to(dtype)
        inverse, slope = _inverse_and_slope(value_range, power, eps)
        scale = inverse if weight is None else inverse * weight
        y = _affine(x, mean, scale, None if bias is None else bias.to(dtype))
        ctx.save_for_backward(x, weight, mean, inverse, slope, places)
        ctx.settings = power, eps, tracked_mean is not None, channels_last, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, value_range)
        return y, mean, value_range

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> _Gradients:
        x, weight, mean, inverse, slope, places = ctx.saved_tensors
        power, eps, tracked, channels_last, bias_dtype = ctx.settings
        if torch.is_grad_enabled():
            return _differentiable_backward(dy, x, weight, mean if tracked else None, power, eps, bias_dtype)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        dy = dy.contiguous(memory_format=memory_format)
        scale = inverse if weight is None else inverse * weight
        if tracked:
            per_channel = (1, -1, 1, 1)
            dx = (dy * scale.view(per_channel)).to(dy.dtype)
            dbias = dy.sum((0, 2, 3), dtype=mean.dtype) if ctx.needs_input_grad[2] else None
            dotted = (x - mean.view(per_channel)).mul_(dy).sum((0, 2, 3))
        else:
            dx, dotted, dbias = torch.ops.aten.native_batch_norm_backward(
                dy, x, scale * _SPREAD, None, None, mean, torch.full_like(mean, 1 / _SPREAD), True, 0.,
                [True, True, True])
            dotted = dotted * _SPREAD
        dx = dx.contiguous(memory_format=memory_format)  # the layout of `places`
        of_range = dotted * slope if weight is None else dotted * slope * weight
        dx.as_strided((dx.numel(),), (1,)).index_add_(0, places, torch.cat([-of_range, of_range]).to(dx.dtype))
        dweight = None if weight is None else (dotted * inverse).to(weight.dtype)
        return dx, dweight, None if bias_dtype is None or dbias is None else dbias.to(bias_dtype), None, None, None


def _differentiable_backward(
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        tracked_mean: Optional[torch.Tensor],
        power: float,
        eps: float,
        bias_dtype: Optional[torch.dtype],
) -> _Gradients:
    """A backward pass that can be differentiated again."""
    inputs = [t for t in (x, weight) if t is not None and t.requires_grad]
    with torch.enable_grad():
        mean, high, low = batch_mean_and_extrema(x)
        mean = mean if tracked_mean is None else tracked_mean
        y = normalize_by(x, mean, high - low, weight, None, power, eps)
    gradients = iter(torch.autograd.grad(y, inputs, dy, create_graph=True) if inputs else ())
    dx, dweight = (next(gradients) if any(t is i for i in inputs) else None for t in (x, weight))
    return dx, dweight, None if bias_dtype is None else dy.sum((0, 2, 3), dtype=bias_dtype), None, None, None


def _normalize_plainly(
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        tracked_mean: Optional[torch.Tensor],
        power: float,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`normalize_by_batch` with autograd's backward pass."""
    mean, high, low = batch_mean_and_extrema(x)
    y = normalize_by(x, mean if tracked_mean is None else tracked_mean, high - low, weight, bias, power, eps)
    return y, mean.detach(), (high - low).detach()


def normalize_by_batch(
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        tracked_mean: Optional[torch.Tensor],
        power: float,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize by the range of the batch, and by its mean or a tracked one.

    Args:
        x: Input (N, C, H, W).
        weight, bias: Scale and shift (C,), or None.
        tracked_mean: Mean (C,) to use instead of the batch mean, without a gradient.
        power, eps: See `RobustNorm2d`.

    Returns:
        The output, mean and range of the batch (C,), which have no gradient. Where a channel has several largest or
        smallest elements, the gradient of its range goes to the first in the order (N, H, W).
    """
    if torch.jit.is_scripting():
        return _normalize_plainly(x, weight, bias, tracked_mean, power, eps)
    else:
        # compilers fuse plain operations better, and torch.func can transform them
        if torch.compiler.is_compiling() or are_functorch_transforms_active():
            return _normalize_plainly(x, weight, bias, tracked_mean, power, eps)
        return _NormalizeByBatch.apply(x, weight, bias, tracked_mean, power, eps)
