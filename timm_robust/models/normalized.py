"""A wrapper that makes a timm model take pixels in [0, 1]."""
from typing import Any, Sequence, Union

import torch
import torch.nn as nn

from ..errors import InputError

__all__ = ['NormalizedModel']


def holds_normalized(model: Any) -> bool:
    """Whether a network is or contains a `NormalizedModel`."""
    return isinstance(model, nn.Module) and any(isinstance(m, NormalizedModel) for m in model.modules())


class NormalizedModel(nn.Module):
    """A timm model with its normalization in front: maps pixels in [0, 1] to logits.

    The state dict has the keys of the model, with the prefix `model.`.

    Args:
        model: A timm model.
        mean: Mean of each channel, by default from the model's `pretrained_cfg`.
        std: Standard deviation of each channel, with the same default.

    Raises:
        InputError: If mean and std are neither given nor in `pretrained_cfg`, are invalid, or the model already
            contains a `NormalizedModel`; in `forward`, on images with another number of channels.

    Examples:

        ```python
        model = NormalizedModel(timm.create_model('resnet50', pretrained=True)).eval()
        adv = PGD(steps=20)(model, pixels, labels, Linf('4/255'))
        ```
    """
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
            self,
            model: nn.Module,
            mean: Union[float, Sequence[float], None] = None,
            std: Union[float, Sequence[float], None] = None,
    ):
        super().__init__()
        self.model = model
        if holds_normalized(model):
            raise InputError('is already a NormalizedModel', 'pass the network inside', argument='model')
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        reference = next(iter(model.parameters()), torch.empty(0))
        for name, value in (('mean', mean), ('std', std)):
            value = cfg.get(name) if value is None else value
            if value is None:
                raise InputError('is missing, and the model has no pretrained_cfg with it', argument=name)
            with torch.inference_mode(False):  # an inference tensor could not take part in autograd
                tensor = torch.tensor(value, dtype=torch.float32, device=reference.device).view(1, -1, 1, 1)
            if not tensor.isfinite().all() or name == 'std' and not (tensor > 0).all():
                raise InputError(f"must be finite{' and positive' * (name == 'std')}", argument=name, value=value)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mean.shape[1] not in (1, x.shape[1]):
            raise InputError(
                f'have {x.shape[1]} channels, mean and std have {self.mean.shape[1]}', 'pass images (N, C, H, W), or '
                'mean and std for these channels', argument='images')
        return self.model((x - self.mean) / self.std)
