"""Losses that attacks maximize: one value per image, from logits and labels, in float32 or better."""
import torch
import torch.nn.functional as F

__all__ = [
    'cross_entropy', 'cw_loss', 'dlr', 'dlr_targeted', 'gap_targeted', 'hard_labels', 'logit_gap', 'precise',
    'probability_margin']


def precise(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32, unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def hard_labels(target: torch.Tensor) -> torch.Tensor:
    """Class indices of shape (N,) from class indices or from soft targets of shape (N, K)."""
    return target.argmax(dim=1) if target.ndim == 2 else target


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per image, shape (N,), for class indices (N,) or soft targets (N, K)."""
    logits = precise(logits)
    return F.cross_entropy(logits, target.to(logits.dtype) if target.ndim == 2 else target, reduction='none')


def logit_gap(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """max_{j != y} z_j - z_y per image, shape (N,): positive if a wrong class leads. Labels as in `cw_loss`."""
    logits, target = precise(logits), hard_labels(target)[:, None]
    return logits.scatter(1, target, float('-inf')).amax(dim=1) - logits.gather(1, target).squeeze(1)


def gap_targeted(logits: torch.Tensor, target: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """z_t - z_y per image, shape (N,), for true labels y and target classes t, shape (N,)."""
    logits = precise(logits)
    return (logits.gather(1, goal[:, None]) - logits.gather(1, hard_labels(target)[:, None])).squeeze(1)


def probability_margin(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """max_{j != y} p_j - p_y per image, shape (N,), with probabilities p = softmax(z).

    Xie et al. 2024, equation 3 (https://arxiv.org/abs/2411.15210). Labels as in `cw_loss`.
    """
    return logit_gap(precise(logits).softmax(dim=1), target)


def cw_loss(logits: torch.Tensor, target: torch.Tensor, confidence: float = 50.) -> torch.Tensor:
    """Carlini & Wagner's margin loss per image, shape (N,): -max(z_y - max_{j != y} z_j + confidence, 0).

    The Linf form of Madry et al. (2018) with the NoFrost authors' confidence of 50. The loss has its maximum, 0, once a
    wrong class leads by `confidence`.

    Args:
        logits: Shape (N, K).
        target: Class indices (N,) or soft targets (N, K), reduced to the class of the largest entry.
        confidence: Logit margin of the wrong class at which the loss saturates.
    """
    return -F.relu(confidence - logit_gap(logits, target))


def dlr(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio per image, shape (N,): (max_{j != y} z_j - z_y) / (z_(1) - z_(3)).

    Croce & Hein 2020, equation 6 (https://arxiv.org/abs/2003.01690); invariant to shift and scale of the logits.
    z_(i) is the i-th largest logit, so at least 3 classes are needed.
    """
    top = precise(logits).topk(3, dim=1).values
    return logit_gap(logits, target) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: torch.Tensor, target: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Targeted DLR per image, shape (N,): (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    Croce & Hein 2020, equation 7; needs at least 4 classes.

    Args:
        logits: Shape (N, K).
        target: True labels as in `cw_loss`.
        goal: Target classes t, shape (N,).
    """
    top = precise(logits).topk(4, dim=1).values
    return gap_targeted(logits, target, goal) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
