"""Normalizer-free ResNets for adversarial training without BatchNorm.

Papers:
* `Removing Batch Normalization Boosts Adversarial Training` (NoFrost) - https://arxiv.org/abs/2207.01156
* `Characterizing signal propagation to close the performance gap in unnormalized ResNets` -
    https://arxiv.org/abs/2101.08692

The ImageNet networks are timm's NF-ResNets: state dicts of `nofrost_resnet50` and `nf_resnet50` are interchangeable.
The small networks use the same blocks behind a stem of stride 1 (`nofrost_resnet11_mnist`, `nofrost_nfnet18_cifar`: 2).
"""
from typing import Any, Dict, Tuple

import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.nfnet import NfCfg, NormFreeNet, model_cfgs

from ._build import HUB_ORG, build_robust_model, cifar_cfg, classes_of, imagenet_cfg

__all__ = ['CifarNormFreeNet']

_STEM_REDUCTION = 4  # downsampling by timm's '3x3_pool' stem, which CifarNormFreeNet undoes


class CifarNormFreeNet(NormFreeNet):
    """timm's normalizer-free network for small images, with a stem of stride 1 or 2 without pooling.

    Args:
        cfg: Architecture of the network; its `stem_type` must be '3x3_pool'.
        output_stride: Output stride as in timm, but not counting the stem.
        stem_stride: Stride of the stem, 1 or 2.
        **kwargs: Arguments of timm's `NormFreeNet`.

    Raises:
        ValueError: If `stem_stride` is not 1 or 2.
    """

    def __init__(self, cfg: NfCfg, output_stride: int = 32, stem_stride: int = 1, **kwargs: Any):
        if stem_stride not in (1, 2):
            raise ValueError(f'stem_stride={stem_stride}: must be 1 or 2')
        super().__init__(cfg, output_stride=output_stride * _STEM_REDUCTION, **kwargs)
        conv = self.stem.conv
        assert isinstance(conv, nn.Conv2d)
        conv.stride = (stem_stride, stem_stride)
        del self.stem.pool
        self.feature_info[0]['reduction'] = stem_stride
        for info in self.feature_info[1:]:
            info['reduction'] = info['reduction'] * stem_stride // _STEM_REDUCTION


def _cifar_nfres_cfg(depths: Tuple[int, ...], channels: Tuple[int, ...], **kwargs: Any) -> NfCfg:
    return NfCfg(
        depths, channels,  # type: ignore[arg-type]  # timm's networks work with any number of stages
        stem_type='3x3_pool', **{'bottle_ratio': 0.25, 'act_layer': 'relu', **kwargs})


_cifar_model_cfgs = dict(
    nofrost_resnet20_cifar=_cifar_nfres_cfg((2, 2, 2), (64, 128, 256), stem_chs=16),
    nofrost_resnet11_mnist=_cifar_nfres_cfg((1, 1, 1), (32, 64, 128), stem_chs=16, bottle_ratio=0.5),
    nofrost_resnet26_cifar=_cifar_nfres_cfg((2, 2, 2, 2), (256, 512, 1024, 2048), stem_chs=64),
    nofrost_nfnet18_cifar=_cifar_nfres_cfg(
        (1, 2, 1), (128, 256, 512), stem_chs=64, bottle_ratio=0.5, extra_conv=True, act_layer='silu'),
)


def _create_nofrost(variant: str, pretrained: bool = False, **kwargs: Any) -> NormFreeNet:
    nf_variant = variant.replace('nofrost', 'nf')
    return build_robust_model(
        NormFreeNet,
        variant,
        pretrained,
        model_cfg=model_cfgs[nf_variant],
        feature_cfg=dict(flatten_sequential=True),
        authors_checkpoint=(
            f"`timm-robust fetch {variant}` downloads the authors' checkpoint, a {nf_variant} state dict that loads "
            f"directly: timm.create_model('{variant}', checkpoint_path=PATH)"),
        **kwargs,
    )


