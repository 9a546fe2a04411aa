"""timm's model builder, with a one-line error if pretrained weights are unavailable."""
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_norm_layer
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg

from ..errors import PretrainedWeightsError
from ..layers import RobustNorm2d

__all__ = [
    'CIFAR10_MEAN',
    'CIFAR10_STD',
    'HUB_ORG',
    'WEIGHTS_DIR',
    'build_normed_model',
    'build_robust_model',
    'check_reachable',
    'cifar_cfg',
    'classes_of',
    'imagenet_cfg',
    'small_cfgs',
    'stored_weights',
    'weights_store',
]

_Model = TypeVar('_Model', bound=nn.Module)

HUB_ORG = 'timm-robust'
WEIGHTS_DIR = Path(__file__).parent / 'weights'
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
_CLASSES = {
    'cifar10': ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
    'imagenette': (
        'tench, Tinca tinca', 'English springer, English springer spaniel', 'cassette player', 'chain saw, chainsaw',
        'church, church building', 'French horn, horn', 'garbage truck, dustcart',
        'gas pump, gasoline pump, petrol pump, island dispenser', 'golf ball', 'parachute, chute'),
    'fashion_mnist': (
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
}

_NORMS = {  # in addition to the names timm knows
    'robustnorm2d': RobustNorm2d,
    'instancenorm2d': partial(nn.InstanceNorm2d, affine=True),
}

_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
_PATIENCE = 5  # seconds
_NO_WEIGHTS = 'No pretrained weights exist'  # the message of timm's builder for a tag without a location


def weights_store() -> Path:
    """Folder of weights on this machine, named MODEL.TAG.safetensors, where `pretrained=True` looks before the Hub.

    `timm_robust` in the folder of torch.hub: `$TORCH_HOME/hub`, by default `~/.cache/torch/hub`.
    """
    return Path(torch.hub.get_dir()) / 'timm_robust'


def stored_weights(name: str) -> Optional[Path]:
    """The weights of a model and tag in this package or in the local store, None if neither has them."""
    places = (folder / f'{name}.safetensors' for folder in (WEIGHTS_DIR, weights_store()))
    return next((path for path in places if path.is_file()), None)


def imagenet_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Pretrained config of an ImageNet-size model."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'license': 'apache-2.0', **kwargs,
    }


def cifar_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Pretrained config of a CIFAR-size model."""
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': CIFAR10_MEAN, 'std': CIFAR10_STD,
        'license': 'apache-2.0', **kwargs,
    }


def classes_of(name: str) -> Optional[Tuple[str, ...]]:
    """Class names of the training data that a tag ends in, or None if it is not known."""
    return next((names for data, names in _CLASSES.items() if name.endswith(data)), None)


def small_cfgs(
        names: Iterable[str],
        fashion_mnist_size: int = 28,
        **kwargs: Any,
) -> Dict[str, Union[Dict[str, Any], PretrainedCfg]]:
    """Pretrained configs of models with tags that end in their training data, cifar10 or fashion_mnist."""
    size = fashion_mnist_size
    fashion = dict(input_size=(1, size, size), pool_size=(size // 4, size // 4), mean=(0.286,), std=(0.353,))
    return {
        name: cifar_cfg(hf_hub_id=f'{HUB_ORG}/{name}', label_names=classes_of(name), **{
            **(fashion if name.endswith('fashion_mnist') else {}), **kwargs})
        for name in names}


def _resolve_norm(norm_layer: Any, norm_kwargs: Optional[Dict[str, Any]]) -> Any:
    """A norm layer in the form timm's models accept."""
    if isinstance(norm_layer, str):
        norm_layer = _NORMS.get(norm_layer.replace('_', '').lower(), norm_layer)
    try:
        norm_layer = get_norm_layer(norm_layer)
    except KeyError:
        raise ValueError(f"norm_layer={norm_layer!r}: choose {', '.join(_NORMS)} or one of timm's norms") from None
    return partial(norm_layer, **norm_kwargs) if norm_kwargs else norm_layer


def _packaged_tags(variant: str) -> str:
    """Text that lists the weights of a model in this package, to suggest instead of unavailable ones."""
    found = ', '.join(sorted(p.stem for p in WEIGHTS_DIR.glob(f'{variant}.*.safetensors')))
    return f'this package has weights of {found}' if found else (
        'this package has no weights of this network: train it (train_scripts/recipes), or see timm-robust models')


