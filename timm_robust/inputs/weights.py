"""The only reader of checkpoints: it accounts for every key and never runs code from a file.

Used for all weights: evaluation, conversion, resumed and initial weights of training, surrogates, cards.
"""
import hashlib
import logging
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import safetensors.torch
import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from timm.models._helpers import _torch_load

from ..errors import InputError
from ..layers import RobustNorm2d, has_aux_norm
from ..precision import float32_proper
from .files import PathLike, write_bytes

__all__ = [
    'Checkpoint',
    'Conversion',
    'convert_state_dict',
    'fingerprint',
    'fixed_input',
    'load_weights',
    'logits_of_fixed_input',
    'read_checkpoint',
    'weights_sha256',
    'write_weights',
]

_AVERAGED = ('state_dict_ema', 'model_ema')
_PLAIN = ('state_dict', 'model', 'net', 'weights')
_WRAPPERS = ('model.', 'module.', '_orig_mod.')  # NormalizedModel and similar, DataParallel, torch.compile
# linear layers of torchvision's VGG, and of the RobustNorm repository's with one more dropout layer
_VGG_LINEAR = {
    'classifier.0': 'pre_logits.fc1', 'classifier.1': 'pre_logits.fc1', 'classifier.3': 'pre_logits.fc2',
    'classifier.4': 'pre_logits.fc2', 'classifier.6': 'head.fc'}
_BATCHES = 'num_batches_tracked'
_COUNTERS = {_BATCHES: 'batches', 'n_averaged': 'averaged models'}
_AUX = '.aux.'

_logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """The contents of a file.

    Attributes:
        state_dict: Weights by their names in the file.
        source: Where in the file the weights were, for example 'state_dict_ema'.
        run: Arguments of the training run that wrote it, by name; empty if it holds none.
        keys: Top-level keys of the file, for example 'optimizer'.
    """
    state_dict: Dict[str, Any]
    source: str
    run: Dict[str, Any]
    keys: Tuple[str, ...]


def _read(path: PathLike) -> Any:
    with open(path, 'rb') as file:
        is_safetensors = file.read(9)[8:] == b'{'
    if is_safetensors:
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's warnings about files that are refused below
        return _torch_load(str(path))  # only tensors, plain values, and the arguments of timm's runs


def _weights_in(content: Any, use_ema: bool, source: str = '') -> Tuple[Any, str]:
    for name in (*_AVERAGED, *_PLAIN) if use_ema else (*_PLAIN, *_AVERAGED):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            return _weights_in(content[name], use_ema, f'{source}.{name}'.lstrip('.'))
    return content, source or 'the file itself'


def read_checkpoint(path: PathLike, *, use_ema: bool = True, argument: str = 'checkpoint') -> Checkpoint:
    """Read a file of weights without running any code in it.

    Args:
        path: A safetensors file or one of `torch.save`: a state dict, or one under `state_dict`, `model`, `net` or
            `weights`, such as a training checkpoint of timm.
        use_ema: Prefer averaged weights if the file has them.
        argument: Name of the path in errors.

    Raises:
        InputError: If there is no such file, it is broken or holds code, or holds no weights.
    """
    path = str(path)

    def wrong(problem: str, remedy: str = '') -> InputError:
        return InputError(problem, remedy, argument=argument, value=path)

    if os.path.isdir(path):
        raise wrong('is a folder', 'give the path of the file in it')
    if not os.path.isfile(path):
        raise wrong('no such file', 'give the path of a .safetensors, .pth or .pth.tar file')
    try:
        content = _read(path)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, zip and pickle each have their own exceptions
        if 'Unsupported globals' in str(error):
            raise wrong('cannot be loaded: it holds code, which is never run',
                        'ask its author for a safetensors file or a plain state dict') from error
        raise wrong(f'cannot be loaded: it is truncated or not a checkpoint ({type(error).__name__})',
                    'copy it again or use an earlier one') from error
    weights, source = _weights_in(content, use_ema)
    if not isinstance(weights, Mapping) or not any(isinstance(v, torch.Tensor) for v in weights.values()):
        raise wrong(f"has no weights under {', '.join((*_AVERAGED, *_PLAIN))} and is not a state dict")
    if not all(isinstance(key, str) for key in weights):
        raise wrong('has keys that are not strings: it is not a state dict of a network')
    run = content.get('args')
    run = run if isinstance(run, dict) else getattr(run, '__dict__', {})
    return Checkpoint(dict(weights), source, dict(run), tuple(content) if weights is not content else ())


