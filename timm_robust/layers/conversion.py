"""Replace layers by layers of another class that share their tensors, as torch's convert_sync_batchnorm does."""
import copy
from typing import Dict, Type, TypeVar

import torch.nn as nn

__all__ = ['recast', 'replace_modules']

_Module = TypeVar('_Module', bound=nn.Module)


def recast(module: nn.Module, new_class: Type[_Module]) -> _Module:
    """A new layer of another class, with the tensors, children, hooks and settings of a module.

    Args:
        module: Unchanged; both layers share their tensors.
        new_class: Its `__init__` is not called.
    """
    new = new_class.__new__(new_class)
    new.__dict__.update(module.__dict__)
    for name in ('_parameters', '_buffers', '_modules'):
        new.__dict__[name] = copy.copy(module.__dict__[name])
    return new


def replace_modules(model: nn.Module, replacements: Dict[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever they occur in a model.

    Args:
        model: Changed in place, unless it is itself replaced.
        replacements: Maps old modules to new ones.

    Returns:
        The model, or its replacement.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)
