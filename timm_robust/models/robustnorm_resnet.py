"""timm's ResNets with RobustNorm in place of BatchNorm.

Paper: `Towards an Adversarially Robust Normalization Approach` - https://arxiv.org/abs/2006.11007

With `norm_layer='batchnorm2d'` the same builders make the BatchNorm counterparts.
"""
from typing import Any, Dict

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ._build import HUB_ORG, build_normed_model, imagenet_cfg

__all__ = ['ROBUSTNORM_CFG']

ROBUSTNORM_CFG: Dict[str, Any] = dict(
    paper_name='Towards an Adversarially Robust Normalization Approach', paper_ids='arXiv:2006.11007',
)

_ARCHS = dict(
    robustnorm_resnet18=dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    robustnorm_resnet34=dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    robustnorm_resnet50=dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    robustnorm_resnet101=dict(block=Bottleneck, layers=(3, 4, 23, 3)),
)


def _create_robustnorm_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> ResNet:
    return build_normed_model(ResNet, variant, pretrained, **{**_ARCHS[variant], **kwargs})


default_cfgs = generate_default_cfgs({
    f'{name}.robustnorm_in1k': imagenet_cfg(
        **ROBUSTNORM_CFG, hf_hub_id=f'{HUB_ORG}/{name}.robustnorm_in1k', first_conv='conv1', classifier='fc')
    for name in _ARCHS
})


@register_model
def robustnorm_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with RobustNorm."""
    return _create_robustnorm_resnet('robustnorm_resnet18', pretrained, **kwargs)


@register_model
def robustnorm_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 with RobustNorm."""
    return _create_robustnorm_resnet('robustnorm_resnet34', pretrained, **kwargs)


@register_model
def robustnorm_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with RobustNorm."""
    return _create_robustnorm_resnet('robustnorm_resnet50', pretrained, **kwargs)


@register_model
def robustnorm_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-101 with RobustNorm."""
    return _create_robustnorm_resnet('robustnorm_resnet101', pretrained, **kwargs)
