"""What is evaluated: a network and images, in whatever form a caller has them."""
import copy
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union, cast

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, Dataset, Subset

from ..attacks import InputSpace, check_batch, check_images
from ..data import (
    balanced_indices,
    check_classes,
    class_names,
    dataset_labels,
    listed_indices,
    whole_datasets,
)
from ..errors import InputError
from ..inputs import (
    Images,
    ImagesConfig,
    Network,
    NetworkConfig,
    Preprocessing,
    build_network,
    build_surrogate,
    check_batch_size,
    check_surrogate,
    open_images,
    pixel_loader,
    resolve_device,
    weights_sha256,
)
from ..layers import is_norm
from ..models.normalized import NormalizedModel, holds_normalized
from .accuracy import Batches
from .facts import DataFacts, ModelFacts

__all__ = ['DataSource', 'ModelSource', 'Source', 'Subject', 'eval_mode', 'open_data', 'open_model', 'open_surrogate']

ModelSource = Union[str, NetworkConfig, nn.Module]
DataSource = Union[str, Path, ImagesConfig, Tuple[torch.Tensor, Any], Dataset, torch.Tensor]

_logger = logging.getLogger(__name__)

_NAMED_DATA = re.compile(r'(torch|tfds|hfds|hfids|wds)/')


@dataclass
class Subject:
    """The network that is evaluated.

    Attributes:
        model: Takes pixels in [0, 1]; in eval mode.
        device: Where it is.
        facts: What a report says of it.
        preprocessing: timm's data config, where it is known.
        network: The same as what inputs/ takes; None for a module that is no timm model.
    """
    model: nn.Module
    device: torch.device
    facts: ModelFacts
    preprocessing: Optional[Preprocessing] = None
    network: Optional[Network] = None


def _facts(name: str, model: nn.Module, preprocessing: Optional[Preprocessing], **more: Any) -> ModelFacts:
    return ModelFacts(name=name, weights_sha256=weights_sha256(model), **{**(preprocessing or {}), **more})


def _of_network(network: Network) -> Subject:
    config = network.config
    facts = _facts(
        config.model, network.model, network.preprocessing, checkpoint=config.checkpoint, use_ema=config.use_ema,
        model_kwargs=config.model_kwargs, bn_mode=config.bn_mode, gamma=config.gamma, num_classes=network.num_classes)
    return Subject(network.pixel_model, network.device, facts, network.preprocessing, network)


