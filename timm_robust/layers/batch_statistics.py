"""Whether the images of a batch influence each other's output."""
import warnings
from typing import Any, Iterator, List, Optional

import torch
import torch.nn as nn
from timm.layers import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, InplaceAbn

from .bn_mode import bn_mode_of
from .norms import is_norm

__all__ = ['has_batch_statistics']

# What normalizes by the batch in these is listed below. A layer whose `forward` comes from elsewhere is not known.
_KNOWN_PACKAGES = ('torch', 'torchvision', 'timm', 'timm_robust')
_BATCH_IN_TRAINING = (EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, InplaceAbn)

# Two passes of one shape and seed agree to the last bit, on most hardware; of the largest output.
_TOLERANCE = 1e-5
_SIZES = (32, 224, 64, 28, 16)
_BATCH = 4


def _is_known(module: nn.Module) -> bool:
    compiled = isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))  # they hide what they are made of
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
    """Images of the shape a model names, or of usual shapes."""
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
    """What a model says of the first image, with fixed random numbers."""
    with torch.random.fork_rng([images.device] if images.device.type == 'cuda' else []), torch.no_grad():
        torch.manual_seed(0)
        return [t[0].float() for t in _tensors(model(images)) if t.ndim]


def _depends_on_others(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether the output for the first image is another one when copies of it take the place of all others."""
    images = images[:_BATCH] if len(images) > 1 else torch.cat([images, images.flip(-1) / 2])
    before = _of_first_image(model, images)
    after = _of_first_image(model, images[:1].expand_as(images).contiguous())
    again = _of_first_image(model, images)

    def differ(a: List[torch.Tensor], b: List[torch.Tensor]) -> bool:
        return any(
            not torch.allclose(s, t, rtol=0, atol=_TOLERANCE * s.abs().max().item(), equal_nan=True)
            for s, t in zip(a, b) if s.numel())

    # a network whose outputs do not repeat at all shows nothing
    return differ(before, after) and not differ(before, again)


def _measure(model: nn.Module, unknown: List[nn.Module], training: bool, images: Optional[torch.Tensor]) -> bool:
    """`_depends_on_others` with layers that are not known in the asked mode, all others in eval mode."""
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
            except Exception:  # not a shape it takes
                continue
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    names = ', '.join(sorted({type(m).__name__ for m in unknown}))
    warnings.warn(
        f'no shape of images was found that {type(model).__name__} takes to try {names}, which is taken to normalize '
        'by the batch; pass images', stacklevel=3)
    return True


def has_batch_statistics(
        model: nn.Module,
        training: bool = False,
        images: Optional[torch.Tensor] = None,
) -> bool:
    """Whether a model's output for one image depends on the other images of its batch.

    Layers of torch, timm and this package are known. A layer from elsewhere that looks like a normalization (by its
    name, its base class or running statistics) is tried out: two forward passes show whether the output for an image
    changes with its neighbours. With `images` so is any module from elsewhere.

    Args:
        model: A built model.
        training: Ask for training mode; otherwise for inference.
        images: Some images as the model takes them, shape (N, C, H, W), for layers that are not known; random ones
            without, of the size in `pretrained_cfg` or of a usual one.
    """
    modules = list(model.modules())
    unknown = [m for m in modules if not _is_known(m)]
    if any(_normalizes_by_batch(m, training) for m in modules if _is_known(m)):
        return True
    if images is None:
        unknown = [m for m in unknown if _may_normalize(m)]
    return bool(unknown) and _measure(model, unknown, training, images)
