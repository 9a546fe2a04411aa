"""State and results of attacks."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Sequence

import torch

from .ball import InputSpace
from .threat import Seed

__all__ = ['AttackResult', 'Batch', 'Call', 'State', 'keep_best']


@dataclass(frozen=True)
class Call:
    """Arguments of a call; the fields are the keywords of `Attack.run`."""
    seed: Seed = 0
    space: Optional[InputSpace] = None
    targets: Any = None
    batch_size: Optional[int] = None
    fast_model: Optional[Callable] = None
    progress: Optional[Callable[[int], None]] = None
    all_correct: bool = False


class State(Dict[str, torch.Tensor]):
    """Named tensors whose first dimension is the batch.

    Every state has `x` (clean images in [0, 1]), `y` (true classes), `seed`, `step` (evaluations so far, counted by the
    attack), `best` (the image to return), `score` (how good `best` is, infinite once it fools the network within eps)
    and `done` (`best` is final). `soft` (soft targets) and `target` (target classes) are optional.

    Attributes:
        ends: Whether this is the last step of every image, so that no gradient is needed.
        ages: Steps of each image so far, counted on the host: reading `step` from a GPU would force a sync.
    """
    ends = False
    ages: Sequence[int] = ()


@dataclass
class Batch:
    """Images to attack.

    Attributes:
        x: Clean images, shape (N, C, H, W), pixels in [0, 1], float32 or better.
        y: True classes, shape (N,).
        seeds: One seed per image and run, int64.
        restart: Index of the restart, 0 for the first run, shape (N,).
        target: Target classes, shape (N,), or None.
        soft: Soft targets, shape (N, K), or None.
    """
    x: torch.Tensor
    y: torch.Tensor
    seeds: torch.Tensor
    restart: torch.Tensor
    target: Optional[torch.Tensor] = None
    soft: Optional[torch.Tensor] = None

    def full(self, value: float, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
        """A tensor of shape (N,) filled with one value, by default in the images' dtype."""
        return torch.full((len(self.x),), value, dtype=dtype or self.x.dtype, device=self.x.device)

    def state(self, **rows: torch.Tensor) -> State:
        """A new state with the entries that all attacks share, plus `rows`."""
        state = State(
            x=self.x,
            y=self.y,
            seed=self.seeds,
            best=self.x.clone(),
            score=self.full(float('-inf')),
            step=self.full(0, torch.int64),
            done=self.full(False, torch.bool),
        )
        state.update(rows)
        if self.target is not None:
            state['target'] = self.target
        if self.soft is not None:
            state['soft'] = self.soft
        return state


def keep_best(state: State, point: torch.Tensor, fooled: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Keep the first point that fools the network, or else the one with the highest score.

    Steps after an image is done are ignored. Returns which points replaced the previous best, shape (N,).
    """
    score = torch.where(fooled, float('inf'), score.to(state['score'].dtype))
    better = (score > state['score']) & ~state['done']
    state['best'] = torch.where(better.view(-1, 1, 1, 1), point, state['best'])
    state['score'] = torch.where(better, score, state['score'])
    return better


@dataclass
class AttackResult:
    """Result of an attack.

    Attributes:
        adversarial: Best image for each clean one, detached, in the same input space, in float32 or better.
        fooled: Whether it fools the network, shape (N,).
        queries: Evaluations of the network per image, shape (N,), without the initial clean pass and the final
            verification.
        error_rates: Share of passes that misclassify the image, shape (N,), if several passes decide; else None.
    """
    adversarial: torch.Tensor
    fooled: torch.Tensor
    queries: torch.Tensor
    error_rates: Optional[torch.Tensor] = None

    def put(self, index: torch.Tensor, part: 'AttackResult') -> None:
        """Store `part` as the results of the images at `index`, and add its queries to theirs."""
        self.adversarial[index], self.fooled[index] = part.adversarial, part.fooled
        self.queries[index] += part.queries
