"""timm's VGG networks with RobustNorm after every convolution.

Paper: `Towards an Adversarially Robust Normalization Approach` - https://arxiv.org/abs/2006.11007
"""
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vgg import VGG, cfgs

from ._build import HUB_ORG, build_normed_model, imagenet_cfg
from .robustnorm_resnet import ROBUSTNORM_CFG

__all__ = ['vgg_args']

_ARCHS = ('robustnorm_vgg11', 'robustnorm_vgg13', 'robustnorm_vgg16', 'robustnorm_vgg19')


def vgg_args(variant: str, **kwargs: Any) -> dict:
    """Builder arguments of a VGG variant."""
    feature_cfg = dict(flatten_sequential=True, out_indices=kwargs.pop('out_indices', (0, 1, 2, 3, 4, 5)))
    kwargs.setdefault('model_cfg', cfgs[variant.removeprefix('robustnorm_').split('_')[0]])
    return dict(kwargs, feature_cfg=feature_cfg)


def _create_robustnorm_vgg(variant: str, pretrained: bool = False, **kwargs: Any) -> VGG:
    return build_normed_model(VGG, variant, pretrained, **vgg_args(variant, **kwargs))


default_cfgs = generate_default_cfgs({
    f'{name}.robustnorm_in1k': imagenet_cfg(
        **ROBUSTNORM_CFG, hf_hub_id=f'{HUB_ORG}/{name}.robustnorm_in1k',
        first_conv='features.0', classifier='head.fc', interpolation='bilinear')
    for name in _ARCHS
})


@register_model
def robustnorm_vgg11(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-11 with RobustNorm."""
    return _create_robustnorm_vgg('robustnorm_vgg11', pretrained, **kwargs)


@register_model
def robustnorm_vgg13(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-13 with RobustNorm."""
    return _create_robustnorm_vgg('robustnorm_vgg13', pretrained, **kwargs)


@register_model
def robustnorm_vgg16(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-16 with RobustNorm."""
    return _create_robustnorm_vgg('robustnorm_vgg16', pretrained, **kwargs)


@register_model
def robustnorm_vgg19(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-19 with RobustNorm."""
    return _create_robustnorm_vgg('robustnorm_vgg19', pretrained, **kwargs)
