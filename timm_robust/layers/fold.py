"""A faster copy of a network that computes the same function, for attacks that evaluate it thousands of times.

In eval mode a normalization with tracked statistics is an affine map, which is folded into the preceding convolution,
and standardized weights are constant.
"""
import copy
import logging
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import ScaledStdConv2d, StdConv2d
from torch.nn.utils import skip_init

from ..precision import float32_proper
from .aux_norm import AuxNorm
from .bn_mode import bn_mode_of
from .norms import PLAIN_BATCH_NORMS, Norm
from .robust_norm import RobustNorm2d, RobustNormAct2d
from .weight_standardization import standardized_weight

__all__ = ['fold_for_inference']

_logger = logging.getLogger(__name__)

# Folding reorders float32 sums. The copy is used only if its logits differ by at most this share of their largest
# magnitude. On a CPU correct copies of 150 layers agree to 7e-7; a GPU may choose other kernels for a folded layer.
_TOLERANCE = 3e-5


def _is_tracked_norm(module: Norm) -> bool:
    known = type(module) in (*PLAIN_BATCH_NORMS, RobustNorm2d, RobustNormAct2d) or isinstance(module, AuxNorm)
    return known and bn_mode_of(module) == 'population'


def _affine(norm: Norm) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift per channel of a normalization with tracked statistics, in float64 on the CPU."""
    if isinstance(norm, AuxNorm) and norm.gamma != 0:
        main, aux = _affine_of_tracked(norm), _affine(norm.aux)
        return torch.lerp(main[0], aux[0], norm.gamma), torch.lerp(main[1], aux[1], norm.gamma)
    return _affine_of_tracked(norm)


def _affine_of_tracked(norm: Norm) -> Tuple[torch.Tensor, torch.Tensor]:
    mean, spread = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    if isinstance(norm, RobustNorm2d):
        varies = spread > 0
        scale = torch.where(varies, 1 / (torch.where(varies, spread, 1.).pow(norm.power) + norm.eps), 0.)
    else:
        scale = (spread + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.cpu().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.cpu().double()


def _plain_conv(conv: Any) -> Any:
    """An equivalent `nn.Conv2d`, with any weight standardization applied, or None for an unsupported layer."""
    if type(conv) is nn.Conv2d:
        weight = conv.weight
    elif type(conv) in (StdConv2d, ScaledStdConv2d):
        weight = standardized_weight(conv)
    else:
        return None
    plain: Any = skip_init(  # draws nothing from torch's generator
        nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, bias=True, padding_mode=conv.padding_mode, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.zero_() if conv.bias is None else plain.bias.copy_(conv.bias)
    return plain


def _observe(model: nn.Module, x: torch.Tensor) -> Tuple[Dict[str, str], List[str]]:
    """Map each norm to the convolution that feeds it, by name, and list the layers called exactly once."""
    producers: Dict[int, str] = {}
    outputs: List[torch.Tensor] = []  # kept alive, so that no id is reused
    follows: Dict[str, str] = {}
    calls: Dict[str, int] = {}

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: tuple, kwargs: Dict[str, Any], output: torch.Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            taken = id(next(iter((*args, *kwargs.values()))))
            if isinstance(module, nn.Conv2d):
                producers[id(output)] = name
                outputs.append(output)
            elif taken in producers:
                follows[name] = producers[taken]
        return observe

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or _is_tracked_norm(module)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    once = [name for name, count in calls.items() if count == 1]
    return {norm: conv for norm, conv in follows.items() if norm in once}, once


def _fold(model: nn.Module, x: torch.Tensor) -> Optional[nn.Module]:
    folded = copy.deepcopy(model).requires_grad_(False)
    follows, once = _observe(folded, x)
    taken: Dict[str, str] = {}
    for after, before in follows.items():
        taken.setdefault(before, after)
    changed = False
    for name in once:
        conv: Any = folded.get_submodule(name)
        plain = _plain_conv(conv)
        norm_name = taken.get(name)
        if plain is None or (norm_name is None and type(conv) is nn.Conv2d):
            continue
        if norm_name is not None:
            norm: Any = folded.get_submodule(norm_name)
            scale, shift = _affine(norm)
            with torch.no_grad():
                plain.weight.copy_(plain.weight.cpu().double() * scale.view(-1, 1, 1, 1))
                plain.bias.copy_(plain.bias.cpu().double() * scale + shift)
            rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, 'act') else nn.Identity()
            folded.set_submodule(norm_name, rest)
        folded.set_submodule(name, plain.requires_grad_(False).eval())
        changed = True
    return folded if changed else None


def _probes(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images to compare on: x, and darker, brighter and inverted copies, which may take other branches."""
    low, high = x.min(), x.max()
    yield x
    yield x * .1
    yield high - (high - x) * .1
    yield high + low - x


def _agree(model: nn.Module, folded: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad(), float32_proper():
        for images in _probes(x):
            wanted, got = model(images), folded(images)
            if not torch.allclose(got, wanted, rtol=0, atol=_TOLERANCE * wanted.abs().max().item()):
                return False
    return True


def fold_for_inference(model: nn.Module, x: torch.Tensor) -> Optional[nn.Module]:
    """Copy a network with its normalization folded into convolutions and its standardized weights computed once.

    Args:
        model: In eval mode.
        x: Sample images, to trace the layers and to compare the copy with the model.

    Returns:
        A copy in eval mode, or None if nothing could be folded, the copy's logits differ, the network cannot be copied,
        or the copy fails (for example because the network reads `self.bn.weight` of a folded layer).
    """
    try:
        folded = _fold(model, x)
        # the comparison detects outputs with a second consumer, and patterns that folding does not handle
        return folded if folded is not None and _agree(model, folded, x) else None
    except Exception as error:  # a third-party network may raise anything once its layers are replaced
        _logger.debug(f'{type(model).__name__} is not folded: {type(error).__name__}: {error}')
        return None
