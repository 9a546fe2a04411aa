"""Training on clean and adversarial images: SAT, NoFrost and Madry's adversarial training.

Papers:
* `Removing Batch Normalization Boosts Adversarial Training` (NoFrost), eq. 1 - https://arxiv.org/abs/2207.01156
* `Explaining and Harnessing Adversarial Examples` - https://arxiv.org/abs/1412.6572
* `Towards Deep Learning Models Resistant to Adversarial Attacks` - https://arxiv.org/abs/1706.06083
"""
import logging
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from ..attacks import InputSpace, ThreatModel, hard_labels
from ..errors import InputError
from ..layers import has_batch_statistics

__all__ = ['AdversarialTask']

_logger = logging.getLogger(__name__)


def _top1(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 100. * (output.detach().argmax(dim=1) == hard_labels(target)).float().mean()


class AdversarialTask(ClassificationTask):
    r"""(1 - λ) L(x) + λ L(x*) on clean images x and adversarial images x* crafted from them.

    NoFrost's eq. 1 with its λ = 0.5: called NoFrost on a normalizer-free network and SAT on one with BatchNorm. With
    λ = 1, Madry's adversarial training, the clean pass is left out. L is any timm criterion; smoothing and soft
    targets act on both terms.

    Crafting leaves no trace on the network, and its noise comes from (seed, step, process) rather than from torch's
    global generator. Images are crafted on the bare network, outside of distributed and compiled wrappers.

    Args:
        model: The network to train, which takes images in `space`.
        criterion: As in timm's `ClassificationTask`.
        attack: Maps (model, x, y, threat) and the keywords `space` and `seed` to adversarial images.
        threat: Norm and eps, in pixel units on [0, 1].
        space: Input space of the network: mean and std of the loader.
        adv_weight: λ, the weight of the adversarial loss, in [0, 1].
        eps_warmup_steps: Number of calls over which eps rises linearly to its full size.
        seed: Seed of the attack's noise.
        **kwargs: Further arguments of `ClassificationTask`.

    Raises:
        InputError: If `adv_weight` is outside [0, 1].
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            attack: Callable[..., torch.Tensor],
            threat: ThreatModel,
            space: InputSpace,
            adv_weight: float = 0.5,
            eps_warmup_steps: int = 0,
            seed: int = 0,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        if not 0 <= adv_weight <= 1:
            raise InputError(f'adv_weight={adv_weight} must be in [0, 1]; 0.5 is NoFrost, 1 is Madry')
        self.attack = attack
        self.threat = threat
        self.space = space
        self.adv_weight = adv_weight
        self.eps_warmup_steps = eps_warmup_steps
        self.seed = seed
        self.step = 0
        self.mixes_batch = has_batch_statistics(model, training=True)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'AdversarialTask':
        """Wrap the network in DistributedDataParallel, without broadcasting buffers.

        Two forward passes precede each backward pass, and a broadcast before the second would overwrite buffers the
        first one saved. Running statistics are averaged once an epoch by timm's `distribute_bn` instead.
        """
        if ddp_kwargs.get('broadcast_buffers') and self.mixes_batch:
            _logger.info('Buffers are averaged once an epoch (dist_bn) and not broadcast in every step.')
        return super().prepare_distributed(device_ids, **{**ddp_kwargs, 'broadcast_buffers': False})

    def current_threat(self) -> ThreatModel:
        """The threat model of this step, with eps on its way up during warm-up."""
        if self.step >= self.eps_warmup_steps:
            return self.threat
        return self.threat.scaled((self.step + 1) / (self.eps_warmup_steps + 1))

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adversarial images for a batch, in the network's input space."""
        process, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # a fixed mixing keeps the streams of neighbouring seeds, steps and processes apart
        seed = (self.seed * 0x9E3779B1 + self.step * processes + process) % (1 << 62)
        return self.attack(
            unwrap_model(self.trainable_module), input, target, self.current_threat(), space=self.space, seed=seed)

    def _forward_pair(
            self,
            input: torch.Tensor,
            adv: Optional[torch.Tensor],
    ) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Clean and adversarial logits; in one pass where no layer mixes the images of a batch."""
        if adv is None:
            return self.trainable_module(input), None
        if self.adv_weight == 1:
            return None, self.trainable_module(adv)
        if self.mixes_batch:
            return self.trainable_module(input), self.trainable_module(adv)
        return self.trainable_module(torch.cat([input, adv])).chunk(2)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Craft, then compute the weighted loss.

        Args:
            input: Clean images in `space`, shape (N, C, H, W).
            target: Class indices (N,) or soft targets (N, K).

        Returns:
            'loss'; 'output', the clean logits (adversarial ones if λ = 1); 'adv_loss' and 'adv_top1' (percent) unless
            λ = 0, 'clean_loss' and 'clean_top1' unless λ = 1, detached.
        """
        result = {}
        terms = []
        output, adv_output = self._forward_pair(input, self.craft(input, target) if self.adv_weight > 0 else None)
        if output is not None:
            clean_loss = self.criterion(output, target)
            terms.append((1 - self.adv_weight) * clean_loss)
            result.update(output=output, clean_loss=clean_loss.detach(), clean_top1=_top1(output, target))
        if adv_output is not None:
            adv_loss = self.criterion(adv_output, target)
            terms.append(self.adv_weight * adv_loss)
            result.setdefault('output', adv_output)
            result.update(adv_loss=adv_loss.detach(), adv_top1=_top1(adv_output, target))
        self.step += 1
        return dict(result, loss=sum(terms))

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """The step counter, from which warm-up and noise follow."""
        return {} if ema else {'step': self.step}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Restore the step counter."""
        if state and not ema:
            self.step = int(state['step'])