def _create_nofrost_cifar(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarNormFreeNet:
    model_cfg = _cifar_model_cfgs[variant]
    return build_robust_model(
        CifarNormFreeNet,
        variant,
        pretrained,
        model_cfg=model_cfg,
        feature_cfg=dict(
            flatten_sequential=True,
            out_indices=tuple(range(len(kwargs.get('depths', model_cfg.depths)) + 1)),
        ),
        authors_checkpoint='the authors published no checkpoint of this size',
        **kwargs,
    )


_nofrost = dict(
    first_conv='stem.conv', classifier='head.fc',
    paper_name='Removing Batch Normalization Boosts Adversarial Training', paper_ids='arXiv:2207.01156',
    origin_url='https://github.com/amazon-science/normalizer-free-robust-training',
)


def _cfg(name: str, crop_pct: float = 0.9, **kwargs: Any) -> Dict[str, Any]:
    return imagenet_cfg(**_nofrost, hf_hub_id=f'{HUB_ORG}/{name}', crop_pct=crop_pct, **kwargs)


def _ccfg_base(**kwargs: Any) -> Dict[str, Any]:
    return cifar_cfg(**_nofrost, **kwargs)


def _ccfg(name: str, **kwargs: Any) -> Dict[str, Any]:
    return _ccfg_base(hf_hub_id=f'{HUB_ORG}/{name}', label_names=classes_of(name), **kwargs)


default_cfgs = generate_default_cfgs({
    'nofrost_resnet26.nofrost_linf8_in1k': _cfg('nofrost_resnet26.nofrost_linf8_in1k'),
    **{name: _cfg(
        name, num_classes=10, input_size=(3, 128, 128), pool_size=(4, 4), crop_pct=1.0, label_names=classes_of(name))
        for name in ('nofrost_resnet26.nofrost_linf4_imagenette', 'nofrost_resnet26.madry_linf4_imagenette')},
    'nofrost_resnet50.nofrost_linf8_in1k': _cfg('nofrost_resnet50.nofrost_linf8_in1k'),
    'nofrost_resnet50.nofrost_star_linf8_in1k': _cfg('nofrost_resnet50.nofrost_star_linf8_in1k'),
    'nofrost_resnet101.nofrost_linf8_in1k': _cfg('nofrost_resnet101.nofrost_linf8_in1k'),
    'nofrost_resnet11_mnist': _ccfg_base(
        input_size=(1, 28, 28), pool_size=(4, 4), mean=(0.1307,), std=(0.3081,)),
    'nofrost_resnet20_cifar.madry_linf8_cifar10': _ccfg('nofrost_resnet20_cifar.madry_linf8_cifar10'),
    'nofrost_resnet20_cifar.nofrost_linf8_cifar10': _ccfg('nofrost_resnet20_cifar.nofrost_linf8_cifar10'),
    'nofrost_resnet26_cifar.nofrost_linf8_cifar10': _ccfg(
        'nofrost_resnet26_cifar.nofrost_linf8_cifar10', pool_size=(4, 4)),
    'nofrost_nfnet18_cifar.madry_linf8_cifar10': _ccfg('nofrost_nfnet18_cifar.madry_linf8_cifar10', pool_size=(4, 4)),
    'nofrost_nfnet18_cifar.nofrost_linf8_cifar10': _ccfg(
        'nofrost_nfnet18_cifar.nofrost_linf8_cifar10', pool_size=(4, 4)),
})


@register_model
def nofrost_resnet26(pretrained: bool = False, **kwargs: Any) -> NormFreeNet:
    """Normalizer-free ResNet-26, timm's `nf_resnet26`, for NoFrost training."""
    return _create_nofrost('nofrost_resnet26', pretrained, **kwargs)


@register_model
def nofrost_resnet50(pretrained: bool = False, **kwargs: Any) -> NormFreeNet:
    """Normalizer-free ResNet-50, timm's `nf_resnet50`, for NoFrost training."""
    return _create_nofrost('nofrost_resnet50', pretrained, **kwargs)


@register_model
def nofrost_resnet101(pretrained: bool = False, **kwargs: Any) -> NormFreeNet:
    """Normalizer-free ResNet-101, timm's `nf_resnet101`, for NoFrost training."""
    return _create_nofrost('nofrost_resnet101', pretrained, **kwargs)


@register_model
def nofrost_resnet11_mnist(pretrained: bool = False, **kwargs: Any) -> CifarNormFreeNet:
    """Normalizer-free ResNet-11 for 28x28 grey images: three bottlenecks behind a stem of stride 2."""
    return _create_nofrost_cifar('nofrost_resnet11_mnist', pretrained, **dict(dict(stem_stride=2), **kwargs))


@register_model
def nofrost_resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNormFreeNet:
    """Normalizer-free ResNet-20 for 32x32: three stages of two bottlenecks with inner widths 16, 32 and 64."""
    return _create_nofrost_cifar('nofrost_resnet20_cifar', pretrained, **kwargs)


@register_model
def nofrost_resnet26_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNormFreeNet:
    """Normalizer-free ResNet-26 for 32x32: `nofrost_resnet26` behind a stem of stride 1."""
    return _create_nofrost_cifar('nofrost_resnet26_cifar', pretrained, **kwargs)


@register_model
def nofrost_nfnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNormFreeNet:
    """Normalizer-free network for adversarial training at 32x32 on a CPU: four NFNet blocks of four convolutions, SiLU.

    The stem has stride 2, feature maps are 16x16, 8x8 and 4x4, and the blocks have inner widths 64, 128 and 256. This
    suits a CPU, which multiplies matrices faster than it moves the large feature maps of `nofrost_resnet20_cifar`.
    """
    return _create_nofrost_cifar('nofrost_nfnet18_cifar', pretrained, **dict(dict(stem_stride=2), **kwargs))
