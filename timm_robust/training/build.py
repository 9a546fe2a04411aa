"""The parts of a run, built from its settings by timm's factories."""
import logging
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, ContextManager, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import NativeScaler

from .. import inputs
from ..data import check_classes, class_names
from ..errors import InputError
from ..inputs import NetworkConfig, create_network, label_names, load_weights, num_outputs
from ..layers import has_batch_statistics
from ..tasks import RobustTeacher, Teacher
from ..tasks.objective import mixes_images
from .config import TrainConfig

__all__ = [
    'Autocast', 'build_criterion', 'build_network', 'build_teacher', 'check_img_sizes', 'mixed_precision',
    'replace_classifier', 'resolve_lr']

_logger = logging.getLogger(__name__)
Autocast = Callable[[], ContextManager[Any]]  # returns the context of a forward pass


def build_network(config: TrainConfig) -> nn.Module:
    """The network with its initial weights and memory options, on the CPU.

    Raises:
        InputError: If there is no such network, or it is incompatible with the settings.
    """
    model = create_network(
        config, pretrained=config.pretrained, adapt=True, drop_rate=config.drop, drop_path_rate=config.drop_path)
    if config.initial_checkpoint:
        load_weights(model, config.initial_checkpoint, argument='initial_checkpoint')
    if config.batch_size == 1 and has_batch_statistics(model, training=True):
        raise InputError(f'{config.model} uses batch statistics', 'choose at least 2',
                         argument='batch_size', value=1)
    if config.grad_checkpointing:
        try:
            cast(Callable[..., None], model.set_grad_checkpointing)(enable=True)
        except AssertionError as error:
            raise InputError(
                f'{config.model} does not support it', 'leave it out', argument='grad_checkpointing', value=True
            ) from error
    return model


def replace_classifier(config: TrainConfig, model: nn.Module, class_names: Optional[Sequence[str]]) -> bool:
    """Reset a pretrained classifier if its class names are known and differ from the data's; returns whether it did.

    timm keeps any classifier with the right number of outputs, even if its classes are different.
    """
    known = label_names(model, class_names) if config.pretrained and not config.initial_checkpoint else None
    if not known or not class_names or known == list(class_names):
        return False
    cast(Callable[[int], None], model.reset_classifier)(num_outputs(model))
    return True


def check_img_sizes(config: TrainConfig, model: nn.Module, in_chans: int, name: str = '') -> None:
    """Refuse scheduled resolutions that a network, by default the one that is trained, does not accept.

    Raises:
        InputError: Naming the size.
    """
    mode = model.training
    for size in config.train_img_sizes or ():
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, in_chans, size, size, device=next(model.parameters()).device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f'{name or config.model} does not accept it ({error})', 'choose other sizes, or for a transformer '
                'set dynamic_img_size=True in `model_kwargs`', argument='train_img_sizes', value=size) from error
    model.train(mode)


def build_criterion(config: TrainConfig) -> nn.Module:
    """timm's choice of training criterion."""
    if config.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0. if mixes_images(config) else config.smoothing,
            target_threshold=config.bce_target_thresh,
            sum_classes=config.bce_sum,
            pos_weight=config.bce_pos_weight,
        )
    if mixes_images(config):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


def build_teacher(
        config: RobustTeacher,
        dataset: Any,
        input_size: Sequence[int],
        device: torch.device,
        *,
        channels_last: bool = False,
) -> Optional[Teacher]:
    """The teacher of a run, None if there is none.

    Args:
        config: Settings of robust distillation.
        dataset: The training data, whose classes must match the teacher's.
        input_size: Channels, height and width of the student's images.
        device: Device of the student.
        channels_last: Use the channels_last memory format.

    Raises:
        InputError: If the teacher cannot be built, or its classes or input size differ from the student's.
    """
    if not config.model:
        return None
    try:
        found = inputs.build_network(
            NetworkConfig(model=config.model, checkpoint=config.checkpoint, channels_last=channels_last), device)
        check_classes(dataset, found.num_classes, found.class_names(class_names(dataset)), argument='model')
    except InputError as error:
        raise error.renamed({'model': 'robust_teacher', 'checkpoint': 'robust_teacher_checkpoint'}) from error
    size = tuple(found.preprocessing['input_size'])
    if size != tuple(input_size):
        raise InputError(
            f'takes {size} images, but the model takes {tuple(input_size)}', 'give the model the same `input_size`',
            argument='robust_teacher', value=config.model)
    return Teacher(found.pixel_model, config.weight)


def resolve_lr(config: TrainConfig, world_size: int, batch_size: float) -> float:
    """The learning rate: `lr` if given, else by timm's rule from `lr_base` and the (average) global batch size."""
    if config.lr is not None:
        return config.lr
    ratio = batch_size * world_size * config.grad_accum_steps / config.lr_base_size
    adaptive = any(o in config.opt.lower() for o in ('ada', 'lamb'))
    scale = config.lr_base_scale or ('sqrt' if adaptive else 'linear')
    return config.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def mixed_precision(config: TrainConfig, device: torch.device) -> Tuple[Autocast, Optional[NativeScaler]]:
    """Autocast context and loss scaler."""
    if not config.amp:
        return nullcontext, None
    low = torch.bfloat16 if config.amp_dtype == 'bfloat16' or device.type == 'cpu' else torch.float16
    if device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        _logger.warning('amp: this CPU emulates bfloat16, about ten times slower than float32. Train without amp.')
    scaler = NativeScaler(device=device.type) if low == torch.float16 else None
    return partial(torch.autocast, device_type=device.type, dtype=low), scaler
