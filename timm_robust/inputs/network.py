"""The network of a command: built, loaded, checked, and wrapped with its input normalization."""
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple, TypedDict, cast

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from ..attacks.checks import as_logits
from ..errors import InputError, check_at_least, check_choice, check_range
from ..layers import BN_MODES, convert_aux_norm, has_batch_statistics, set_bn_mode, set_gamma
from ..models import NormalizedModel
from ..settings import check_types, default_of, setting, to_mapping
from .device import resolve_device
from .pretrained import check_adapted, check_recorded, create_named, label_names, num_outputs, read_config, resolve_name
from .weights import Checkpoint, Conversion, fit_weights, read_checkpoint, weights_sha256

__all__ = [
    'ModelConfig',
    'Network',
    'NetworkConfig',
    'Preprocessing',
    'build_network',
    'build_surrogate',
    'check_batch_size',
    'create_network',
    'resolve_preprocessing',
]

# what determines a network's output apart from its weights, named as timm's training flags
_OF_RUN = (
    'num_classes', 'in_chans', 'img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'gp',
    'model_kwargs')
_LARGEST_SIDE = 1 << 15  # of a resized image, before cropping
_SIZES = ('img_size', 'input_size')
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


class Preprocessing(TypedDict):
    """timm's data config: the preprocessing of images."""
    input_size: Tuple[int, int, int]
    interpolation: str
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    crop_pct: float
    crop_mode: str


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network and its input, named as in timm's scripts."""
    model: str = setting(
        'resnet50', 'any timm model name, the folder of an exported model, or hf-hub:ORG/NAME', metavar='MODEL',
        group='Model parameters')
    pretrained: bool = setting(False, 'use pretrained weights')
    num_classes: Optional[int] = setting(
        None, 'number of classes (default: from the model; in training, from the data)', metavar='N')
    img_size: Optional[int] = setting(None, 'image size (default: from the model)', metavar='N')
    in_chans: Optional[int] = setting(None, 'input channels (default: from the model)', metavar='N')
    input_size: Optional[Tuple[int, int, int]] = setting(None, 'input size as C H W', metavar='N')
    crop_pct: Optional[float] = setting(None, 'validation crop percent', metavar='N')
    crop_mode: Optional[str] = setting(None, 'validation crop: center, squash or border', metavar='MODE')
    mean: Optional[Tuple[float, ...]] = setting(None, 'mean pixel value (default: from the model)', metavar='N')
    std: Optional[Tuple[float, ...]] = setting(None, 'std deviation (default: from the model)', metavar='N')
    interpolation: str = setting('', 'resize interpolation', metavar='NAME')
    gp: Optional[str] = setting(None, 'global pool type', metavar='POOL')
    channels_last: bool = setting(False, 'use channels_last memory layout')
    model_kwargs: Dict[str, Any] = setting(
        {}, 'further arguments of the model, e.g. norm_layer=batchnorm2d', metavar='KEY=VALUE')
    device: Optional[str] = setting(None, 'device (default: cuda if available, else cpu)')

    def __post_init__(self) -> None:
        check_types(self)
        if self.crop_pct is not None:
            check_range('crop_pct', self.crop_pct, 0, open_low=True)
        if self.crop_mode is not None:
            check_choice('crop_mode', self.crop_mode, ('center', 'squash', 'border'))


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ModelConfig):
    """A network with its weights, ready to evaluate."""
    pretrained: bool = setting(True, 'use pretrained weights, unless there is a checkpoint')
    checkpoint: str = setting(
        '', 'weights to load, safetensors or checkpoint (default: pretrained weights)', metavar='PATH')
    use_ema: bool = setting(True, 'prefer the averaged weights of the checkpoint')
    bn_mode: Optional[str] = setting(
        None, 'normalize by population, batch or (RobustNorm) mean statistics (default: those of the model)',
        metavar='MODE')
    gamma: Optional[float] = setting(
        None, 'weight of the BatchNorm for adversarial images, in [0, 1], for a checkpoint of objective mbnat',
        metavar='GAMMA')

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.pretrained or self.checkpoint):
            raise InputError('leaves the network without weights', 'name them in `checkpoint`, or pass a module',
                             argument='pretrained', value=False)
        if self.bn_mode is not None:
            check_choice('bn_mode', self.bn_mode, BN_MODES)
        if self.gamma is None:
            return
        check_range('gamma', self.gamma, 0, 1, note='0 is the BatchNorm of clean images, 1 of adversarial images')
        if not self.checkpoint:
            raise InputError(
                'mixes the two BatchNorms of a training checkpoint of objective mbnat', 'give it as `checkpoint`',
                argument='gamma', value=self.gamma)
        if self.bn_mode not in (None, 'population'):
            raise InputError(
                f'is incompatible with `gamma={self.gamma:g}`, which mixes tracked statistics', 'remove it',
                argument='bn_mode', value=self.bn_mode)


