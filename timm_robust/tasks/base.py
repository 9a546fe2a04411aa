"""Base classes of training tasks with two forward passes."""
import logging
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, TrainingTask
from timm.utils import unwrap_model

from ..attacks import InputSpace, ThreatModel, check_batch, check_classes, check_tensor, hard_labels
from ..errors import InputError
from ..layers import has_batch_statistics
from .attack import TrainingAttack
from .awp import AWP, perturbed
from .teacher import Teacher

__all__ = ['RobustTask', 'TwoPassTask', 'crafting_model', 'top1']

_logger = logging.getLogger(__name__)


def top1(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Accuracy in percent, detached."""
    return 100. * (output.detach().argmax(dim=1) == hard_labels(target)).float().mean()


def crafting_model(task: TrainingTask, ema: bool = False) -> nn.Module:
    """The network a task crafts images on: without distributed wrappers, and compiled if the task is."""
    compiled = getattr(task, 'eval_model_ema' if ema else 'eval_model', None)
    return unwrap_model(task.get_trainable_module(ema=ema)) if compiled is None else compiled


class TwoPassTask(ClassificationTask):
    """A task that may run two forward passes before a backward pass.

    Attributes:
        state_names: Attributes saved in checkpoints, so that a resumed run matches an uninterrupted one.
    """
    state_names: Tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mixes_batch = has_batch_statistics(self.bare_model, training=True)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'TwoPassTask':
        """Wrap the network in DistributedDataParallel, without broadcasting buffers.

        Two forward passes precede each backward pass, and a broadcast before the second would overwrite buffers that
        the first saved for the backward pass. Instead, timm's `distribute_bn` averages running statistics once per
        epoch.
        """
        if ddp_kwargs.get('broadcast_buffers') and self.mixes_batch:
            _logger.info('Buffers are averaged once per epoch (dist_bn) instead of being broadcast in every step.')
        super().prepare_distributed(device_ids, **{**ddp_kwargs, 'broadcast_buffers': False})
        return self

    def refuse_checkpointing(self) -> None:
        """Reject gradient checkpointing, which recomputes a pass after its weights or normalization have changed."""
        if any(getattr(m, 'grad_checkpointing', False) is True for m in self.bare_model.modules()):
            raise InputError(
                f'{type(self).__name__}: gradient checkpointing would recompute a pass with the weights or '
                'normalization of another pass', 'call model.set_grad_checkpointing(False)')

    @property
    def bare_model(self) -> nn.Module:
        """The network without its wrappers."""
        return unwrap_model(self.trainable_module)

    def checked_target(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The target of a batch: class indices (N,) as int64, or soft targets (N, K).

        Raises:
            InputError: If `input` is empty or not a batch of images, or `target` does not fit `input` or the network.
        """
        check_tensor(input, 'input')
        if not len(input):
            raise InputError('contains no image', argument='input')
        checked = check_batch(input, target, look=False)
        known = getattr(self.bare_model, 'num_classes', None)
        if isinstance(known, int) and known:
            check_classes(checked, max(known, 2))  # a single output stands for two classes
        return checked.labels if checked.soft is None else checked.soft

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
        """Restore the attributes of `state_names`; those missing from the checkpoint keep their values."""
        if state and not ema:
            for name in self.state_names:
                setattr(self, name, state.get(name, getattr(self, name)))


class RobustTask(TwoPassTask):
    """A task that crafts adversarial images in each step; a subclass defines the `loss` on them.

    Crafting leaves the network unchanged, and its noise depends on (seed, step, process), not on torch's global
    generator. Images are crafted without the distributed wrapper, on the compiled network if there is one.

    Args:
        model: The network to train, which takes images in `space`.
        criterion: As in timm's `ClassificationTask`.
        attack: Threat model and attack; by default ten steps of PGD within Linf 8/255.
        awp: Adversarial weight perturbation; none by default.
        teacher: Its targets replace the labels in the loss, but not in logged accuracies; none by default.
        space: Input space of the network (mean and std of the loader); by default from the model's `pretrained_cfg`.
        steps_per_epoch: Batches in an epoch, the unit of warm-up and schedules.
        seed: Seed of the attack's noise.
        **kwargs: Further arguments of `ClassificationTask`.

    Raises:
        InputError: If the objective cannot use the attack; in `forward`, if the first images are not in `space`, or
            AWP is used with gradient checkpointing.
    """
    state_names: Tuple[str, ...] = ('step',)  # determines warm-up, noise and schedules

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            attack: Optional[TrainingAttack] = None,
            awp: Optional[AWP] = None,
            teacher: Optional[Teacher] = None,
            space: Optional[InputSpace] = None,
            steps_per_epoch: int = 1,
            seed: int = 0,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        self.attack = attack or TrainingAttack()
        if not isinstance(self.attack, TrainingAttack):
            raise InputError(f'is {attack!r}', "pass a `TrainingAttack`, such as TrainingAttack('pgd', steps=10)",
                             argument='attack')
        self.check_attack(self.attack)
        self.awp = awp or AWP()
        self.teacher = teacher
        self.smoothing = 0.
        if teacher:  # label smoothing is for labels; the criterion gets soft targets
            self.smoothing = getattr(self.criterion, 'smoothing', 0.)
            if isinstance(self.criterion, LabelSmoothingCrossEntropy):
                self.criterion = SoftTargetCrossEntropy()
        self._labels: Optional[torch.Tensor] = None
        self.space = space or InputSpace.of(model)
        self.steps_per_epoch = steps_per_epoch
        self.eps_warmup_steps = round(self.attack.eps_warmup_epochs * steps_per_epoch)
        self.awp_start_step = round(self.awp.start_epoch * steps_per_epoch)
        self.seed = seed
        self.step = 0
        self._looked = False

    @classmethod
    def check_attack(cls, attack: TrainingAttack) -> None:
        """Reject an attack that the objective cannot use.

        Raises:
            InputError: On an unsuitable setting; the argument is `attack.FIELD`.
        """

    def _check_space(self, input: torch.Tensor) -> None:
        """Reject images in another input space, where eps would mean another size. Checks only the first batch."""
        self._looked = True
        input = input.detach().float()
        low, high = torch.stack(torch.aminmax(input)).tolist()
        if not self.space.is_pixels and 0 <= low < high - .5 and high <= 1:
            raise InputError('are pixels in [0, 1], but the network expects them normalized', 'normalize them, or pass '
                             '`space=InputSpace()` for a network that takes pixels', argument='input')
        pixels = self.space.to_pixels(input)
        outside = (~((pixels > -.01) & (pixels < 1.01))).float().mean().item()  # NaN too
        # random erasing puts values outside the valid range, but not this many
        if outside > .3:
            said, fix = 'as pixels, without the normalization of the network', 'normalize images in [0, 1]'
            if self.space.is_pixels:
                said, fix = 'but `space` says that they are pixels', 'pass `space=InputSpace(mean, std)`'
            raise InputError(f'have {outside:.0%} of values outside [0, 1], {said}', fix, argument='input')

    def current_threat(self) -> ThreatModel:
        """The threat model of this step; eps is smaller during warm-up."""
        if self.step >= self.eps_warmup_steps:
            return self.attack.threat
        return self.attack.threat.scaled((self.step + 1) / (self.eps_warmup_steps + 1))

    def step_seed(self) -> int:
        """Seed of the random numbers of this step in this process."""
        process, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # a fixed mixing keeps the streams of neighbouring seeds, steps and processes apart
        return (self.seed * 0x9E3779B1 + self.step * processes + process) % (1 << 62)

    def run_attack(self, input: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Adversarial images of this step, in the network's input space; keywords of `TrainingAttack.craft`."""
        return self.attack.craft(
            crafting_model(self), input, target, self.current_threat(), space=self.space, seed=self.step_seed(),
            **kwargs)

    def craft(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adversarial images for a batch, in the network's input space."""
        return self.run_attack(input, target)

    def loss(self, input: torch.Tensor, adv: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The objective for a batch and the adversarial images crafted from it.

        Args:
            input: Clean images in `space`, shape (N, C, H, W).
            adv: Adversarial images, likewise.
            target: Class indices (N,) or soft targets (N, K).

        Returns:
            'loss'; 'output', logits (N, K), not detached; and scalars to log, detached.
        """
        raise NotImplementedError

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Craft images, then compute the loss, at perturbed weights once AWP has started.

        Args:
            input: Clean images in `space`, shape (N, C, H, W).
            target: Class indices (N,) or soft targets (N, K).

        Returns:
            What `loss` returns.
        """
        target = self.checked_target(input, target)
        if not self._looked:
            self._check_space(input)
        if self.teacher:
            self._labels = target
            target = self.teacher.targets(self.space.to_pixels(input), target, self.smoothing)
        adv = self.craft(input, target)
        if self.awp.gamma and self.step >= self.awp_start_step:
            self.refuse_checkpointing()
            result = perturbed(self.trainable_module, self.loss, (input, adv, target), self.awp.gamma, self.no_sync)
        else:
            result = self.loss(input, adv, target)
        self._labels = None
        self.step += 1
        return result

    def top1(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Accuracy in percent, detached; with a teacher, on the labels that its targets replaced."""
        return top1(output, target if self._labels is None else self._labels[:len(output)])

    def forward_together(self, *batches: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Logits of several batches of equal size, in one pass unless a layer uses batch statistics."""
        if self.mixes_batch:
            return tuple(self.trainable_module(batch) for batch in batches)
        return self.trainable_module(torch.cat(batches)).chunk(len(batches))

    def forward_both(self, input: torch.Tensor, adv: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Clean and adversarial logits."""
        output, adv_output = self.forward_together(input, adv)
        return output, adv_output
