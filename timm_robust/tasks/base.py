"""What training tasks that craft images have in common."""
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

__all__ = ['RobustTask', 'TwoPassTask', 'top1']

_logger = logging.getLogger(__name__)


def top1(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Accuracy in percent, detached."""
    return 100. * (output.detach().argmax(dim=1) == hard_labels(target)).float().mean()


class TwoPassTask(ClassificationTask):
    """A task whose network may see two batches before a backward pass.

    Attributes:
        state_names: Attributes that a checkpoint keeps, so that a resumed run goes on as it would have.
    """
    state_names: Tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mixes_batch = has_batch_statistics(self.bare_model, training=True)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'TwoPassTask':
        """Wrap the network in DistributedDataParallel, without broadcasting buffers.

        Two forward passes precede each backward pass, and a broadcast before the second would overwrite buffers the
        first one saved. Running statistics are averaged once an epoch by timm's `distribute_bn` instead.
        """
        if ddp_kwargs.get('broadcast_buffers') and self.mixes_batch:
            _logger.info('Buffers are averaged once an epoch (dist_bn) and not broadcast in every step.')
        return super().prepare_distributed(device_ids, **{**ddp_kwargs, 'broadcast_buffers': False})

    def refuse_checkpointing(self) -> None:
        """Refuse gradient checkpointing, which computes again when the normalization of a pass is gone."""
        if any(getattr(m, 'grad_checkpointing', False) is True for m in self.bare_model.modules()):
            raise InputError(
                f'{type(self).__name__}: gradient checkpointing would compute a pass again with the normalization of '
                'another, call model.set_grad_checkpointing(False)')

    @property
    def bare_model(self) -> nn.Module:
        """The network outside of its wrappers."""
        return unwrap_model(self.trainable_module)

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """The attributes of `state_names`."""
        return {} if ema else {name: getattr(self, name) for name in self.state_names}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Restore them; a checkpoint of another objective may lack some."""
        if state and not ema:
            for name in self.state_names:
                setattr(self, name, state.get(name, getattr(self, name)))


class RobustTask(TwoPassTask):
    """A task that crafts adversarial images in each step.

    Crafting leaves no trace on the network, and its noise comes from (seed, step, process) rather than from torch's
    global generator. Images are crafted on the bare network, outside of distributed and compiled wrappers.

    Args:
        model: The network to train, which takes images in `space`.
        criterion: As in timm's `ClassificationTask`.
        attack: Maps (model, x, y, threat) and the keywords `space` and `seed` to adversarial images.
        threat: Norm and eps, in pixel units on [0, 1].
        space: Input space of the network: mean and std of the loader.
        eps_warmup_steps: Number of calls over which eps rises linearly to its full size.
        seed: Seed of the attack's noise.
        **kwargs: Further arguments of `ClassificationTask`.
    """
    state_names = ('step',)  # from which warm-up, noise and schedules follow

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            attack: Callable[..., torch.Tensor],
            threat: ThreatModel,
            space: InputSpace,
            eps_warmup_steps: int = 0,
            seed: int = 0,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        self.attack = attack
        self.threat = threat
        self.space = space
        self.eps_warmup_steps = eps_warmup_steps
        self.seed = seed
        self.step = 0

    def current_threat(self) -> ThreatModel:
        """The threat model of this step, with eps on its way up during warm-up."""
        if self.step >= self.eps_warmup_steps:
            return self.threat
        return self.threat.scaled((self.step + 1) / (self.eps_warmup_steps + 1))

    def step_seed(self) -> int:
        """Seed of what is random in this step of this process."""
        process, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # a fixed mixing keeps the streams of neighbouring seeds, steps and processes apart
        return (self.seed * 0x9E3779B1 + self.step * processes + process) % (1 << 62)

    def run_attack(self, input: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Adversarial images of this step, in the network's input space."""
        return self.attack(
            self.bare_model, input, target, self.current_threat(), space=self.space, seed=self.step_seed(), **kwargs)

    def forward_together(self, *batches: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Logits of several batches of one size; in one pass where no layer mixes the images of a batch."""
        if self.mixes_batch:
            return tuple(self.trainable_module(batch) for batch in batches)
        return self.trainable_module(torch.cat(batches)).chunk(len(batches))

    def forward_both(self, input: torch.Tensor, adv: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Clean and adversarial logits."""
        return self.forward_together(input, adv)
