"""A network that takes pixels in [0, 1]."""
from typing import Optional, Sequence

import torch
import torch.nn as nn

from ..errors import InputError

__all__ = ['NormalizedModel']


class NormalizedModel(nn.Module):
    """A timm model behind its own normalization: pixels in [0, 1] go in, logits come out.

    Adds nothing to the state dict but the prefix `model.`.

    Args:
        model: A timm model.
        mean: Mean of each channel, by default that of the model's `pretrained_cfg`.
        std: Standard deviation of each channel, likewise.

    Raises:
        InputError: In `forward`, on images of another number of channels.

    Examples:

        ```python
        model = NormalizedModel(timm.create_model('resnet50', pretrained=True)).eval()
        adv = PGD(steps=20)(model, pixels, labels, Linf('4/255'))
        ```
    """

    def __init__(
            self,
            model: nn.Module,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
    ):
        super().__init__()
        self.model = model
        cfg = getattr(model, 'pretrained_cfg', {})
        reference = next(iter(model.parameters()), torch.empty(0))
        for name, value in (('mean', mean or cfg['mean']), ('std', std or cfg['std'])):
            tensor = torch.tensor(value, dtype=torch.float32, device=reference.device).view(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mean.shape[1] not in (1, x.shape[1]):
            raise InputError(
                f'x has {x.shape[1]} channels and mean {self.mean.shape[1]}: pass mean and std for its channels')
        return self.model((x - self.mean) / self.std)
