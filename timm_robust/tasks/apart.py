"""APART: adversarial training on perturbed normalization, without an attack on images.

`Adversarially Perturbed Batch Normalization: A Simple Way to Improve Image Recognition` -
https://openreview.net/forum?id=2EQzEE5seF
"""
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn

from ..errors import InputError, check_at_least, check_range
from ..layers import NormPerturbation
from ..settings import setting
from .base import TwoPassTask, top1
from .mbnat import check_checkpointing
from .objective import Objective, RunSettings, register_objective

__all__ = ['APART', 'ApartTask', 'second_pass_size']


@register_objective
@dataclass(frozen=True, kw_only=True)
class APART(Objective):
    """APART: M/(M+N) L(x; d = 0) + N/(M+N) L(x'; d), with d a perturbation of normalization."""
    name: ClassVar[str] = 'apart'
    crafts: ClassVar[bool] = False

    epsilon: float = setting(.1, "size of apart's perturbation of normalization", metavar='EPS')
    groups: int = setting(1, 'number of groups of images in apart, each with its own perturbation', metavar='N')
    ratio: float = setting(1., 'share of a batch in the second pass of apart, in (0, 1]', metavar='R')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range('epsilon', self.epsilon, 0)
        check_at_least('groups', self.groups)
        check_range('ratio', self.ratio, 0, 1, open_low=True, note='it is the share of a batch in the second pass')

    def task_class(self) -> Type['ApartTask']:
        """`ApartTask`."""
        return ApartTask

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Check that the network has layers to perturb."""
        with self.naming_itself():
            NormPerturbation(model, self.groups)
        return model

    def check_run(self, run: RunSettings) -> None:
        """Require batches divisible by groups, a first-order optimizer and no gradient checkpointing."""
        super().check_run(run)
        check_checkpointing(self, run)
        if 'adahessian' in run.opt.lower():
            raise InputError('needs second derivatives, but apart keeps no graph of its first pass', 'choose another',
                             argument='opt', value=run.opt)
        if run.batch_size % self.groups:
            raise InputError(
                f'does not divide `batch_size={run.batch_size}`', argument='objective.groups', value=self.groups)
        if second_pass_size(run.batch_size, self.ratio, self.groups) < 2 * self.groups:
            raise InputError(
                f'leaves fewer than two images of `batch_size={run.batch_size}` for each of '
                f'`objective.groups={self.groups}`', 'choose larger batches', argument='objective.ratio',
                value=self.ratio)


def _autocast_dtype(device: torch.device) -> Optional[torch.dtype]:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def second_pass_size(count: int, ratio: float, groups: int) -> int:
    """Number of images in the second pass: the largest multiple of `groups` that is at most count · ratio."""
    return int(count * ratio + 1e-9) // groups * groups  # a product such as .29 · 100 is a little below 29


class _AddGradients(torch.autograd.Function):
    """A loss whose gradients are already computed; the backward pass returns them, times the outer gradient."""

    @staticmethod
    def forward(
            ctx: Any,
            loss: torch.Tensor,
            gradients: Sequence[torch.Tensor],
            task: 'ApartTask',
            *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients, ctx.task = gradients, task
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'create_graph=True: second derivatives would be incomplete, since APART keeps no graph of its first '
                'pass; use a first-order optimizer')
        ctx.task.loss_scale = outer.detach()
        return (None, None, None, *(g * outer for g in ctx.gradients))


class ApartTask(TwoPassTask):
    r"""M/(M+N) L(x; d = 0) + N/(M+N) L(x'; d = ε sign ∇_d L), where x is a batch of M images and x' its first N.

    d perturbs every normalization layer, see `NormPerturbation`; only the first pass updates running statistics. The
    first pass is differentiated inside `forward`, and its gradients are added in the training loop's backward pass.

    N is the largest multiple of `groups` that is at most M · `ratio`. M must be a multiple of `groups` (timm's loader
    drops an incomplete last batch).

    Args:
        model: A network with BatchNorm or RobustNorm layers. Gradient checkpointing must be off: it would recompute the
            second pass after d is removed.
        criterion: As in timm's `ClassificationTask`.
        epsilon: ε, not negative; 0.1 in the paper.
        groups: Number of groups of images, each with its own d.
        ratio: N / M, in (0, 1].
        **kwargs: Further arguments of `ClassificationTask`.

    Raises:
        InputError: On bad arguments, or a network without such layers; in `forward`, on gradient checkpointing, a batch
            not divisible by `groups`, or fewer than two images per group in the second pass.
    """
    state_names = ('loss_scale',)

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Callable] = None,
            *,
            epsilon: float = 0.1,
            groups: int = 1,
            ratio: float = 1.,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, **kwargs)
        own = APART(epsilon=epsilon, groups=groups, ratio=ratio)
        own.prepare_model(self.bare_model)
        self.perturbation = NormPerturbation(self.bare_model, own.groups)
        self.epsilon, self.ratio = own.epsilon, own.ratio
        self.loss_scale = 1.  # until the loss scale of the training loop is known

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'ApartTask':
        """See `TwoPassTask`. Rejects `static_graph`, which would not reduce the gradients of the first pass."""
        if ddp_kwargs.get('static_graph'):
            raise InputError('static_graph=True: would leave gradients of APART unreduced; leave it out')
        super().prepare_distributed(device_ids, **ddp_kwargs)
        return self

    def get_task_state(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """The loss scale of the training loop, as a number."""
        return {name: float(value) for name, value in super().get_task_state(*args, **kwargs).items()}

    def _second_size(self, count: int) -> int:
        groups = self.perturbation.groups
        if count % groups:
            raise InputError(f'groups={groups} does not divide a batch of {count} images: choose another batch size')
        second = second_pass_size(count, self.ratio, groups)
        if second < 2 * groups:
            raise InputError(
                f'ratio={self.ratio} of {count} images leaves fewer than two for each of groups={groups} in the second '
                'pass: choose a larger batch or ratio')
        return second

    def _first_pass(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            share: float,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Output, and a loss whose backward pass adds the gradients computed here; updates d."""
        model, perturbation = self.bare_model, self.perturbation
        with perturbation.clean_pass():
            output = model(input)
            loss = share * self.criterion(output, target)
        parameters = [p for p in model.parameters() if p.requires_grad]
        # in half precision, the training loop's loss scale keeps small gradients from underflowing
        half = torch.float16 in (output.dtype, _autocast_dtype(input.device))
        scale = self.loss_scale if half else 1.
        with torch.autocast(input.device.type, enabled=False):
            gradients = torch.autograd.grad(loss * scale, [*parameters, *perturbation.tensors], allow_unused=True)
        torch.clear_autocast_cache()  # cached casts belong to the freed graph
        used = [(p, g / scale if half else g) for p, g in zip(parameters, gradients) if g is not None]
        perturbation.ascend(list(gradients[len(parameters):]), self.epsilon)
        own = [g for _, g in used]
        return output, _AddGradients.apply(loss.detach(), own, self, *(p for p, _ in used))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Run both passes.

        Args:
            input: Images, shape (M, C, H, W).
            target: Class indices (M,) or soft targets (M, K).

        Returns:
            'loss'; 'output', the logits of the first pass; 'clean_loss' and 'clean_top1' (percent) of the first pass,
            'adv_loss' and 'adv_top1' (percent) of the second; all but 'loss' detached.
        """
        self.refuse_checkpointing()
        target = self.checked_target(input, target)
        count, second = len(input), self._second_size(len(input))
        share = count / (count + second)
        output, clean_loss = self._first_pass(input, target, share)
        with self.perturbation.adversarial_pass():
            adv_output = self.trainable_module(input[:second])
            adv_loss = (1 - share) * self.criterion(adv_output, target[:second])
        return {
            'loss': clean_loss + adv_loss,
            'output': output.detach(),
            'clean_loss': clean_loss.detach() / share,
            'adv_loss': adv_loss.detach() / (1 - share),
            'clean_top1': top1(output, target),
            'adv_top1': top1(adv_output, target[:second]),
        }
