"""Detect networks whose output for an image depends on the other images of the batch."""
import warnings
from typing import Any, Iterator, List, Optional

import torch
import torch.nn as nn
from timm.layers import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, InplaceAbn

from .bn_mode import bn_mode_of
from .norms import is_norm

__all__ = ['has_batch_statistics']

# Layers of these packages that use batch statistics are listed below. Layers of other packages are tested.
_KNOWN_PACKAGES = ('torch', 'torchvision', 'timm', 'timm_robust')
_BATCH_IN_TRAINING = (EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, InplaceAbn)

# Relative to the largest output; on most hardware two passes with the same shape and seed are bit-identical.
_TOLERANCE = 1e-5
_SIZES = (32, 224, 64, 28, 16)
_BATCH = 4


def _is_known(module: nn.Module) -> bool:
    compiled = isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))  # their layers are hidden
    return not compiled and type(module).forward.__module__.partition('.')[0] in _KNOWN_PACKAGES


def _may_normalize(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, torch.jit.ScriptModule, torch.fx.GraphModule)) or (
        'norm' in type(module).__name__.lower()
        or any(name.startswith('running_') for name, _ in module.named_buffers(recurse=False)))


def _normalizes_by_batch(module: nn.Module, training: bool) -> bool:
    if is_norm(module):
        return training or bn_mode_of(module) != 'population'
    return training and isinstance(module, _BATCH_IN_TRAINING)


def _random_images(model: nn.Module, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Random images of the shape in a model's `pretrained_cfg`, or of common shapes."""
    generator = torch.Generator('cpu').manual_seed(0)
    configs: List[Any] = [m.pretrained_cfg for m in model.modules() if hasattr(m, 'pretrained_cfg')]
    convs = [m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    shapes = [tuple(c['input_size']) for c in configs if isinstance(c, dict) and c.get('input_size')]
    shapes += [(channels, size, size) for channels in (*convs[:1], 3, 1) for size in _SIZES]
    for shape in shapes:
        yield torch.rand(_BATCH, *shape, generator=generator, device='cpu').to(like)


def _tensors(output: Any) -> List[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [t for part in parts for t in _tensors(part)]


def _of_first_image(model: nn.Module, images: torch.Tensor) -> List[torch.Tensor]:
    """A model's outputs for the first image, with a fixed random seed."""
    with torch.random.fork_rng([images.device] if images.device.type == 'cuda' else []), torch.no_grad():
        torch.manual_seed(0)
        return [t[0].float() for t in _tensors(model(images)) if t.ndim]


def _depends_on_others(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether the output for the first image changes if copies of it replace all others."""
    images = images[:_BATCH] if len(images) > 1 else torch.cat([images, images.flip(-1) / 2])
    before = _of_first_image(model, images)
    after = _of_first_image(model, images[:1].expand_as(images).contiguous())
    again = _of_first_image(model, images)

    def differ(a: List[torch.Tensor], b: List[torch.Tensor]) -> bool:
        return any(
            not torch.allclose(s, t, rtol=0, atol=_TOLERANCE * s.abs().max().item(), equal_nan=True)
            for s, t in zip(a, b) if s.numel())

    # the test is not conclusive if outputs are not reproducible
    return differ(before, after) and not differ(before, again)


def _measure(model: nn.Module, unknown: List[nn.Module], training: bool, images: Optional[torch.Tensor]) -> bool:
    """`_depends_on_others` with unknown layers in the given mode and all others in eval mode."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for m in unknown for b in m.buffers()]
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.empty(0)
    try:
        for module, _ in modes:
            module.training = False
        for module in unknown:
            module.training = training
        if images is not None:
            return _depends_on_others(model, images.to(like))
        for images in _random_images(model, like):
            try:
                return _depends_on_others(model, images)
            except Exception:  # the model does not accept this shape
                continue
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    names = ', '.join(sorted({type(m).__name__ for m in unknown}))
    warnings.warn(
        f'found no image shape that {type(model).__name__} accepts, so {names} could not be tested and is assumed to '
        'use batch statistics; pass images', stacklevel=3)
    return True


def has_batch_statistics(
        model: nn.Module,
        training: bool = False,
        images: Optional[torch.Tensor] = None,
) -> bool:
    """Whether a model's output for one image depends on the other images of its batch.

    Layers of torch, torchvision, timm and this package are known. Any other layer that looks like a normalization (by
    its name, base class or running statistics) is tested: forward passes show whether the output for an image changes
    with the other images. With `images` every unknown module is tested.

    Args:
        model: A built model.
        training: Check training mode instead of eval mode.
        images: Sample inputs of the model, shape (N, C, H, W), to test unknown layers; by default random images of the
            size in `pretrained_cfg` or of a common size.
    """
    modules = list(model.modules())
    unknown = [m for m in modules if not _is_known(m)]
    if any(_normalizes_by_batch(m, training) for m in modules if _is_known(m)):
        return True
    if images is None:
        unknown = [m for m in unknown if _may_normalize(m)]
    return bool(unknown) and _measure(model, unknown, training, images)
