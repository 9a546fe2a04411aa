"""Checks and conversions of images, labels and logits, shared by all attacks."""
from typing import Any, Callable, NamedTuple, Optional

import torch

from ..errors import InputError
from ..models.normalized import holds_normalized
from .ball import PIXELS, InputSpace
from .losses import hard_labels, precise

__all__ = [
    'Checked',
    'Classifier',
    'as_logits',
    'check_batch',
    'check_classes',
    'check_images',
    'check_tensor',
    'error_rates',
    'logits_of',
    'wrong_classes',
]

_COPY_TOLERANCE = 1e-3
_PIXEL_SLACK = 1e-5
_SPACE_SLACK = 1e-2  # half precision and bfloat16 cannot undo a normalization exactly


def as_logits(output: Any, count: int) -> torch.Tensor:
    """Convert a network's output for `count` images to logits (N, K); a single output z becomes two logits, [0, z].

    Raises:
        InputError: If it is not a floating-point tensor of shape (N, K), (N, 1) or (N,).
    """
    is_tensor = isinstance(output, torch.Tensor)
    if not is_tensor or output.ndim not in (1, 2) or len(output) != count or not output.is_floating_point():
        got = f'a tensor of shape {tuple(output.shape)}, {output.dtype}' if is_tensor else type(output).__name__
        raise InputError(f'returns {got}', 'it must return logits of shape (N, K) for N images', argument='model')
    logits = output if output.ndim == 2 else output[:, None]
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)


def logits_of(model: Callable, x: torch.Tensor, batch_size: Optional[int] = None) -> torch.Tensor:
    """Logits of shape (N, K), computed in batches without gradients.

    Raises:
        InputError: If the network returns anything but logits, or non-finite values.
    """
    with torch.no_grad():
        logits = torch.cat([as_logits(model(part), len(part)) for part in x.split(batch_size or max(len(x), 1))])
    check_finite(logits)
    return logits


def error_rates(ask: Callable[[], torch.Tensor], y: torch.Tensor, passes: int) -> torch.Tensor:
    """Share of passes that misclassify each image, shape (N,); 0.5 or more counts as misclassified.

    Args:
        ask: Returns logits (N, K), which differ between calls if the network is randomized.
        y: True classes, shape (N,).
        passes: Number of calls.
    """
    wrong = torch.stack([ask().argmax(1) != y for _ in range(passes)])
    return wrong.float().mean(0)


def check_finite(logits: torch.Tensor) -> None:
    """Reject logits that are not finite.

    Raises:
        InputError: On NaN or infinite logits.
    """
    if not torch.isfinite(logits).all():
        raise InputError(
            'returns logits that are not finite', 'its weights may be corrupt, or training diverged', argument='model')


class Classifier:
    """A network as attacks call it: maps pixels in [0, 1], in float32 or better, to logits (N, K).

    Args:
        model: The network.
        space: Its input space.
        dtype: Its input dtype.
        check: Called with the first logits, and again if the number of classes changes.

    Attributes:
        tolerance: For a fast copy: maximum difference from the network's logits, relative to the largest logit.
    """

    def __init__(
            self,
            model: Callable,
            space: InputSpace = PIXELS,
            dtype: torch.dtype = torch.float32,
            check: Callable[[torch.Tensor], None] = lambda logits: None,
    ):
        self.model = model
        self.space = space
        self.dtype = dtype
        self.check = check
        self.num_classes = 0
        self.tolerance: float = getattr(model, 'tolerance', _COPY_TOLERANCE)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels if self.space == PIXELS else self.space.normalize(pixels)
        # attacks compute in the precision of the pixels, whatever the network's
        logits = as_logits(self.model(x.to(self.dtype)), len(x)).to(pixels.dtype)
        if logits.shape[1] != self.num_classes:
            self.num_classes = logits.shape[1]
            self.check(logits)
        return logits