class _TwoClasses(nn.Module):
    """Wraps a network with a single sigmoid output z as one of two classes with logits (0, z)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return as_logits(self.model(x), len(x))


@dataclass
class Network:
    """A network that is ready to evaluate.

    Attributes:
        config: Its settings, completed by the training settings in its checkpoint.
        model: The timm model, in eval mode.
        pixel_model: Takes pixels in [0, 1] and returns logits of two classes or more.
        preprocessing: timm's data config.
        device: Its device.
        checkpoint: Contents of its checkpoint file, None for pretrained weights.
        conversion: What happened to the keys of the checkpoint.
    """
    config: NetworkConfig
    model: nn.Module
    pixel_model: nn.Module
    preprocessing: Preprocessing
    device: torch.device
    checkpoint: Optional[Checkpoint] = None
    conversion: Optional[Conversion] = None

    @property
    def num_classes(self) -> int:
        """Number of classes; two for a single output."""
        return max(num_outputs(self.model), 2)

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights."""
        return weights_sha256(self.model)

    def class_names(self, data_names: Optional[List[str]] = None) -> Optional[List[str]]:
        """Names of the classes by index, if known; ImageNet's only for a comparison with `data_names`."""
        if self.checkpoint is None:
            names = label_names(self.model, data_names)
        else:
            told = self.checkpoint.run.get('class_names')
            names = [str(name) for name in told] if isinstance(told, (list, tuple)) else None
        return names if names and len(names) == self.num_classes else None


def create_network(config: ModelConfig, *, pretrained: bool, adapt: bool = False, **kwargs: Any) -> nn.Module:
    """Create a timm model, and check its pretrained weights against its config.json.

    Args:
        config: The network.
        pretrained: Load pretrained weights.
        adapt: Let timm replace the head or input layer if classes or channels differ, as for fine-tuning.
        **kwargs: Further arguments of timm's models that are separate settings, such as `drop_rate`.

    Raises:
        InputError: If there is no such model, its weights are unavailable or do not match its config.json, or it does
            not accept an argument.
    """
    in_chans = config.in_chans or (config.input_size[0] if config.input_size else None)
    kwargs.update(in_chans=in_chans, num_classes=config.num_classes, global_pool=config.gp)
    for key in sorted({*kwargs, 'pretrained'} & config.model_kwargs.keys()):
        raise InputError(
            f'{key} is a separate setting', 'set that instead', argument='model_kwargs',
            value=f'{key}={config.model_kwargs[key]}')
    name = resolve_name(config.model)
    recorded = read_config(name) if pretrained else None
    model = create_named(name, pretrained, **kwargs, **config.model_kwargs)
    if not pretrained:
        return model
    try:
        check_adapted(model, config.model, {'num_classes': config.num_classes, 'in_chans': in_chans})
    except InputError:
        if not adapt:
            raise
        if recorded and recorded.get('weights_sha256'):
            check_recorded(name, recorded, create_named(name, True))  # before adaptation
    else:
        check_recorded(name, recorded, model)
    return model


def resolve_preprocessing(config: ModelConfig, model: nn.Module) -> Preprocessing:
    """timm's data config, from the settings and the model.

    Raises:
        InputError: If the model does not accept such images, or mean or std is invalid.
    """
    try:
        found = resolve_input_data_config(model, to_mapping(config))
    except (ValueError, AssertionError) as error:
        raise InputError(
            str(error).rstrip('.'), 'change `img_size`, `input_size`, `mean` or `std`, or build a fixed-size '
            'network for it with img_size=N in `model_kwargs`', argument='model', value=config.model) from error
    for key in ('mean', 'std'):
        if not all(math.isfinite(v) and (key == 'mean' or v > 0) for v in found[key]):
            raise InputError(f"must be {'finite' if key == 'mean' else 'above 0'}", argument=key, value=found[key])
    for size in found['input_size']:
        check_at_least('input_size', size)
    check_range('crop_pct', found['crop_pct'], 0, open_low=True)
    resized = max(found['input_size'][1:]) / found['crop_pct']
    if resized > _LARGEST_SIDE:
        raise InputError(f'images would be resized to {resized:.3g} pixels, above {_LARGEST_SIDE}', argument='crop_pct',
                         value=found['crop_pct'])
    check_choice('interpolation', found['interpolation'], INTERPOLATIONS)
    return cast(Preprocessing, found)


def _completed(config: NetworkConfig, run: Mapping[str, Any]) -> NetworkConfig:
    """Fill in unset settings from the training run that wrote the checkpoint."""
    known = {**run, **(run.get('data_config') or {})}
    changes = {}
    for f in dataclasses.fields(config):
        if f.name in _OF_RUN and getattr(config, f.name) == default_of(f) and known.get(f.name) is not None:
            changes[f.name] = known[f.name]
    if any(getattr(config, name) for name in _SIZES):
        changes = {k: v for k, v in changes.items() if k not in _SIZES}
    try:
        return dataclasses.replace(config, **changes)
    except InputError as error:
        raise InputError(
            f'the arguments of its training run are invalid ({error})', argument='checkpoint', value=config.checkpoint
        ) from error