@dataclass
class Conversion:
    """What happened to the keys of a state dict.

    Attributes:
        state_dict: Weights for the model.
        renamed: Old and new name, if they differ.
        dropped: Dropped keys, each with the reason.
        added: Keys that were missing, each with the reason.
    """
    state_dict: Dict[str, torch.Tensor] = field(default_factory=dict)
    renamed: Dict[str, str] = field(default_factory=dict)
    dropped: Dict[str, str] = field(default_factory=dict)
    added: Dict[str, str] = field(default_factory=dict)


def _candidates(key: str) -> Iterator[str]:
    """Possible names for a key: the key itself, then with one wrapper after another removed."""
    while True:
        layer, _, rest = key.rpartition('.')
        yield key
        yield f'{_VGG_LINEAR.get(layer, layer)}.{rest}'
        inner = next((key[len(w):] for w in _WRAPPERS if key.startswith(w)), None)
        if inner is None:
            return
        key = inner


def _counter(key: str) -> str:
    """What a key counts, '' if it is a weight."""
    return _COUNTERS.get(key.rpartition('.')[-1], '')


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> Conversion:
    """Turn a state dict into the weights of a model, accounting for every key.

    Reads the wrappers `module.`, `_orig_mod.` and `model.` in any order, the authors' NoFrost checkpoints (timm's names
    under `module.`) and those of the RobustNorm repository, whose `running_var` is the range as in `RobustNorm2d`.

    Args:
        state_dict: Returned by `read_checkpoint`.
        model: The network; it is not changed.

    Raises:
        InputError: If keys are left over or missing, or a tensor does not fit.
    """
    wanted = model.state_dict()
    found = Conversion()
    unknown = []
    for key, value in state_dict.items():
        name = next((n for n in _candidates(key) if n in wanted), None)
        if name in found.state_dict:
            raise InputError(f'holds {name} more than once')
        if name is not None:
            found.state_dict[name] = _fitted(key, value, name, wanted[name])
            if name != key:
                found.renamed[key] = name
        elif _counter(key):
            found.dropped[key] = f'a counter of {_counter(key)}, which the model does not keep'
        else:
            unknown.append(key)
    missing = [name for name in wanted if name not in found.state_dict]
    for name in [n for n in missing if _counter(n)]:
        found.state_dict[name] = torch.zeros_like(wanted[name])
        found.added[name] = f'a counter of {_counter(name)}, set to 0'
        missing.remove(name)
    if unknown or missing:
        raise _misfit(model, unknown, missing)
    found.state_dict = {name: found.state_dict[name] for name in wanted}
    return found


