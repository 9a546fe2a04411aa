"""A network as timm and transformers load it: weights as safetensors, and a config that vouches for them."""
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
    """Write model.safetensors and, when that is whole, config.json.

    The config holds the hash of the weights, which every way in compares, and the names of the classes, which the
    pipelines of transformers show: descriptions where classes are synsets of ImageNet.

    Args:
        model: A timm model, which knows the arguments that `timm.create_model` built it with.
        folder: Where to; made if it is not there.
        preprocessing: How its images are prepared.
        class_names: Names of its classes by index; those of the weights it began with are not kept.
        pretrained_cfg: What else the config says of the weights, such as their tag and licence.
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
    # of the classes of other weights
    config['pretrained_cfg'].pop('label_names', None)
    config['pretrained_cfg'].pop('label_descriptions', None)
    make_loadable(config, class_names)
    if architecture:
        config['architecture'] = architecture
    config['weights_sha256'] = weights_sha256(model)
    write_weights(folder / 'model.safetensors', model.state_dict())
    write_json(folder / 'config.json', config)


def make_loadable(config: Dict[str, Any], class_names: Optional[Sequence[str]]) -> None:
    """What transformers asks of a config.json of timm: names of classes, and `num_classes` in one place.

    timm repeats it in `model_args`, and transformers passes it to timm twice.
    """
    config.get('model_args', {}).pop('num_classes', None)
    names = published_names(class_names) if class_names else None
    if names:
        config['label_names'] = names
