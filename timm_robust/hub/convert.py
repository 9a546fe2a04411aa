"""Checkpoints of others as weights of a named model: every key accounted for, nothing unpickled that is code."""
import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import clean_state_dict

from ..errors import InputError
from ..layers import has_aux_norm
from ..train.checkpoint import check_exists, explain

__all__ = [
    'Conversion',
    'convert_state_dict',
    'fixed_input',
    'logits_of_fixed_input',
    'read_checkpoint',
    'write_safetensors',
]

_AVERAGED = ('state_dict_ema', 'model_ema')
_PLAIN = ('state_dict', 'model', 'net', 'weights')
# linear layers of torchvision's VGG and of the RobustNorm repository's, which has a dropout layer more
_VGG_LINEAR = {
    'classifier.0': 'pre_logits.fc1', 'classifier.1': 'pre_logits.fc1', 'classifier.3': 'pre_logits.fc2',
    'classifier.4': 'pre_logits.fc2', 'classifier.6': 'head.fc'}
_COUNTER = 'num_batches_tracked'


@dataclass
class Conversion:
    """What became of the keys of a checkpoint.

    Attributes:
        state_dict: Weights for the model.
        source: What of the checkpoint was taken, for example 'state_dict_ema'.
        renamed: Old and new name, where they differ.
        dropped: Keys left out, each with the reason.
        added: Keys the checkpoint did not have, each with the reason.
    """
    state_dict: Dict[str, torch.Tensor]
    source: str
    renamed: Dict[str, str] = field(default_factory=dict)
    dropped: Dict[str, str] = field(default_factory=dict)
    added: Dict[str, str] = field(default_factory=dict)


def read_checkpoint(path: str, flag: str) -> Any:
    """What a file holds, tensors and plain values alone.

    Args:
        path: A safetensors file, or one of torch.save.
        flag: How messages name the argument.

    Raises:
        InputError: If there is no such file, it is broken, or it holds code.
    """
    check_exists(flag, path)
    try:
        if str(path).endswith('.safetensors'):
            return load_file(path)
        # as timm does: its training checkpoints hold the arguments of the run
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # safetensors, zip and pickle have exceptions of their own each
        raise explain(flag, path, error) from error


def _weights_of(content: Any, use_ema: bool) -> Tuple[str, Dict[str, torch.Tensor]]:
    """The state dict in a checkpoint, and where it was."""
    if isinstance(content, dict):
        for name in (*_AVERAGED, *_PLAIN) if use_ema else (*_PLAIN, *_AVERAGED):
            if isinstance(content.get(name), dict):
                return name, content[name]
        if content and all(isinstance(v, torch.Tensor) for v in content.values()):
            return 'the file itself', content
    raise InputError(f"the checkpoint has no weights under {', '.join((*_AVERAGED, *_PLAIN))} and is no state dict")


def _vgg_name(key: str) -> str:
    """timm's name of a linear layer of another VGG."""
    layer, _, rest = key.rpartition('.')
    return f'{_VGG_LINEAR.get(layer, layer)}.{rest}'


def convert_state_dict(content: Any, model: nn.Module, use_ema: bool = True) -> Conversion:
    """Turn the content of a checkpoint into weights of a model.

    Knows the wrappers of DataParallel and torch.compile, timm's training checkpoints, the authors' NoFrost checkpoints
    (timm's names under `module.`) and those of the RobustNorm repository, whose `running_var` is the range as in
    `RobustNorm2d`.

    Args:
        content: Of `read_checkpoint`.
        model: The model the weights are for; not changed.
        use_ema: Take averaged weights where there are any.

    Returns:
        The weights and a report.

    Raises:
        InputError: If a key is left over or missing, or a shape differs.
    """
    if has_aux_norm(model):
        raise InputError('a model with auxiliary normalization has no plain weights: convert the plain model')
    source, weights = _weights_of(content, use_ema)
    wanted = model.state_dict()
    found = Conversion({}, source)
    unknown = []
    for key, (clean, value) in zip(weights, clean_state_dict(weights).items()):
        name = next((n for n in (clean, _vgg_name(clean)) if n in wanted), None)
        if name is None and key.endswith(_COUNTER):
            found.dropped[key] = 'a counter of batches, which the model does not keep'
        elif name is None:
            unknown.append(key)
        else:
            found.state_dict[name] = _fitted(key, value, name, wanted[name])
            if name != key:
                found.renamed[key] = name
    missing = [name for name in wanted if name not in found.state_dict]
    for name in [n for n in missing if n.endswith(_COUNTER)]:
        found.state_dict[name] = torch.zeros_like(wanted[name])
        found.added[name] = 'a counter of batches, set to 0'
        missing.remove(name)
    problems = [
        f"{text} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for text, keys in (('left over:', unknown), ('missing:', missing)) if keys]
    if problems:
        raise InputError(
            f"the checkpoint does not fit {type(model).__name__}: {'; '.join(problems)}: check --model, --num-classes, "
            '--in-chans and --model-kwargs')
    found.state_dict = {name: found.state_dict[name] for name in wanted}
    return found


def _fitted(key: str, value: Any, name: str, wanted: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InputError(f'the checkpoint holds a {type(value).__name__} under {key}, not a tensor')
    # a linear layer and a convolution of the whole image are the same weights
    if value.shape != wanted.shape and value.numel() == wanted.numel() and {value.ndim, wanted.ndim} == {2, 4}:
        value = value.reshape(wanted.shape)
    if value.shape != wanted.shape:
        raise InputError(
            f'the checkpoint has {tuple(value.shape)} under {key} where {name} is {tuple(wanted.shape)}: check '
            '--model, --num-classes and --in-chans')
    return value.detach().to(wanted.dtype).contiguous().clone()


def fixed_input(model: nn.Module) -> torch.Tensor:
    """Two normalized images that are the same on every machine, of the model's input size."""
    channels, *size = resolve_model_data_config(model)['input_size']
    size = getattr(model, 'in_chans', channels), *size
    count = 2 * int(torch.Size(size).numel())
    # a sequence without a generator, whose stream may change between versions
    return (torch.arange(count, dtype=torch.float64).mul(12.9898).sin() * 2).float().view(2, *size)


@torch.no_grad()
def logits_of_fixed_input(model: nn.Module) -> torch.Tensor:
    """Logits (2, K) by which two people can see that they have the same network; of a model in eval mode."""
    device = next(model.parameters()).device
    return model(fixed_input(model).to(device)).float().cpu()



def write_safetensors(path: Path, state_dict: Dict[str, torch.Tensor]) -> None:
    """Write weights whole or not at all, the same bytes for the same weights."""
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        save_file(state_dict, part, {'format': 'pt'})  # more than one entry would come in any order
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
