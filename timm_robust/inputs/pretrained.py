"""Pretrained weights and their verification: names of models, config.json, and the hash it records."""
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, cast

import huggingface_hub
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import (
    PretrainedCfg,
    create_model,
    get_pretrained_cfg,
    is_model,
    parse_model_name,
    split_model_name_tag,
)

from ..errors import InputError
from ..models._build import check_reachable
from .files import read_json
from .weights import weights_sha256

__all__ = [
    'check_adapted',
    'check_recorded',
    'create_named',
    'label_names',
    'num_outputs',
    'published_names',
    'read_config',
    'resolve_name',
]

_SYNSET = re.compile(r'n\d{8}')
_NUMBERS = ('mean', 'std')


def num_outputs(model: nn.Module) -> int:
    """Number of logits of a timm model."""
    return cast(int, model.num_classes)


def _pretrained_cfg(model: nn.Module) -> Dict[str, Any]:
    return cast(Dict[str, Any], model.pretrained_cfg)


def resolve_name(name: str) -> str:
    """The name in timm's form: the folder of an exported model gets the prefix 'local-dir:'.

    Raises:
        InputError: If a folder holds no model.
    """
    if is_model(split_model_name_tag(name)[0]) or ':' in name and not Path(name).is_dir():
        return name
    if Path(name).is_dir():
        if not (Path(name) / 'config.json').is_file():
            raise InputError('is a folder without config.json',
                             'give the folder export/ of a training run', argument='model', value=name)
        return f'local-dir:{name}'
    return name


def _config_path(source: Optional[str], place: str) -> Optional[Path]:
    if source == 'local-dir':
        return Path(place) / 'config.json'
    if source == 'hf-hub':
        repo, _, revision = place.partition('@')
        return Path(huggingface_hub.hf_hub_download(repo, 'config.json', revision=revision or None))
    return None


def read_config(name: str) -> Optional[Dict[str, Any]]:
    """Content of the config.json of an exported or published model, None for models of timm's registry.

    Args:
        name: The name in timm's form.

    Raises:
        InputError: If it is missing or not the config of a network.
    """
    try:
        source, place = parse_model_name(name)
        check_reachable('', PretrainedCfg(hf_hub_id=place if source == 'hf-hub' else None))
        path = _config_path(source, place)
    except Exception as error:  # of the Hub's client or its HTTP library
        raise unavailable(name, error) from error
    if path is None:
        return None

    def refuse(what: str) -> InputError:
        return InputError(f'its config.json {what}', 'export the model again', argument='model', value=name)

    try:
        config = read_json(path)
    except InputError as error:
        raise refuse(error.problem) from error

    cfg = config.get('pretrained_cfg', config)
    if not isinstance(config.get('architecture'), str) or not isinstance(cfg, dict):
        raise refuse('names no architecture')
    size = cfg.get('input_size')
    channels = size[0] if isinstance(size, list) and size else 3
    for key in _NUMBERS:
        values = cfg.get(key)
        numbers = isinstance(values, list) and values and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        if values is not None and not numbers:
            raise refuse(f'has {values!r} as {key}, which must be numbers')
        if values is not None and len(values) not in (1, channels):
            raise refuse(f'has {len(values)} numbers as {key}, for {channels} channels')
    for key, kind in (('weights_sha256', str), ('num_classes', int), ('model_args', dict)):
        if not isinstance(config.get(key, kind()), kind):
            raise refuse(f'has {config[key]!r} as {key}')
    return config


def unavailable(name: str, error: Exception) -> InputError:
    """The one-line error for a model that cannot be built or fetched."""
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    known = 'timm.list_models() lists the names' if 'Unknown model' in reason else ''
    return InputError(reason, known, argument='model', value=name)


