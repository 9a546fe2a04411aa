"""Gradient attacks with one or more steps: FGSM, PGD and their variants."""
from functools import partial
from typing import Callable, Dict, Optional, Tuple

import torch

from ..errors import InputError, check_at_least, check_range
from ..settings import setting
from .ball import PIXELS, Ball, InputSpace
from .gradient import GradientAttack, IterativeAttack
from .losses import cw_loss
from .registry import register_attack
from .threat import ThreatModel
from .views import diverse, smoothed, view_gradient

__all__ = ['BIM', 'CWLinf', 'FGSM', 'FGSMRS', 'MIM', 'NFGSM', 'PGD', 'PGDTargeted']


@register_attack
class FGSM(GradientAttack):
    """Fast gradient sign method: one step of length eps from the clean image.

    Goodfellow et al. 2015, `Explaining and Harnessing Adversarial Examples` - https://arxiv.org/abs/1412.6572
    """
    name = 'fgsm'


@register_attack
class FGSMRS(GradientAttack):
    """FGSM from a random start: one step of 1.25 eps by default.

    Wong et al. 2020, `Fast is better than free` - https://arxiv.org/abs/2001.03994
    """
    name = 'fgsm-rs'
    step_size: Optional[float] = setting(None, 'step size in pixel units (default: 1.25 eps)')

    @property
    def starts_at_random(self) -> bool:
        return True

    def step_length(self, threat: ThreatModel) -> float:
        return self.step_size or 1.25 * threat.eps


@register_attack
class NFGSM(GradientAttack):
    """N-FGSM: one step of length eps from strong noise, not projected onto eps: images are within (`noise` + 1) eps.

    For training only. de Jorge et al. 2022, `Make Some Noise: Reliable and Efficient Single-Step Adversarial Training`
    - https://arxiv.org/abs/2202.01181
    """
    name = 'n-fgsm'
    image_by_image = False
    transfers = False
    noise: float = setting(2., 'magnitude of the noise in units of eps')
    step_size: Optional[float] = setting(None, 'step size in pixel units (default: eps)')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range('noise', self.noise, 0., open_low=True)

    def step_length(self, threat: ThreatModel) -> float:
        return self.step_size or threat.eps

    def reach(self, threat: ThreatModel) -> ThreatModel:
        return threat.scaled(self.noise + 1)

    def start_point(self, ball: Ball, seeds: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
        return Ball(ball.x, threat.scaled(self.noise), ball.space).random(seeds)


@register_attack
class BIM(IterativeAttack):
    """Basic iterative method: steps of eps / steps by default, from the clean image.

    Kurakin et al. 2017, `Adversarial examples in the physical world` - https://arxiv.org/abs/1607.02533
    """
    name = 'bim'

    def step_length(self, threat: ThreatModel) -> float:
        return self.step_size or threat.eps / self.steps


@register_attack
class MIM(BIM):
    """Momentum iterative method (also MIA, MI-FGSM): BIM with momentum over L1-normalized gradients.

    Dong et al. 2018, `Boosting Adversarial Attacks with Momentum` - https://arxiv.org/abs/1710.06081. Three options,
    alone or combined, make images transfer better: input diversity (DI) and translation-invariant gradients (TI), see
    views.py, and scale invariance (SI: Lin et al. 2020, https://arxiv.org/abs/1908.06281, equation 8).
    """
    name = 'mim'
    aliases = ('mia', 'mi-fgsm')
    decay: float = setting(1., 'decay of the momentum')
    diversity: float = setting(
        0., 'DI: probability that a step sees the image at a random size and position (default: 0; paper: 0.5)')
    kernel_size: int = setting(
        1, 'TI: size of the Gaussian kernel that smooths the gradient, odd (default: 1; paper: 15 at 299 pixels)')
    copies: int = setting(
        1, 'SI: copies of the image per step, at 1, 1/2, 1/4 ... of its brightness (default: 1; paper: 5)')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range('decay', self.decay, 0.)
        check_range('diversity', self.diversity, 0., 1.)
        check_at_least('copies', self.copies)
        check_at_least('kernel_size', self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise InputError('must be odd', argument='kernel_size', value=self.kernel_size)

    @property
    def queries(self) -> int:
        return self.copies + 1 if self.copies > 1 or self.diversity > 0 else 1

    def gradient(
            self,
            model: Callable,
            rows: Dict[str, torch.Tensor],
            loss_fn: Callable[[torch.Tensor], torch.Tensor],
            space: InputSpace = PIXELS,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        def view(copy: int, x: torch.Tensor) -> torch.Tensor:
            pixels = space.to_pixels(x) / 2 ** copy
            if self.diversity > 0:
                pixels = diverse(pixels, rows['seed'], rows['step'] * self.copies + copy + 1, self.diversity)
            return space.normalize(pixels)

        if self.queries == 1:
            gradient, logits, loss = super().gradient(model, rows, loss_fn, space)
        else:
            views = [partial(view, copy) for copy in range(self.copies)]
            gradient, logits, loss = view_gradient(model, rows['point'], loss_fn, views)
        return (smoothed(gradient, self.kernel_size) if self.kernel_size > 1 else gradient), logits, loss

    @property
    def momentum(self) -> float:
        return self.decay


@register_attack
class PGD(IterativeAttack):
    """Projected gradient descent: steps of 2.5 eps / steps by default, from a random point of the ball.

    Madry et al. 2018, `Towards Deep Learning Models Resistant to Adversarial Attacks` -
    https://arxiv.org/abs/1706.06083
    """
    name = 'pgd'
    random_start: bool = setting(True, 'start from a random point of the ball')
    restarts: int = setting(1, 'number of runs; each attacks the images that earlier runs failed on')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('restarts', self.restarts)

    @property
    def starts_at_random(self) -> bool:
        return self.random_start


@register_attack
class CWLinf(PGD):
    """PGD on Carlini & Wagner's margin loss, called 'CW' by NoFrost.

    Carlini & Wagner 2017 (https://arxiv.org/abs/1608.04644) in the form of Madry et al. 2018.
    """
    name = 'cw-linf'
    aliases = ('cw',)
    confidence: float = setting(50., 'logit margin of the wrong class at which the loss saturates')

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cw_loss(logits, target, self.confidence)


@register_attack
class PGDTargeted(PGD):
    """Multi-targeted PGD: one targeted run for each of the likeliest wrong classes, on the remaining images.

    Targets are ordered by the clean image's logits (Gowal et al. 2019, https://arxiv.org/abs/1910.09338); a single
    random target is a weak attack. For your own targets, pass `targets` to `PGD`.
    """
    name = 'pgd-targeted'
    targeted = True
    whole_batch = False
    transfers = False
    num_targets: Optional[int] = setting(None, 'number of target classes, by descending logit (default: 9)')