def check_batch_size(model: nn.Module, batch_size: int) -> None:
    """Refuse batches of one image for a network that uses batch statistics."""
    if batch_size == 1 and has_batch_statistics(model):
        raise InputError(
            'this network uses batch statistics', "use a larger batch or `bn_mode='population'`",
            argument='batch_size', value=1)


def _about(error: ValueError, argument: str, value: Any) -> InputError:
    known = error if isinstance(error, InputError) else InputError(str(error))
    return known.about(argument, value)


def _switched(model: nn.Module, config: NetworkConfig) -> nn.Module:
    try:
        if config.bn_mode:
            model = set_bn_mode(model, config.bn_mode)
    except ValueError as error:
        raise _about(error, 'bn_mode', config.bn_mode) from error
    return model


def _with_two_norms(model: nn.Module, gamma: float) -> nn.Module:
    try:
        return set_gamma(convert_aux_norm(model), gamma)
    except ValueError as error:
        raise _about(error, 'gamma', gamma) from error


def build_network(
        config: NetworkConfig,
        device: Optional[torch.device] = None,
        *,
        converts: bool = False,
) -> Network:
    """Build a network and load all of its weights; none stay random.

    Args:
        config: The network.
        device: Its device, by default the device of the config.
        converts: See `fit_weights`.

    Raises:
        InputError: If there is no such network, or its weights are missing, broken, of another network, or not finite.
    """
    device = device or torch.device(resolve_device(config.device))
    checkpoint = read_checkpoint(config.checkpoint, use_ema=config.use_ema) if config.checkpoint else None
    if checkpoint:
        config = _completed(config, checkpoint.run)
    model = create_network(config, pretrained=checkpoint is None)
    if config.gamma is not None:
        model = _with_two_norms(model, config.gamma)
    conversion = fit_weights(model, checkpoint, config.checkpoint, converts=converts) if checkpoint else None
    if not num_outputs(model):
        raise InputError('has no classifier', argument='model', value=config.model)
    broken = next((k for k, v in model.state_dict().items() if v.is_floating_point() and not v.isfinite().all()), None)
    if broken:
        argument, value = ('checkpoint', config.checkpoint) if checkpoint else ('model', config.model)
        raise InputError(
            f'{broken} is not finite: the training run probably diverged', argument=argument, value=value)
    model = _switched(model, config).eval()
    preprocessing = resolve_preprocessing(config, model)
    return Network(
        config, model, pixel_network(model, preprocessing, device, config.channels_last), preprocessing, device,
        checkpoint, conversion)


def pixel_network(
        model: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        channels_last: bool = False,
) -> nn.Module:
    """Wrap a timm model to take pixels in [0, 1], in eval mode on a device; a single output becomes two classes."""
    pixel_model: nn.Module = NormalizedModel(model, preprocessing['mean'], preprocessing['std'])
    if num_outputs(model) == 1:
        pixel_model = _TwoClasses(pixel_model)
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return pixel_model.to(device=device).to(memory_format=memory_format).eval()


def build_surrogate(name: str, network: Network, checkpoint: str = '') -> Network:
    """Another network with the same classes and input, to craft attacks on.

    Args:
        name: A model as in `NetworkConfig`.
        network: The network that is attacked.
        checkpoint: Weights of the surrogate, by default pretrained ones.

    Raises:
        InputError: If it cannot be built, or its classes or input differ from those of the network.
    """
    try:
        found = build_network(dataclasses.replace(
            network.config, model=name, checkpoint=checkpoint, model_kwargs={}, mean=None, std=None, gp=None,
            bn_mode=None, gamma=None, num_classes=num_outputs(network.model) if checkpoint else None), network.device)
    except InputError as error:
        raise error.renamed({'model': 'surrogate', 'checkpoint': 'surrogate_checkpoint'}) from error
    check_surrogate(found, network, name)
    return found


def check_surrogate(found: Network, network: Network, name: str) -> None:
    """Refuse a surrogate, called `name`, whose classes or input differ from those of a network.

    Raises:
        InputError: Saying what differs.
    """
    def wrong(problem: str, remedy: str = '') -> InputError:
        return InputError(problem, remedy, argument='surrogate', value=name)

    if found.num_classes != network.num_classes:
        raise wrong(f'has {found.num_classes} classes, but the model has {network.num_classes}')
    names = network.class_names(found.class_names())
    own = found.class_names(names)
    if names and own and names != own:
        raise wrong('has different classes from the model, or in a different order')
    size, wanted = found.preprocessing['input_size'], network.preprocessing['input_size']
    if size != wanted:
        raise wrong(f'takes {size} images, but the model takes {wanted}', 'give both the same `input_size`')