def create_named(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with one-line errors.

    Raises:
        InputError: If there is no such model, its weights are unavailable, or it does not accept an argument.
    """
    try:
        cfg = None if ':' in name else get_pretrained_cfg(name)
        if pretrained and cfg is not None:
            check_reachable(split_model_name_tag(name)[0], cfg)
        return create_model(name, pretrained=pretrained, **kwargs)
    except InputError:
        raise
    except Exception as error:  # timm, torch, safetensors and the Hub's client each have their own exceptions
        raise unavailable(name, error) from error


def check_adapted(model: nn.Module, name: str, asked: Mapping[str, Optional[int]]) -> None:
    """Refuse pretrained weights that timm loaded only in part, because classes or input channels differ.

    Args:
        model: Built with its pretrained weights.
        name: Its name in errors.
        asked: `num_classes` and `in_chans` as the caller gave them.

    Raises:
        InputError: Naming what does not match the weights.
    """
    cfg = _pretrained_cfg(model)
    size = cfg.get('input_size') or (3,)
    held = {'num_classes': cfg.get('num_classes'), 'in_chans': size[0]}
    built = {'num_classes': num_outputs(model), 'in_chans': getattr(model, 'in_chans', size[0])}
    for key, text in (('num_classes', 'classes'), ('in_chans', 'input channels')):
        if held[key] is not None and built[key] != held[key]:
            argument, value = (key, asked[key]) if asked.get(key) is not None else ('model', name)
            raise InputError(
                f'the pretrained weights have {held[key]} {text}, not {built[key]}: the rest would be random',
                'remove it, or give matching weights as `checkpoint`', argument=argument, value=value)


def check_recorded(name: str, config: Optional[Mapping[str, Any]], model: nn.Module) -> None:
    """Refuse a network whose weights do not match its config.json.

    Args:
        name: The name in timm's form.
        config: Returned by `read_config`.
        model: The network as loaded.

    Raises:
        InputError: If the hash of its weights differs.
    """
    recorded = (config or {}).get('weights_sha256')
    if not recorded or weights_sha256(model) == recorded:
        return
    source, place = parse_model_name(name)
    if source == 'hf-hub':
        _forget(place)
    raise InputError(
        f'its weights do not match its config ({recorded[:12]}): a file was changed or mixed up',
        'fetch it again or ask its author', argument='model', value=name)


def _forget(place: str) -> None:
    """Delete cached weights, since the cache never refreshes the files of a commit."""
    repo, _, revision = place.partition('@')
    for name in ('model.safetensors', 'pytorch_model.bin'):
        cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(cached, str):
            Path(cached).resolve().unlink(missing_ok=True)
            Path(cached).unlink(missing_ok=True)


@cache
def _descriptions() -> Dict[str, str]:
    """Descriptions of ImageNet's classes, by synset, in the order of class indices."""
    return cast(Dict[str, str], ImageNetInfo('imagenet-1k').label_descriptions(as_dict=True))


def published_names(names: Sequence[str]) -> Optional[List[str]]:
    """Readable names of classes for a config: descriptions of ImageNet synsets, other names unchanged.

    None for the 1,000 classes of ImageNet, whose descriptions timm and transformers infer from the number of classes.
    """
    known = _descriptions()
    if list(names) == list(known):
        return None
    texts = [known.get(name, '') for name in names]
    return texts if all(texts) and len(set(texts)) == len(texts) else list(names)


def label_names(model: nn.Module, data_names: Optional[Sequence[str]] = None) -> Optional[List[str]]:
    """Names of the classes of pretrained weights by index, if known.

    Args:
        model: A model with a `pretrained_cfg`.
        data_names: Class names of the data, to compare with. If they are synsets, the classes of timm's ImageNet
            networks are named by synset too, and descriptions of the same synsets in a config count as equal.
    """
    names = _pretrained_cfg(model).get('label_names')
    if isinstance(names, Mapping):
        names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    if isinstance(names, (list, tuple)) and len(names) == num_outputs(model) and all(isinstance(n, str) for n in names):
        of_data = data_names and published_names(data_names)
        return list(data_names) if data_names and of_data == list(names) else list(names)
    subset = infer_imagenet_subset(model)
    if subset and data_names and all(map(_SYNSET.fullmatch, data_names)):
        return ImageNetInfo(subset).label_names()
    return None
