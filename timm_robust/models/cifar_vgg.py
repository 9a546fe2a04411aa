"""The RobustNorm paper's VGG networks for 32x32 images, with RobustNorm or BatchNorm.

Paper: `Towards an Adversarially Robust Normalization Approach` - https://arxiv.org/abs/2006.11007
"""
from functools import partial
from typing import Any, Dict, List, Optional, Union

import torch
import torch.nn as nn
from timm.layers import ClassifierHead
from timm.models import generate_default_cfgs, register_model
from timm.models.vgg import VGG, ConvMlp

from ._build import build_normed_model, small_cfgs
from .robustnorm_resnet import ROBUSTNORM_CFG
from .robustnorm_vgg import vgg_args

__all__ = ['CifarVGG']


class CifarVGG(VGG):
    """timm's VGG with one linear layer on the pooled features, without the two layers of 4096 units.

    Args:
        cfg: Configuration list of the feature layers.
        num_classes: Number of classes.
        global_pool: Global pooling type.
        drop_rate: Dropout rate before the classifier.
        hidden_size: Units of two extra linear layers before the classifier, 512 in the paper's code; none by default.
        **kwargs: Arguments of timm's `VGG`.
    """

    def __init__(
            self,
            cfg: List[Any],
            num_classes: int = 10,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            hidden_size: int = 0,
            device: Union[torch.device, str, None] = None,
            dtype: Optional[torch.dtype] = None,
            **kwargs: Any,
    ):
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        # one hidden unit: VGG's two hidden layers are replaced below, so they are not built at full size
        super().__init__(
            cfg, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, mlp_ratio=1 / 4096,
            **dd, **kwargs)
        self.head_hidden_size = hidden_size or self.num_features
        self.pre_logits = nn.Identity()  # type: ignore[assignment]  # annotated for VGG's own layers
        if hidden_size:
            self.pre_logits = ConvMlp(self.num_features, hidden_size, kernel_size=1, drop_rate=drop_rate, **dd)
        self.head = ClassifierHead(
            self.head_hidden_size, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        if num_classes > 0:
            nn.init.normal_(self.head.fc.weight, 0, 0.01)
            nn.init.zeros_(self.head.fc.bias)


_ROBUSTNORM_ARCHS = ('robustnorm_vgg11_cifar', 'robustnorm_vgg16_cifar')
_vgg_cfgs = partial(
    small_cfgs,
    fashion_mnist_size=32,  # 28 pixels are too few for five poolings
    first_conv='features.0', classifier='head.fc', pool_size=(1, 1))


def _create_cifar_vgg(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    return build_normed_model(CifarVGG, variant, pretrained, **vgg_args(variant, **kwargs))


default_cfgs = generate_default_cfgs({
    **_vgg_cfgs(
        ('vgg11_cifar.standard_cifar10', 'vgg11_cifar.standard_fashion_mnist'),
        paper_name='Very Deep Convolutional Networks for Large-Scale Image Recognition', paper_ids='arXiv:1409.1556'),
    **_vgg_cfgs(
        (
            *(f'{name}.robustnorm_cifar10' for name in _ROBUSTNORM_ARCHS),
            'robustnorm_vgg11_cifar.robustnorm_fashion_mnist',
        ),
        **ROBUSTNORM_CFG),
})


@register_model
def vgg11_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11 for 32x32 with BatchNorm, the counterpart of `robustnorm_vgg11_cifar`."""
    return _create_cifar_vgg('vgg11_cifar', pretrained, **kwargs)


@register_model
def robustnorm_vgg11_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11 for 32x32 with RobustNorm."""
    return _create_cifar_vgg('robustnorm_vgg11_cifar', pretrained, **kwargs)


@register_model
def robustnorm_vgg16_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16 for 32x32 with RobustNorm."""
    return _create_cifar_vgg('robustnorm_vgg16_cifar', pretrained, **kwargs)
