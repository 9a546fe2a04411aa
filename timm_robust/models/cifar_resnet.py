"""The RobustNorm paper's small ResNets for 32x32 images, with RobustNorm or BatchNorm.

Papers:
* `Towards an Adversarially Robust Normalization Approach` - https://arxiv.org/abs/2006.11007
* `Deep Residual Learning for Image Recognition`, section 4.2 - https://arxiv.org/abs/1512.03385
"""
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from .._compat import feature_take_indices
from ._build import build_normed_model, small_cfgs
from .robustnorm_resnet import ROBUSTNORM_CFG

__all__ = ['CifarResNet']

_NUM_FEATURES = 4  # the stem and three stages
_STEM_REDUCTION = 4  # downsampling by the stem of an ImageNet ResNet


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 stem without pooling, and three stages.

    The fourth stage is an empty module, so that every method of timm's ResNet still works.

    Args:
        block: Residual block class.
        layers: Number of blocks of each of the three stages.
        in_chans: Number of input channels.
        channels: Channels of each of the three stages, before the expansion of the block.
        stem_chs: Channels of the stem, an even number; by default as many as in the first stage.
        stem_stride: Stride of the stem, 1 or 2.
        **kwargs: Arguments of timm's `ResNet`.

    Raises:
        ValueError: If `stem_chs` is odd, or `stem_stride` is not 1 or 2.
    """

    def __init__(
            self,
            block: Type[Union[BasicBlock, Bottleneck]],
            layers: Tuple[int, ...],
            in_chans: int = 3,
            channels: Tuple[int, ...] = (16, 32, 64),
            stem_chs: Optional[int] = None,
            stem_stride: int = 1,
            device: Union[torch.device, str, None] = None,
            dtype: Optional[torch.dtype] = None,
            **kwargs: Any,
    ):
        stem_chs = stem_chs or channels[0]
        if stem_chs % 2:
            raise ValueError(f'stem_chs={stem_chs}: must be even')
        if stem_stride not in (1, 2):
            raise ValueError(f'stem_stride={stem_stride}: must be 1 or 2')
        # In timm only a 'deep' stem may have other than 64 channels; its convolutions are replaced below.
        super().__init__(
            block,  # type: ignore[arg-type]  # a class, but timm annotates an instance
            layers,
            in_chans=in_chans,
            channels=channels,
            stem_type='deep',
            stem_width=stem_chs // 2,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        conv = nn.Conv2d(in_chans, stem_chs, 3, stride=stem_stride, padding=1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        # annotated for timm's own stem
        self.conv1, self.maxpool = conv, nn.Identity()  # type: ignore[assignment]
        self.layer4 = nn.Sequential()
        feature_info: List[Dict[str, Any]] = self.feature_info
        feature_info[0]['reduction'] = stem_stride
        for info in feature_info[1:]:
            info['reduction'] = info['reduction'] * stem_stride // _STEM_REDUCTION

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            *args: Any,
            **kwargs: Any,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """See timm's `ResNet.forward_intermediates`; index 0 is the stem, 1 to 3 are the stages."""
        take_indices, _ = feature_take_indices(_NUM_FEATURES, indices)
        return super().forward_intermediates(x, take_indices, *args, **kwargs)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """See timm's `ResNet.prune_intermediate_layers`."""
        take_indices, max_index = feature_take_indices(_NUM_FEATURES, indices)
        if prune_head or max_index < _NUM_FEATURES - 1:
            super().prune_intermediate_layers(take_indices, prune_norm, prune_head)
        return take_indices


def _cifar_layers(depth: int) -> dict:
    # 6n + 2 layers; from depth 44 on, bottlenecks with the n of basic blocks, as in the paper
    return dict(block=Bottleneck if depth >= 44 else BasicBlock, layers=((depth - 2) // 6,) * 3)


_DEPTHS = dict(
    resnet20_cifar=20, robustnorm_resnet20_cifar=20, robustnorm_resnet38_cifar=38, robustnorm_resnet50_cifar=50)


def _create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build_normed_model(
        CifarResNet,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(_NUM_FEATURES))),
        **{**_cifar_layers(_DEPTHS[variant]), **kwargs},
    )


default_cfgs = generate_default_cfgs({
    **small_cfgs(
        ('resnet20_cifar.standard_cifar10', 'resnet20_cifar.apart_cifar10', 'resnet20_cifar.standard_fashion_mnist'),
        paper_name='Deep Residual Learning for Image Recognition', paper_ids='arXiv:1512.03385', first_conv='conv1',
        classifier='fc'),
    **small_cfgs(
        (
            *(f'{name}.robustnorm_cifar10' for name in _DEPTHS if name.startswith('robustnorm')),
            'robustnorm_resnet20_cifar.robustnorm_fashion_mnist',
        ),
        **ROBUSTNORM_CFG, first_conv='conv1', classifier='fc'),
})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for 32x32 with BatchNorm, the counterpart of `robustnorm_resnet20_cifar`."""
    return _create_cifar_resnet('resnet20_cifar', pretrained, **kwargs)


@register_model
def robustnorm_resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for 32x32 with RobustNorm."""
    return _create_cifar_resnet('robustnorm_resnet20_cifar', pretrained, **kwargs)


@register_model
def robustnorm_resnet38_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-38 for 32x32 with RobustNorm."""
    return _create_cifar_resnet('robustnorm_resnet38_cifar', pretrained, **kwargs)


@register_model
def robustnorm_resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 for 32x32 with RobustNorm, as the paper counts layers: three stages of eight bottlenecks."""
    return _create_cifar_resnet('robustnorm_resnet50_cifar', pretrained, **kwargs)
