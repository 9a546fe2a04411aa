"""Attacks that step along the input gradient inside the ball, from one step to many."""
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
    step_size: Optional[float] = setting(None, 'length of the step in pixel units (default: 1.25 eps)')

    @property
    def starts_at_random(self) -> bool:
        return True

    def step_length(self, threat: ThreatModel) -> float:
        return self.step_size or 1.25 * threat.eps


@register_attack
class NFGSM(GradientAttack):
    """N-FGSM: one step of length eps from strong noise, not projected; images are up to (`noise` + 1) eps away.

    For training alone. de Jorge et al. 2022, `Make Some Noise: Reliable and Efficient Single-Step Adversarial Training`
    - https://arxiv.org/abs/2202.01181
    """
    name = 'n-fgsm'
    image_by_image = False
    transfers = False
    noise: float = setting(2., 'size of the noise in units of eps')
    step_size: Optional[float] = setting(None, 'length of the step in pixel units (default: eps)')

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
    """Momentum iterative method (also MIA, MI-FGSM): BIM along accumulated L1-normalized gradients.

    Dong et al. 2018, `Boosting Adversarial Attacks with Momentum` - https://arxiv.org/abs/1710.06081. For images that
    fool other networks too: input diversity (DI), translation-invariant gradients (TI), see views.py, and copies of
    lower brightness (SI: Lin et al. 2020, https://arxiv.org/abs/1908.06281, equation 8), alone or together.
    """
    name = 'mim'
    aliases = ('mia', 'mi-fgsm')
    decay: float = setting(1., 'decay of the momentum')
    diversity: float = setting(
        0., 'DI: probability with which a step sees the image at a random size and place (default: 0; published: 0.5)')
    kernel_size: int = setting(
        1, 'TI: side of the Gaussian kernel over the gradient, odd (default: 1; published: 15 at 299 pixels)')
    copies: int = setting(
        1, 'SI: copies of the image at 1, 1/2, 1/4 ... of its brightness that a step sees (default: 1; published: 5)')

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
    restarts: int = setting(1, 'number of runs; each attacks the images that still resist')

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('restarts', self.restarts)

    @property
    def starts_at_random(self) -> bool:
        return self.random_start


@register_attack
class CWLinf(PGD):
    """PGD on Carlini & Wagner's margin loss, NoFrost's 'CW'.

    Carlini & Wagner 2017 (https://arxiv.org/abs/1608.04644) in the form of Madry et al. 2018.
    """
    name = 'cw-linf'
    aliases = ('cw',)
    confidence: float = setting(50., 'lead of a wrong class, in logits, that ends the ascent')

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cw_loss(logits, target, self.confidence)


@register_attack
class PGDTargeted(PGD):
    """Multi-targeted PGD: one targeted run for each of the likeliest wrong classes, on the images that still resist.

    Targets go by descending logit of the clean image (Gowal et al. 2019, https://arxiv.org/abs/1910.09338); a single
    random target is a weak attack. For targets of your own, pass `targets` to `PGD`.
    """
    name = 'pgd-targeted'
    targeted = True
    whole_batch = False
    transfers = False
    num_targets: Optional[int] = setting(None, 'wrong classes to steer towards, by descending logit (default: 9)')
