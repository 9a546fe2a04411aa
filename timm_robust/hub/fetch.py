"""Download checkpoints of the papers' authors, for use with `pretrained=True`."""
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, List

import torch
from timm.models import get_pretrained_cfg, is_model

from ..errors import InputError, check_choice
from ..inputs import NetworkConfig, build_network, weights_sha256, write_json, write_weights
from ..models import weights_store

__all__ = ['FETCHED', 'Fetched', 'fetch']

_FOLDER = 'https://drive.google.com/drive/folders/12hXj2M9I7WyNW8nUyz9EpNoQtqJeFkyX'
_REPORT = 'https://github.com/amazon-science/normalizer-free-robust-training/issues/2'
_SUFFIXES = ('.pth', '.pt', '.tar', '.ckpt')


@dataclass(frozen=True)
class _Source:
    """A checkpoint in the authors' folder.

    Attributes:
        pattern: Regular expression that its path matches, lower-case and without punctuation.
        known: What others measured.
    """
    pattern: str
    known: str = 'No independent measurements are known.'


FETCHED = {
    'nofrost_resnet26.nofrost_linf8_in1k': _Source('nofrost(?!star).*resnet26|resnet26.*nofrost(?!star)'),
    'nofrost_resnet50.nofrost_linf8_in1k': _Source(
        'nofrost(?!star).*resnet50|resnet50.*nofrost(?!star)',
        f"Others measured 1.28 % robust accuracy under AutoAttack, Linf 8/255 ({_REPORT}). The authors' 22.45 % is "
        'accuracy under PGD.'),
    'nofrost_resnet50.nofrost_star_linf8_in1k': _Source('nofroststar.*resnet50|resnet50.*nofroststar'),
}


@dataclass(frozen=True)
class Fetched:
    """Weights in the local store.

    Attributes:
        path: The safetensors file.
        name: Model and tag, for `timm.create_model(name, pretrained=True)`.
        file: Path of the checkpoint in the folder of its authors.
        weights_sha256: Hash of the weights.
        known: What others measured.
    """
    path: Path
    name: str
    file: str
    weights_sha256: str
    known: str


def _resolve(name: str) -> str:
    arch, _, tag = name.partition('.')
    if not tag and is_model(arch):
        cfg = get_pretrained_cfg(arch)
        name = f'{arch}.{cfg.tag}' if cfg and f'{arch}.{cfg.tag}' in FETCHED else name
    check_choice('name', name, FETCHED)
    return name


def _gdown() -> Any:
    try:
        import gdown
    except ImportError as error:
        raise InputError('fetching needs gdown', "pip install 'timm-robust[fetch]'") from error
    return gdown


def _plain(path: str) -> str:
    return re.sub('[^a-z0-9]', '', path.lower().replace('*', 'star'))


def _choose(files: List[Any], source: _Source, file: str) -> Any:
    checkpoints = [f for f in files if f.path.endswith(_SUFFIXES)]
    fitting = [f for f in checkpoints if (f.path == file if file else re.search(source.pattern, _plain(f.path)))]
    if len(fitting) == 1:
        return fitting[0]
    listed = ', '.join(sorted(f.path for f in fitting or checkpoints)) or 'no checkpoint'
    problem = f'{len(fitting)} files fit' if fitting else 'no such file' if file else 'no file name matches'
    raise InputError(f'{problem}; {_FOLDER} has {listed}', 'name one of them', argument='file',
                     **({'value': file} if file else {}))


def fetch(name: str, *, file: str = '') -> Fetched:
    """Download a checkpoint of a paper's authors, convert it and put it where `pretrained=True` finds it.

    No code in the checkpoint is run, every tensor must fit the network, and existing weights are replaced.

    Args:
        name: Model with or without tag, one of `FETCHED`.
        file: Path of the checkpoint in the authors' folder, if its name does not identify it.

    Raises:
        InputError: If there is no such checkpoint, it cannot be downloaded, or does not fit the network.
    """
    name = _resolve(name)
    source, gdown = FETCHED[name], _gdown()
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    with TemporaryDirectory() as temporary:
        try:
            listed = gdown.download_folder(_FOLDER, skip_download=True, quiet=True, use_cookies=False)
            chosen = _choose(listed, source, file)
            path = Path(temporary) / Path(chosen.path).name
            gdown.download(id=chosen.id, output=str(path), use_cookies=False)
        except (OSError, gdown.exceptions.DownloadError) as error:
            reason = ' '.join(str(error).split())
            raise InputError(f'{_FOLDER} cannot be read: {reason}',
                             'check the connection, or download the checkpoint by hand and use convert') from error
        network = build_network(NetworkConfig(
            model=name.partition('.')[0], num_classes=cfg.num_classes, checkpoint=str(path)), torch.device('cpu'))
        sha256 = weights_sha256(network.model)
        file_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        stored = weights_store() / f'{name}.safetensors'
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.with_suffix('.json').unlink(missing_ok=True)  # describes the weights that are replaced next
        write_weights(stored, network.model.state_dict())
        write_json(stored.with_suffix('.json'), {
            'name': name, 'folder': _FOLDER, 'file': chosen.path, 'file_sha256': file_sha256, 'weights_sha256': sha256,
            'known': source.known})
    return Fetched(stored, name, chosen.path, sha256, source.known)