@contextmanager
def eval_mode(*models: Any) -> Iterator[None]:
    """Networks in training mode, as `timm.create_model` returns them, are in eval mode inside.

    A network in eval mode keeps its parts in training mode, such as dropout: they belong to it. Modes and the buffers
    such parts change (running averages) are put back.
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


def _of_module(model: nn.Module, device: Optional[str]) -> Subject:
    low = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if low is not None:
        raise InputError(f'has weights in {low}', 'pass model.float(): verdicts are in float32', argument='model')
    if any(t.device.type == 'meta' for t in (*model.parameters(), *model.buffers())):
        raise InputError('has no weights, it is on the device meta', 'load its weights', argument='model')
    still = next((name for name, part in model.named_modules() if part.training and is_norm(part)), None)
    if still is not None:  # attacks would be crafted on the tracked statistics
        raise InputError(
            f'has a normalization layer in training mode ({still})',
            "call model.eval(), or set_bn_mode(model, 'batch') for batch statistics", argument='model')
    own = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device('cpu'))
    place = own if device is None else torch.device(resolve_device(device))
    if place != own:
        model = copy.deepcopy(model).to(place)  # the caller's network stays where it is
    space = InputSpace.of(model)
    on_pixels = model
    if not space.is_pixels:
        on_pixels = NormalizedModel(model, space.mean, space.std)
        on_pixels.training = False  # and no part of the caller's network, as .eval() would have it
    timm_model: Any = model.model if isinstance(model, NormalizedModel) else model
    name = type(model).__name__
    if not (getattr(timm_model, 'pretrained_cfg', None) and getattr(timm_model, 'num_classes', None)):
        _warn_of_inner_model(model)
        return Subject(on_pixels, place, _facts(name, model, None))
    preprocessing = cast(Preprocessing, resolve_data_config({}, model=timm_model))
    if isinstance(model, NormalizedModel):
        preprocessing['mean'], preprocessing['std'] = _decimals(model.mean), _decimals(model.std)
    name = timm_model.pretrained_cfg.get('architecture') or type(timm_model).__name__
    network = Network(NetworkConfig(model=name), timm_model, on_pixels, preprocessing, place)
    facts = _facts(name, timm_model, preprocessing, num_classes=network.num_classes)
    return Subject(on_pixels, place, facts, preprocessing, network)


def _decimals(values: torch.Tensor) -> Tuple[float, ...]:
    return tuple(float(f'{value:.7g}') for value in values.flatten().tolist())  # of float32, as they were given


def _warn_of_inner_model(model: nn.Module) -> None:
    inner = next((m for m in model.modules() if not InputSpace.of(m).is_pixels), None)
    if inner is not None and not holds_normalized(model):
        _logger.warning(
            f'{type(model).__name__} gets pixels in [0, 1], and the timm model {type(inner).__name__} inside expects '
            'normalized images: unless the former normalizes them, wrap the latter in NormalizedModel')


def open_model(
        model: ModelSource,
        *,
        checkpoint: str = '',
        device: Optional[str] = None,
        main_branch: bool = False,
) -> Subject:
    """The network behind what a caller passed as `model`.

    Args:
        model: A name as `NetworkConfig` takes it, a `NetworkConfig`, or a module: a timm model, which gets mean and std
            of its `pretrained_cfg`, or any other that takes pixels.
        checkpoint: Weights of a network by name.
        device: Where to, by default where a module is.
        main_branch: Of a network by name with two BatchNorms, take that of clean images unless it has a gamma.

    Raises:
        InputError: If it cannot be built, and on what a module or a `NetworkConfig` has no use for.
    """
    if checkpoint and isinstance(model, (nn.Module, NetworkConfig)):
        raise InputError('is for a model by name', 'load the weights into the module, or name them there',
                         argument='checkpoint', value=checkpoint)
    if isinstance(model, nn.Module):
        return _of_module(model, device)
    if isinstance(model, (str, Path)):
        model = NetworkConfig(model=str(model), checkpoint=checkpoint, device=device)
    elif not isinstance(model, NetworkConfig):
        raise InputError(
            f'is {type(model).__name__}', 'pass a module, the name of a timm model, the folder of an exported model or '
            'hf-hub:ORG/NAME', argument='model')
    elif device is not None:
        raise InputError('is a setting of the NetworkConfig', 'give it there', argument='device', value=device)
    if main_branch and model.gamma is None:
        try:
            model = replace(model, gamma=0.)
        except InputError as error:
            raise error.about('gamma_sweep', True) from error
    return _of_network(build_network(model, torch.device(resolve_device(model.device))))


def open_surrogate(surrogate: Union[str, nn.Module, None], subject: Subject, checkpoint: str) -> Optional[Subject]:
    """The network to craft attacks on, if it is another.

    Raises:
        InputError: If its classes or input are not those of the network, or a checkpoint is of no model.
    """
    if checkpoint and (not surrogate or isinstance(surrogate, nn.Module)):
        raise InputError('is of no model', 'name it as `surrogate`', argument='surrogate_checkpoint', value=checkpoint)
    if not surrogate:
        return None
    if isinstance(surrogate, str) and subject.network is not None:
        return _of_network(build_surrogate(surrogate, subject.network, checkpoint))
    try:
        found = open_model(surrogate, checkpoint=checkpoint, device=str(subject.device))
    except InputError as error:
        raise error.renamed({'model': 'surrogate', 'checkpoint': 'surrogate_checkpoint'}) from error
    if found.network is not None and subject.network is not None:
        check_surrogate(found.network, subject.network, found.facts.name)
    return found


class Source:
    """Images to evaluate on.

    Attributes:
        indices: Of the chosen images, in the data set.
        facts: What a report says of the data, indices and labels apart.
        batch_size: Images of a batch.
    """
    indices: List[int]
    facts: DataFacts
    batch_size: int

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        """Batches of pixels in [0, 1] and labels, of all chosen images or those at some positions."""
        raise NotImplementedError

    def first(self, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """The first chosen images and their labels."""
        x, y = zip(*self.loader(range(min(count, len(self.indices)))))
        return torch.cat(x), torch.cat(y)


class _Named(Source):
    """Images of inputs.images."""

    def __init__(self, images: Images):
        self.images, self.indices, self.batch_size = images, images.indices, images.config.batch_size
        config = images.config
        names = images.class_names
        self.facts = DataFacts(
            dataset=config.dataset or 'ImageFolder', data_dir=config.data_dir, split=config.split,
            subset=config.subset, num_images=len(images.dataset), class_names=tuple(names) if names else None,
            mismatch=images.mismatch)

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        return self.images.loader(positions)


class _Tensors(Source):
    """Images in memory."""

    def __init__(self, x: torch.Tensor, y: Any, config: ImagesConfig, seed: int):
        check_images(x)
        if not len(x):
            raise InputError('holds no image', argument='data')
        self.x, self.y = x.detach().float(), check_batch(x, y).labels
        self.indices = _choose(len(x), self.y.cpu().numpy(), config, seed)
        self.batch_size = config.batch_size
        self.facts = DataFacts(dataset='tensors', subset=_how(config), num_images=len(x))

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        rows = self.indices if positions is None else [self.indices[i] for i in positions]
        for part in torch.tensor(rows, device=self.x.device).split(self.batch_size):
            yield self.x[part], self.y[part]


class _Pictures(Dataset):
    """A data set of pictures under a transform that `pixel_loader` sets."""

    def __init__(self, dataset: Any):
        self.dataset, self.targets = dataset, dataset_labels(dataset)
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        picture, label = self.dataset[index]
        return (self.transform(picture) if self.transform else picture), int(label)


class _OfDataset(Source):
    """Images of a data set object: tensors in [0, 1], or pictures to be preprocessed as the network wants them."""

    def __init__(self, dataset: Any, config: ImagesConfig, seed: int, subject: Subject):
        self.dataset, self.config, self.device = dataset, config, subject.device
        self.preprocessing = None
        if isinstance(_first_pair(dataset)[0], Image.Image):
            if subject.preprocessing is None:
                raise InputError(
                    'holds pictures, and the model is no timm model that says how to preprocess them',
                    'give the data set a transform that makes tensors in [0, 1]', argument='data')
            self.preprocessing, self.dataset = subject.preprocessing, _Pictures(dataset)
        if config.subset == 'balanced':
            self.indices = _choose(len(dataset), dataset_labels(dataset), config, seed)
        else:
            self.indices = listed_indices(dataset, config.subset, config.num_examples)
        self.batch_size = config.batch_size
        names, network = class_names(dataset), subject.network
        mismatch = '' if network is None else '; '.join(filter(None, dict.fromkeys(check_classes(
            part, network.num_classes, network.class_names(class_names(part)),
            allow_mismatch=config.allow_class_mismatch, argument='data') for part in whole_datasets(dataset))))
        self.facts = DataFacts(
            dataset=type(dataset).__name__, subset=_how(config), num_images=len(dataset),
            class_names=tuple(names) if names else None, mismatch=mismatch)

    def loader(self, positions: Optional[Sequence[int]] = None) -> Batches:
        indices = self.indices if positions is None else [self.indices[i] for i in positions]
        if self.preprocessing is not None:
            return pixel_loader(
                self.dataset, indices, self.preprocessing, self.device, batch_size=self.batch_size,
                workers=self.config.workers, pin_mem=self.config.pin_mem)
        return self._tensors(indices)

    def _tensors(self, indices: List[int]) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for x, y in DataLoader(
                Subset(self.dataset, indices), batch_size=self.batch_size, num_workers=self.config.workers,
                generator=torch.Generator('cpu')):  # or a seed for its workers is drawn from the caller's
            check_images(x)
            yield x.float(), torch.as_tensor(y, device='cpu')


def _first_pair(dataset: Any) -> Tuple[Any, Any]:
    """The first image of a data set object and its label; `InputError` if it delivers no such pairs."""
    try:
        image, label = dataset[0]
        index = torch.as_tensor(label)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError('delivers no pairs of an image and the index of its class', argument='data') from error
    if index.is_floating_point() or index.ndim:
        raise InputError(f'delivers {label!r} as a label', 'the index of a class is a whole number', argument='data')
    return image, label


def _how(config: ImagesConfig) -> str:
    return '' if config.subset == 'balanced' and config.num_examples is None else config.subset


def _choose(size: int, labels: Any, config: ImagesConfig, seed: int) -> List[int]:
    """All images in their order, or a balanced choice of some."""
    if config.num_examples is None:
        return list(range(size))
    return balanced_indices(labels, size, config.num_examples, seed)


def open_data(
        data: DataSource,
        subject: Subject,
        *,
        seed: int = 0,
        usual_examples: Optional[int] = None,
        **settings: Any,
) -> Source:
    """The images behind what a caller passed as `data`.

    Args:
        data: A folder or the name of a timm data set, an `ImagesConfig`, a pair of images (N, C, H, W) in [0, 1] and
            labels (N,), or a data set of pictures or of such tensors.
        subject: The network they are for.
        seed: Seed of the choice.
        usual_examples: How many images of a folder or named data set to take, if nothing is said and it has as many.
        **settings: Fields of `ImagesConfig` for all but an `ImagesConfig`.

    Raises:
        InputError: If the data cannot be opened or does not fit the network.
    """
    if isinstance(data, (str, Path)):
        named = _NAMED_DATA.match(str(data)) is not None and not Path(data).exists()
        where: Any = {'dataset' if named else 'data_dir': str(data)}
        data = ImagesConfig(**where, **settings)
    if isinstance(data, ImagesConfig):
        if subject.network is None:
            raise InputError(
                'the model is no timm model that says how to preprocess images', 'pass (images, labels), or a data '
                'set with a transform that makes tensors in [0, 1]', argument='data')
        return _Named(open_images(data, subject.network, seed=seed, usual_examples=usual_examples))
    if isinstance(data, (torch.Tensor, np.ndarray)):
        raise InputError('are missing', 'pass the class of each image', argument='labels')
    in_memory = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], (torch.Tensor, np.ndarray))
    for name in ('split', 'subset', 'allow_class_mismatch') if in_memory else ('split',):
        if name in settings:
            raise InputError('is for data by name', 'leave it out', argument=name, value=settings[name])
    config = ImagesConfig(**settings)
    check_batch_size(subject.model, config.batch_size)
    if in_memory:
        images = data[0] if isinstance(data[0], torch.Tensor) else torch.as_tensor(data[0], device='cpu')
        return _Tensors(images, data[1], config, seed)
    if hasattr(data, '__getitem__') and hasattr(data, '__len__') and not isinstance(data, tuple):
        if not len(data):
            raise InputError('holds no image', argument='data')
        return _OfDataset(data, config, seed, subject)
    raise InputError(
        f'is {type(data).__name__}', 'pass (images, labels), a data set with an index (of a loader its data set), a '
        'folder or the name of a timm data set', argument='data')
