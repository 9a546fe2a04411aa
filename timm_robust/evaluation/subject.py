"""Opens the network to evaluate: a model name, a config or a module."""
import copy
import hashlib
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple, Union, cast

import torch
import torch.nn as nn
from timm.data import resolve_data_config

from ..attacks import InputSpace
from ..attacks.context import without_ddp
from ..errors import InputError
from ..inputs import (
    Network,
    NetworkConfig,
    Preprocessing,
    build_network,
    build_surrogate,
    check_surrogate,
    fingerprint,
    resolve_device,
    weights_sha256,
)
from ..layers import is_norm
from ..models.normalized import NormalizedModel, holds_normalized
from .facts import ModelFacts

__all__ = [
    'ModelSource',
    'Subject',
    'eval_mode',
    'network_sha256',
    'open_model',
    'open_surrogate',
    'without_addresses',
]

ModelSource = Union[str, NetworkConfig, nn.Module]

_logger = logging.getLogger(__name__)


@dataclass
class Subject:
    """The network that is evaluated.

    Attributes:
        model: Maps pixels in [0, 1], shape (N, C, H, W), to logits; in eval mode.
        device: Device of the network.
        facts: Facts about the network, for the report.
        preprocessing: timm's data config; None if unknown.
        network: The same network as an `inputs.Network`; None for a module that is not a timm model.
    """
    model: nn.Module
    device: torch.device
    facts: ModelFacts
    preprocessing: Optional[Preprocessing] = None
    network: Optional[Network] = None


def _facts(name: str, model: nn.Module, preprocessing: Optional[Preprocessing], **more: Any) -> ModelFacts:
    return ModelFacts(name=name, weights_sha256=weights_sha256(model), **{**(preprocessing or {}), **more})


def _from_network(network: Network) -> Subject:
    config = network.config
    with eval_mode(network.model):
        logits = fingerprint(network.model, network.preprocessing['input_size'])
    facts = _facts(
        config.model, network.model, network.preprocessing, checkpoint=config.checkpoint, use_ema=config.use_ema,
        model_kwargs=config.model_kwargs, bn_mode=config.bn_mode, gamma=config.gamma, num_classes=network.num_classes,
        logits=logits)
    return Subject(network.pixel_model, network.device, facts, network.preprocessing, network)


def without_addresses(text: str) -> str:
    """A printed object without memory addresses, which differ from process to process."""
    return re.sub(r' at 0x[0-9a-f]+', '', text)


