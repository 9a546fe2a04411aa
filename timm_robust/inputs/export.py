"""Export a network for timm and transformers: weights as safetensors, and a config with their hash."""
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Mapping, Optional, Sequence

import torch.nn as nn
from timm.models._hub import save_config_for_hf

from .files import read_json, write_json
from .network import Preprocessing
from .pretrained import published_names
from .weights import weights_sha256, write_weights

__all__ = ['export_model', 'make_loadable']


def export_model(
        model: nn.Module,
        folder: Path,
        *,
        preprocessing: Preprocessing,
        class_names: Optional[Sequence[str]] = None,
        pretrained_cfg: Optional[Mapping[str, Any]] = None,
        architecture: str = '',
) -> None:
    """Write model.safetensors and, once that is complete, config.json.

    The config holds the hash of the weights, which is checked whenever they are loaded, and the names of the classes,
    which the pipelines of transformers show: descriptions if the classes are ImageNet synsets.

    Args:
        model: A model built by `timm.create_model`, whose arguments are recorded in the config.
        folder: Where to write; created if missing.
        preprocessing: Preprocessing of its images.
        class_names: Names of its classes by index; names from initial pretrained weights are removed.
        pretrained_cfg: Further entries about the weights, such as their tag and licence.
        architecture: Name to publish it under, by default its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / 'config.json'
        save_config_for_hf(
            model,
            str(path),
            model_config={'pretrained_cfg': dict(pretrained_cfg or {})},
            data_config=dict(preprocessing),
        )
        config = read_json(path)
    # class names of the initial weights
    config['pretrained_cfg'].pop('label_names', None)
    config['pretrained_cfg'].pop('label_descriptions', None)
    make_loadable(config, class_names)
    if architecture:
        config['architecture'] = architecture
    config['weights_sha256'] = weights_sha256(model)
    write_weights(folder / 'model.safetensors', model.state_dict())
    write_json(folder / 'config.json', config)


def make_loadable(config: Dict[str, Any], class_names: Optional[Sequence[str]]) -> None:
    """Adapt a config.json of timm for transformers: add class names, and keep `num_classes` in one place.

    timm repeats `num_classes` in `model_args`, and transformers would pass it to timm twice.
    """
    config.get('model_args', {}).pop('num_classes', None)
    names = published_names(class_names) if class_names else None
    if names:
        config['label_names'] = names
