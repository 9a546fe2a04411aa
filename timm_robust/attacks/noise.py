"""Random numbers that depend only on an image's seed and a counter.

Noise is drawn per image, so that it does not depend on the batch, the image's position in it, or the device. A hash of
(seed, stream, position) achieves this without a generator per image.

Steele et al. 2014, `Fast Splittable Pseudorandom Number Generators` (SplitMix64).
"""
import math
from typing import Sequence, Union

import torch

from ..devices import without_wait
from ..errors import InputError

__all__ = ['image_seeds', 'normal', 'signs', 'uniform']

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_HALF = 1 << 63


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """Mix bits, in place to save memory: int64 values take twice as much as a float32 image."""
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        z = z.bitwise_xor_(_shift(z, bits)).mul_(factor)
    return z.bitwise_xor_(_shift(z, 31))


def image_seeds(
        seed: Union[int, Sequence[int], torch.Tensor, None],
        count: int,
        device: torch.device,
) -> torch.Tensor:
    """One seed per image, shape (count,): as given, or derived from a single seed, drawn at random if None.

    Raises:
        InputError: If a seed is not a 64-bit integer, or seeds per image do not have shape (count,).
    """
    if seed is None:
        seed = int(torch.randint(1 << 62, (), device='cpu'))
    try:
        given = seed if isinstance(seed, torch.Tensor) else torch.as_tensor(seed, device='cpu')
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(str(given.dtype))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(seed, Sequence) and not len(seed):
            return torch.empty(0, dtype=torch.int64, device=device)
        raise InputError('must be a 64-bit integer, or one per image', argument='seed') from error
    if not isinstance(seed, torch.Tensor) and not given.ndim:
        return _mix(torch.arange(count, device=device) * _GOLDEN + int(given))
    if given.shape != (count,):
        raise InputError(
            f'{len(given) if given.ndim == 1 else tuple(given.shape)} seeds for {count} images',
            'give one for all or one per image', argument='seed')
    return without_wait(given.long(), device)


def uniform(seeds: torch.Tensor, stream: Union[int, torch.Tensor], count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), shape (N, count), float32.

    Args:
        seeds: One seed per row, shape (N,), int64.
        stream: Index of the random stream of a seed: one for all rows, or one per row (N,).
        count: Numbers per row.
    """
    # unlike tensors, Python integers do not wrap around to 64 bits
    offset = (stream + 1) * _MIX_1
    offset = offset if isinstance(offset, torch.Tensor) else (offset + _HALF) % (2 * _HALF) - _HALF
    start = _mix(_mix(seeds.clone()) + offset)
    position = torch.arange(1, count + 1, device=seeds.device) * _GOLDEN
    return _shift(_mix(start[:, None] + position), 40).to(torch.float32).mul_(2 ** -24)


def signs(seeds: torch.Tensor, stream: Union[int, torch.Tensor], count: int) -> torch.Tensor:
    """-1 or 1 with equal probability, float32; takes the arguments of `uniform`."""
    return torch.where(uniform(seeds, stream, count) < .5, -1., 1.)


def normal(seeds: torch.Tensor, stream: Union[int, torch.Tensor], count: int) -> torch.Tensor:
    """Standard normal numbers (Box-Muller), float32; takes the arguments of `uniform`."""
    radius, angle = uniform(seeds, stream, 2 * count).chunk(2, dim=1)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