def check_tensor(images: Any, argument: str = 'images') -> None:
    """Reject anything but a batch of images, in any input space.

    Raises:
        InputError: On another shape or type.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        got = f'shape {tuple(images.shape)}' if isinstance(images, torch.Tensor) else f'type {type(images).__name__}'
        raise InputError(f'have {got}', 'images must be a tensor of shape (N, C, H, W)', argument=argument)
    if not images.is_floating_point():
        raise InputError(f'are {images.dtype}', 'divide by 255: pixels must be numbers in [0, 1]', argument=argument)


def check_images(images: Any, space: Optional[InputSpace] = None, model: Any = None) -> None:
    """Reject anything but a batch of images in the expected input space.

    Raises:
        InputError: On another shape or type; without `space`, on images outside [0, 1] and on a timm model that expects
            normalized images; with a `space` other than pixels, on a network that contains a `NormalizedModel`.
    """
    check_tensor(images)
    if space is not None:
        if holds_normalized(model) and not space.is_pixels:
            raise InputError(
                'the network normalizes its input, so images would be normalized twice', 'leave `space` out and pass '
                'pixels', argument='space', value=space)
        return
    if not InputSpace.of(model).is_pixels:
        raise InputError(
            f'a timm model expects normalized images, but no `space` is given: {InputSpace.of(model)}',
            'wrap it in NormalizedModel and pass pixels, or pass the `space` of the images '
            '(`space=InputSpace()` if it was trained on pixels)', argument='model')
    if not len(images):
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (low >= -_PIXEL_SLACK and high <= 1 + _PIXEL_SLACK):
        raise InputError(
            f'span [{low:.3g}, {high:.3g}] but pixels in [0, 1] are expected', 'divide images in [0, 255] '
            'by 255; for normalized images give attacks `space=InputSpace(mean, std)`, or wrap the network in '
            'NormalizedModel and pass pixels',
            argument='images')


def usable(x: torch.Tensor) -> torch.Tensor:
    """Detach a tensor so that autograd can use it, even if it was created in `torch.inference_mode`."""
    return x.clone() if x.is_inference() else x.detach()


def pixels_of(images: torch.Tensor, space: Optional[InputSpace]) -> torch.Tensor:
    """Convert checked images to pixels in [0, 1], in float32 or better.

    Raises:
        InputError: If images in `space` correspond to pixels outside [0, 1].
    """
    x = precise(usable(images))  # in half precision small steps are lost to rounding
    if space is None or not len(x):
        return x
    pixels = space.to_pixels(x)
    low, high = torch.stack(torch.aminmax(pixels)).tolist()
    if not (low > -_SPACE_SLACK and high < 1 + _SPACE_SLACK):
        raise InputError(
            f'span [{low:.3g}, {high:.3g}] in pixels with space={space}', 'evaluation images must be in [0, 1], '
            'without random erasing', argument='images')
    return pixels.clamp(0, 1)


class Checked(NamedTuple):
    """Labels in the form attacks use.

    Attributes:
        labels: True classes, int64, shape (N,).
        soft: Soft targets (N, K), or None.
        num_classes: Minimum number of classes a network needs for these labels.
    """
    labels: torch.Tensor
    soft: Optional[torch.Tensor]
    num_classes: int


def _class_indices(values: Any, images: torch.Tensor, argument: str) -> torch.Tensor:
    try:
        values = usable(torch.as_tensor(values, device=images.device))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f'are not class indices: {error}', 'give a tensor of shape (N,)', argument=argument) from error
    if len(values.shape) < 1 or len(values) != len(images):
        raise InputError(
            f'{len(values) if values.ndim else "a single number"} for {len(images)} images', 'give one per image',
            argument=argument)
    return values


def _check_range(values: torch.Tensor, argument: str, look: bool) -> int:
    """Largest class index plus one, or 0 if unchecked. On a GPU a check forces a sync, so it requires `look`."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise InputError(f'are {values.dtype}', 'class indices must be whole numbers', argument=argument)
    if not (look or values.device.type == 'cpu') or not values.numel():
        return 0
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if low < 0:
        raise InputError(f'contain {low}', 'class indices must be at least 0', argument=argument)
    return high + 1


def check_batch(images: torch.Tensor, labels: Any, *, look: bool = True) -> Checked:
    """Check and convert labels.

    Args:
        images: Checked images.
        labels: Class indices (N,) of any integer type, as tensor, array or list; or soft targets (N, K).
        look: Check the values too, which forces a sync on a GPU. On a CPU they are always checked.

    Raises:
        InputError: On another shape or type, negative labels, or soft targets that are negative or not finite.
    """
    values = _class_indices(labels, images, 'labels')
    if values.ndim == 2 and values.is_floating_point() and values.shape[1] > 1:
        if (look or values.device.type == 'cpu') and not ((values >= 0) & values.isfinite()).all():
            raise InputError(
                'contain negative or non-finite values', 'soft targets must be probabilities', argument='labels')
        return Checked(hard_labels(values), values, values.shape[1])
    if values.ndim != 1:
        raise InputError(
            f'have shape {tuple(values.shape)}', 'give class indices of shape (N,), or soft targets of shape (N, K)',
            argument='labels')
    num_classes = _check_range(values, 'labels', look)
    return Checked(values.long(), None, num_classes)


def check_targets(images: torch.Tensor, targets: Any) -> torch.Tensor:
    """Target classes as int64, shape (N, T), from (N,) or (N, T).

    Raises:
        InputError: On another shape or type, and on negative targets.
    """
    values = _class_indices(targets, images, 'targets')
    if values.ndim > 2:
        raise InputError(f'have shape {tuple(values.shape)}', 'give (N,) or (N, T) class indices', argument='targets')
    _check_range(values, 'targets', look=True)
    return values.long().view(len(images), -1) if len(images) else values.long().view(0, 1)


def check_classes(checked: Checked, num_classes: int) -> None:
    """Reject labels that do not fit the network's classes.

    Raises:
        InputError: On a class index that is too large, or soft targets with another number of classes.
    """
    if checked.soft is not None and checked.num_classes != num_classes:
        raise InputError(
            f'are soft targets of {checked.num_classes} classes, but the model has {num_classes}', argument='labels')
    if checked.num_classes > num_classes:
        raise InputError(
            f'contain class {checked.num_classes - 1}, but the model has {num_classes} classes', argument='labels')


def wrong_classes(logits: torch.Tensor, y: torch.Tensor, num_targets: Optional[int]) -> torch.Tensor:
    """The likeliest wrong classes by descending logit, shape (N, num_targets).

    Args:
        logits: Logits of the clean images, shape (N, K).
        y: True classes, shape (N,).
        num_targets: Number of target classes; by default 9, or all wrong classes if there are fewer.

    Raises:
        InputError: If there are fewer than `num_targets` wrong classes.
    """
    available = logits.shape[1] - 1
    count = min(9, available) if num_targets is None else num_targets
    if not 1 <= count <= available:
        raise InputError(
            f'must be between 1 and {available}, the number of wrong classes', argument='num_targets', value=count)
    return logits.scatter(1, y[:, None], float('-inf')).topk(count, dim=1).indices
