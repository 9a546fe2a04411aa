from . import robustnorm_resnet, robustnorm_vgg  # noqa: F401  their entry points
from ._build import weights_store
from .cifar_resnet import CifarResNet
from .cifar_vgg import CifarVGG
from .nofrost import CifarNormFreeNet
from .normalized import NormalizedModel

__all__ = ['CifarNormFreeNet', 'CifarResNet', 'CifarVGG', 'NormalizedModel', 'weights_store']
