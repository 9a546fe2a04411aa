"""Whether weights are those their config was written for."""
import json
from pathlib import Path

from safetensors.torch import load_file
from timm.models import parse_model_name
from timm.models._hub import download_from_hf

from ..errors import InputError
from ..evaluation import weights_sha256

__all__ = ['verify_weights']


def verify_weights(name: str) -> None:
    """Compare the weights of a published or exported model with the hash in its config.

    Args:
        name: A model name as timm takes it; anything but 'hf-hub:ORG/NAME' and 'local-dir:PATH' has no such hash.

    Raises:
        InputError: If the weights are others.
    """
    source, place = parse_model_name(name)
    if source == 'hf-hub':
        config = Path(download_from_hf(place, 'config.json'))
        weights = config.with_name('model.safetensors')  # where loading the model has put it
    elif source == 'local-dir':
        config, weights = Path(place) / 'config.json', Path(place) / 'model.safetensors'
    else:
        return
    recorded = json.loads(config.read_text()).get('weights_sha256')
    if recorded and weights.is_file() and weights_sha256(load_file(weights)) != recorded:
        if source != 'local-dir':
            # a cache keeps what it has of a commit for good
            weights.resolve().unlink()
            weights.unlink(missing_ok=True)
        raise InputError(
            f'--model {name}: its weights are not those of its config ({recorded[:12]}): somebody changed or mixed up '
            'a file, fetch it again or ask its author')
