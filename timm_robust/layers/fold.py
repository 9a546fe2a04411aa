"""A copy of a network that computes the same function with less work, for searches that evaluate it thousands of times.

In eval mode a normalization by tracked statistics is an affine map and goes into the convolution before it, and a
standardized weight stands still.
"""
import copy
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import ScaledStdConv2d, StdConv2d

from .robust_norm import RobustNorm2d
from .statistics import has_batch_statistics
from .weight_standardization import standardized_weight

__all__ = ['fold_for_inference']

# Folding reorders float32 sums: logits may differ by this share of their largest magnitude, or the copy is not used.
_TOLERANCE = 1e-3


def _is_tracked_norm(module: nn.Module) -> bool:
    known = isinstance(module, (nn.BatchNorm2d, RobustNorm2d))
    return known and not has_batch_statistics(module)


def _affine(norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift per channel of a normalization by tracked statistics, in float64."""
    mean, spread = norm.running_mean.double(), norm.running_var.double()
    if isinstance(norm, RobustNorm2d):
        varies = spread > 0
        scale = torch.where(varies, 1 / (torch.where(varies, spread, 1.).pow(norm.power) + norm.eps), 0.)
    else:
        scale = (spread + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _plain_conv(conv: nn.Conv2d) -> Optional[nn.Conv2d]:
    """The convolution as a plain one with its weight as it is used, or None if it does more."""
    if type(conv) is nn.Conv2d:
        weight = conv.weight
    elif type(conv) in (StdConv2d, ScaledStdConv2d):
        weight = standardized_weight(conv)
    else:
        return None
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias=True, padding_mode=conv.padding_mode, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.zero_() if conv.bias is None else plain.bias.copy_(conv.bias)
    return plain


def _observe(model: nn.Module, x: torch.Tensor) -> Tuple[Dict[str, str], List[str]]:
    """Which norm takes the output of which convolution, by name, and the convolutions used just once."""
    producers: Dict[int, str] = {}
    outputs: List[torch.Tensor] = []  # kept, so that no address is used twice
    follows, calls = {}, {}

    def hook(name):
        def observe(module, args, output):
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                producers[id(output)] = name
                outputs.append(output)
            elif id(args[0]) in producers:
                follows[name] = producers[id(args[0])]
        return observe

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or _is_tracked_norm(module)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    once = [name for name, count in calls.items() if count == 1]
    return {norm: conv for norm, conv in follows.items() if norm in once}, once


def fold_for_inference(model: nn.Module, x: torch.Tensor) -> Optional[nn.Module]:
    """Copy a network with its normalization folded into convolutions and its standardized weights computed once.

    Args:
        model: In eval mode.
        x: Some images, to see what follows what and to compare the copy with the model.

    Returns:
        A copy in eval mode, or None if nothing could be folded or the copy's logits differ.
    """
    folded = copy.deepcopy(model).requires_grad_(False)
    follows, once = _observe(folded, x)
    taken: Dict[str, str] = {}
    for norm, conv in follows.items():
        taken.setdefault(conv, norm)
    changed = False
    for name in once:
        conv = folded.get_submodule(name)
        plain = _plain_conv(conv) if isinstance(conv, nn.Conv2d) else None
        norm_name = taken.get(name)
        if plain is None or (norm_name is None and type(conv) is nn.Conv2d):
            continue
        if norm_name is not None:
            norm = folded.get_submodule(norm_name)
            scale, shift = _affine(norm)
            with torch.no_grad():
                plain.weight.copy_(plain.weight.double() * scale.view(-1, 1, 1, 1))
                plain.bias.copy_(plain.bias.double() * scale + shift)
            rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, 'act') else nn.Identity()
            folded.set_submodule(norm_name, rest)
        folded.set_submodule(name, plain.requires_grad_(False).eval())
        changed = True
    if not changed:
        return None
    with torch.no_grad():
        wanted, got = model(x), folded(x)
    # an output that something else takes too, or a pattern not foreseen, shows here
    if not torch.allclose(got, wanted, rtol=0, atol=_TOLERANCE * wanted.abs().max().item()):
        return None
    return folded