def _cfg(variant: str, kwargs: Dict[str, Any]) -> PretrainedCfg:
    return resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))


def _own_tag(cfg: PretrainedCfg) -> str:
    """The tag whose weights are requested, or '' if the caller provides other weights."""
    named = cfg.source in ('hf-hub', 'local-dir') or cfg.file or cfg.state_dict
    return '' if named else cfg.tag or ''


def check_reachable(variant: str, cfg: PretrainedCfg) -> None:
    """Fail immediately, not after a minute of retries, if only the Hub has the weights and it is unreachable."""
    elsewhere = cfg.file or cfg.state_dict or stored_weights(f'{variant}.{_own_tag(cfg)}')
    if not cfg.hf_hub_id or elsewhere:
        return
    repo, _, revision = cfg.hf_hub_id.partition('@')
    cached = (try_to_load_from_cache(repo, f, revision=revision or None) for f in _HUB_FILES)
    if not any(isinstance(path, str) for path in cached):
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)


def _is_missing(error: Exception) -> bool:
    """Whether weights are unavailable. Incompatible weights do not count: timm's own errors explain them."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(_NO_WEIGHTS)
    return isinstance(error, OSError) or type(error).__module__.startswith(('httpx', 'httpcore', 'requests'))


def build_robust_model(
        model_cls: Type[_Model],
        variant: str,
        pretrained: bool,
        authors_checkpoint: str = '',
        **kwargs: Any,
) -> _Model:
    """`timm.models.build_model_with_cfg` with a one-line error for missing weights.

    Args:
        model_cls: Model class.
        variant: Registered model name.
        pretrained: Load the weights of the tag in `pretrained_cfg`.
        authors_checkpoint: How to load a checkpoint released by the paper's authors; part of the error message.
        **kwargs: Arguments of timm's builder and of the model.

    Raises:
        PretrainedWeightsError: If the weights of the tag cannot be fetched.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, False, **kwargs)
    stored = stored_weights(f'{variant}.{_own_tag(_cfg(variant, kwargs))}')
    if stored:
        kwargs['pretrained_cfg_overlay'] = {**(kwargs.get('pretrained_cfg_overlay') or {}), 'file': str(stored)}
    try:
        check_reachable(variant, _cfg(variant, kwargs))
        return build_model_with_cfg(model_cls, variant, True, **kwargs)
    except Exception as error:
        if not _is_missing(error):
            raise
        cfg = _cfg(variant, kwargs).to_dict()
        tag = f"{variant}.{cfg['tag']}" if cfg.get('tag') else variant
        looked = cfg.get('file') or cfg.get('hf_hub_id') and f"the Hugging Face Hub at {cfg['hf_hub_id']}"
        message = (
            f'pretrained weights of {tag!r} cannot be fetched: looked in {looked or "no location: the tag has none"} '
            f'({type(error).__name__}); {_packaged_tags(variant)}')
        raise PretrainedWeightsError(f'{message}; {authors_checkpoint}' if authors_checkpoint else message) from error


def build_normed_model(
        model_cls: Type[_Model],
        variant: str,
        pretrained: bool,
        norm_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> _Model:
    """`build_robust_model` with RobustNorm if the model name begins with 'robustnorm', else with BatchNorm.

    Args:
        model_cls: Model class.
        variant: Registered model name.
        pretrained: Load the weights of the tag in `pretrained_cfg`.
        norm_kwargs: Arguments of each norm, such as RobustNorm's `power`.
        **kwargs: Arguments of `build_robust_model`; `norm_layer` is a class, or a name: 'robustnorm2d',
            'instancenorm2d' or one of timm's.

    Raises:
        PretrainedWeightsError: If the weights of the tag cannot be fetched.
        ValueError: If the norm is unknown, or the weights of a tag are requested with a different norm.
    """
    own_norm = 'robustnorm2d' if variant.startswith('robustnorm') else 'batchnorm2d'
    norm_layer = _resolve_norm(kwargs.pop('norm_layer', own_norm), norm_kwargs)
    tag = _own_tag(_cfg(variant, kwargs)) if pretrained else ''
    if tag and norm_layer is not _resolve_norm(own_norm, None):
        raise ValueError(
            f'norm_layer, norm_kwargs: weights of {variant}.{tag} were trained with {own_norm} and its defaults; '
            'leave both out, or choose weights trained with your norm (see timm-robust models)')
    return build_robust_model(model_cls, variant, pretrained, norm_layer=norm_layer, **kwargs)