def _misfit(model: nn.Module, unknown: List[str], missing: List[str]) -> InputError:
    if any(_AUX in key for key in unknown) and not has_aux_norm(model):
        return InputError(
            'has a second BatchNorm (objective mbnat)',
            'choose between the two with `gamma` or continue with that objective; export/ and export_aux/ of its run '
            'each have a single one')
    if missing and all(_AUX in name for name in missing):
        return InputError(
            'has no second BatchNorm (objective mbnat)', 'remove `gamma`, or use the objective of its run')
    listed = [
        f"{text} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for text, keys in (('missing', missing), ('left over', unknown)) if keys]
    return InputError(
        f'does not fit {type(model).__name__}: it has a different architecture or number of classes '
        f"({'; '.join(listed)})",
        'check `model`, `num_classes`, `in_chans` and `model_kwargs`')


def _fitted(key: str, value: Any, name: str, wanted: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InputError(f'holds a {type(value).__name__} under {key}, not a tensor')
    plain = value.layout == torch.strided and not value.is_quantized and value.device.type != 'meta'
    if not plain or value.is_complex() or wanted.is_floating_point() and not value.is_floating_point():
        kind = 'tensor without values' if value.device.type == 'meta' else (
            f'{value.dtype} tensor of layout {value.layout}'.replace('torch.', ''))
        raise InputError(f'holds a {kind} under {key}, not the plain floats of a weight')
    # a linear layer has the same weights as a convolution over the whole input
    if value.shape != wanted.shape and value.numel() == wanted.numel() and {value.ndim, wanted.ndim} == {2, 4}:
        value = value.reshape(wanted.shape)
    if value.shape != wanted.shape:
        raise InputError(
            f'has {tuple(value.shape)} under {key} where {name} is {tuple(wanted.shape)}: it has a different '
            'architecture or number of classes', 'check `model`, `num_classes` and `in_chans`')
    return value.detach().to(wanted.dtype).contiguous().clone()


def load_weights(
        model: nn.Module,
        path: PathLike,
        *,
        use_ema: bool = True,
        argument: str = 'checkpoint',
) -> Tuple[Checkpoint, Conversion]:
    """Read a file and load its weights into a network.

    Args:
        model: The network.
        path: See `read_checkpoint`.
        use_ema: Prefer averaged weights if the file has them.
        argument: Name of the path in errors.

    Returns:
        The contents of the file and what happened to its keys.

    Raises:
        InputError: If the file is missing, broken or holds code, or its weights do not fit.
    """
    checkpoint = read_checkpoint(path, use_ema=use_ema, argument=argument)
    return checkpoint, fit_weights(model, checkpoint, path, argument)


def fit_weights(
        model: nn.Module,
        checkpoint: Checkpoint,
        path: PathLike,
        argument: str = 'checkpoint',
        converts: bool = False,
) -> Conversion:
    """Load a checkpoint into a network; `InputError` if it does not fit.

    With `converts`, the result will be inspected, so a file that seems to have another norm only logs a warning.
    """
    try:
        found = convert_state_dict(checkpoint.state_dict, model)
        doubt = _doubt_of_norm(model, found)
        if doubt and not converts:
            raise InputError(doubt[0], f'{doubt[1]}; such a file must be converted first')
    except InputError as error:
        raise error.about(argument, str(path)) from error
    if doubt:
        _logger.warning(f'{path} {doubt[0]}: {doubt[1]}')
    model.load_state_dict(found.state_dict)
    return found


def _doubt_of_norm(model: nn.Module, found: Conversion) -> Tuple[str, ...]:
    """Problem and remedy if the weights seem to be of BatchNorm in place of RobustNorm or the reverse, else ().

    Both have the same names and shapes; only the counters of batches differ.
    """
    dropped, added = (any(key.endswith(_BATCHES) for key in keys) for keys in (found.dropped, found.added))
    if dropped and any(isinstance(m, RobustNorm2d) for m in model.modules()):
        return (
            'counts batches, as BatchNorm does, but the network has RobustNorm',
            'build the network with norm_layer=batchnorm2d unless the file is from the RobustNorm repository')
    if added:
        return (
            'does not count batches, like RobustNorm, but the network has BatchNorm',
            'build the network with RobustNorm unless the file is from an old version of torch')
    return ()


def weights_sha256(model: Union[nn.Module, Mapping[str, torch.Tensor]]) -> str:
    """Hash of a model or state dict: names, types, shapes and values, independent of the file format.

    Half precision counts as float32, which holds the same values: a float32 network has the same hash as the float16
    file it was loaded from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((model.state_dict() if isinstance(model, nn.Module) else model).items()):
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b'')
    return digest.hexdigest()


def write_weights(path: PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically; the same weights give the same bytes in any memory format."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    # several metadata entries would be written in arbitrary order
    write_bytes(path, safetensors.torch.save(tensors, {'format': 'pt'}))


def fixed_input(model: nn.Module, input_size: Optional[Sequence[int]] = None) -> torch.Tensor:
    """Two normalized images of an input size, by default the model's; the same on every machine."""
    channels, *size = input_size or resolve_model_data_config(model)['input_size']
    size = getattr(model, 'in_chans', channels), *size
    count = 2 * int(torch.Size(size).numel())
    # no random generator, since its stream may change between versions
    return (torch.arange(count, dtype=torch.float64, device='cpu').mul(12.9898).sin() * 2).float().view(2, *size)


@torch.no_grad()
def logits_of_fixed_input(model: nn.Module, input_size: Optional[Sequence[int]] = None) -> torch.Tensor:
    """Logits (2, K) of a model in eval mode, to check that two people have the same network."""
    device = next(model.parameters()).device
    with float32_proper():
        return model(fixed_input(model, input_size).to(device)).float().cpu()


def fingerprint(model: nn.Module, input_size: Optional[Sequence[int]] = None) -> Optional[Tuple[float, ...]]:
    """The first logits of `logits_of_fixed_input`; None if two passes differ.

    Other arguments of a network change them, even if they leave its weights unchanged.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        first, second = (logits_of_fixed_input(model, input_size)[:, :8].flatten() for _ in range(2))
    return tuple(first.tolist()) if torch.allclose(first, second, 1e-4, 1e-4) else None
