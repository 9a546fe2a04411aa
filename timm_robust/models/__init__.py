from . import cifar_resnet, cifar_vgg, nofrost, robustnorm_resnet, robustnorm_vgg
from .cifar_resnet import CifarResNet
from .cifar_vgg import CifarVGG
from .nofrost import CifarNormFreeNet
from .normalized import NormalizedModel

__all__ = ['CifarNormFreeNet', 'CifarResNet', 'CifarVGG', 'NormalizedModel', 'ROBUST_MODEL_MODULES']

ROBUST_MODEL_MODULES = (nofrost, robustnorm_resnet, robustnorm_vgg, cifar_resnet, cifar_vgg)