def network_sha256(model: nn.Module) -> str:
    """Hash of what determines a network's outcomes: its tensors, printed modules, and their numbers and strings."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    constants = [
        (name, key, value) for name, module in model.named_modules() for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and not key.startswith('_') and key != 'training']
    text = f'{without_addresses(repr(model))} {constants} {weights_sha256(tensors)}'
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def eval_mode(*models: Any) -> Iterator[None]:
    """Switch networks that are in training mode, as `timm.create_model` returns them, to eval mode within the context.

    In a network in eval mode, parts left in training mode, such as dropout, are assumed deliberate and stay so. On
    exit, all modes are restored, and so are the buffers (running averages) of parts that were in training mode.
    """
    networks = [model for model in models if isinstance(model, nn.Module)]
    training = [part for model in networks for part in model.modules() if part.training]
    buffers = [(buffer, buffer.clone()) for part in training for buffer in part.buffers(recurse=False)]
    try:
        for model in networks:
            if model.training:
                for part in model.modules():
                    part.training = False
        yield
    finally:
        for part in training:
            part.training = True
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _from_module(model: nn.Module, device: Optional[str]) -> Subject:
    model = without_ddp(model)
    model = getattr(model, '_orig_mod', model)  # compiled by torch.compile
    if isinstance(model, torch.jit.ScriptModule):
        _logger.warning('A TorchScript network gets pixels in [0, 1]: if it expects normalized images, wrap it in '
                        'NormalizedModel with their mean and std')
    low = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if low is not None:
        raise InputError(
            f'has weights in {low}', 'pass model.float(): accuracy is measured in float32', argument='model')
    if any(t.device.type == 'meta' for t in (*model.parameters(), *model.buffers())):
        raise InputError('has no weights: it is on the meta device', 'load its weights', argument='model')
    still = next((name for name, part in model.named_modules() if part.training and is_norm(part)), None)
    if still is not None:  # attacks would use its tracked statistics instead
        raise InputError(
            f'has a normalization layer in training mode ({still})',
            "call model.eval(), or set_bn_mode(model, 'batch') for batch statistics", argument='model')
    own = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device('cpu'))
    place = own if device is None else torch.device(resolve_device(device))
    if place != own:
        model = copy.deepcopy(model).to(place)  # leave the caller's network on its device
    space = InputSpace.of(model)
    on_pixels = model
    if not space.is_pixels:
        on_pixels = NormalizedModel(model, space.mean, space.std)
        on_pixels.training = False  # not .eval(), which would change the caller's network
    timm_model: Any = model.model if isinstance(model, NormalizedModel) else model
    name = type(model).__name__
    if not (getattr(timm_model, 'pretrained_cfg', None) and getattr(timm_model, 'num_classes', None)):
        _warn_about_inner_model(model)
        return Subject(on_pixels, place, _facts(name, model, None))
    preprocessing = cast(Preprocessing, resolve_data_config({}, model=timm_model))
    if isinstance(model, NormalizedModel):
        preprocessing['mean'], preprocessing['std'] = _decimals(model.mean), _decimals(model.std)
    name = timm_model.pretrained_cfg.get('architecture') or type(timm_model).__name__
    network = Network(NetworkConfig(model=name), timm_model, on_pixels, preprocessing, place)
    facts = _facts(name, timm_model, preprocessing, num_classes=network.num_classes)
    return Subject(on_pixels, place, facts, preprocessing, network)


def _decimals(values: torch.Tensor) -> Tuple[float, ...]:
    return tuple(float(f'{value:.7g}') for value in values.flatten().tolist())  # without float32 rounding


def _warn_about_inner_model(model: nn.Module) -> None:
    inner = next((m for m in model.modules() if not InputSpace.of(m).is_pixels), None)
    if inner is not None and InputSpace.of(model).is_pixels and not holds_normalized(model):
        _logger.warning(
            f'{type(model).__name__} gets pixels in [0, 1], but the timm model {type(inner).__name__} inside expects '
            f'normalized images: unless {type(model).__name__} normalizes them, wrap {type(inner).__name__} in '
            'NormalizedModel')


def open_model(
        model: ModelSource,
        *,
        checkpoint: str = '',
        device: Optional[str] = None,
        main_branch: bool = False,
) -> Subject:
    """Open the network that a caller passed as `model`.

    Args:
        model: A model name as in `NetworkConfig`, a `NetworkConfig`, or a module: a timm model, whose input is
            normalized with the mean and std of its `pretrained_cfg`, or any other module that takes pixels.
        checkpoint: Weights of a model given by name.
        device: Device; by default the module's own, or CUDA if available for a model given by name.
        main_branch: Use the BatchNorm for clean images of a checkpoint with two BatchNorms, unless `gamma` is set.

    Raises:
        InputError: If the network cannot be built, or an argument does not apply to a module or a `NetworkConfig`.
    """
    if checkpoint and isinstance(model, (nn.Module, NetworkConfig)):
        raise InputError(
            'applies only to a model given by name', 'load the weights into the module, or name them in the config',
            argument='checkpoint', value=checkpoint)
    if isinstance(model, nn.Module):
        return _from_module(model, device)
    if isinstance(model, (str, Path)):
        model = NetworkConfig(model=str(model), checkpoint=checkpoint, device=device)
    elif not isinstance(model, NetworkConfig):
        raise InputError(
            f'is {type(model).__name__}', 'pass a module, the name of a timm model, the folder of an exported model or '
            'hf-hub:ORG/NAME', argument='model')
    elif device is not None:
        raise InputError('is a setting of the NetworkConfig', 'set it there', argument='device', value=device)
    if main_branch and model.gamma is None:
        try:
            model = replace(model, gamma=0.)
        except InputError as error:
            raise error.about('gamma_sweep', True) from error
    return _from_network(build_network(model, torch.device(resolve_device(model.device))))


def open_surrogate(surrogate: Union[str, nn.Module, None], subject: Subject, checkpoint: str) -> Optional[Subject]:
    """Open the network to craft attacks on; None if attacks are crafted on the evaluated network.

    Raises:
        InputError: If its classes or input differ from the network's, or if a checkpoint comes without a model name.
    """
    if checkpoint and (not surrogate or isinstance(surrogate, nn.Module)):
        raise InputError(
            'needs a model name', 'pass it as `surrogate`', argument='surrogate_checkpoint', value=checkpoint)
    if not surrogate:
        return None
    if isinstance(surrogate, str) and subject.network is not None:
        return _from_network(build_surrogate(surrogate, subject.network, checkpoint))
    try:
        found = open_model(surrogate, checkpoint=checkpoint, device=str(subject.device))
    except InputError as error:
        raise error.renamed({'model': 'surrogate', 'checkpoint': 'surrogate_checkpoint'}) from error
    if found.network is not None and subject.network is not None:
        check_surrogate(found.network, subject.network, found.facts.name)
    return found
