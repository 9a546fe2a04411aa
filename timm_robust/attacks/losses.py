"""What an attack ascends: one value per image, from logits and labels."""
import torch
import torch.nn.functional as F

__all__ = ['cross_entropy', 'hard_labels', 'margin']


def hard_labels(target: torch.Tensor) -> torch.Tensor:
    """Class indices of shape (N,) from class indices or from soft targets of shape (N, K)."""
    return target.argmax(dim=1) if target.ndim == 2 else target


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per image, shape (N,), for class indices (N,) or soft targets (N, K), in float32 or better."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, reduction='none')


def margin(logits: torch.Tensor, target: torch.Tensor, confidence: float = 50.) -> torch.Tensor:
    """Carlini & Wagner's margin per image, shape (N,): -max(z_y - max_{j != y} z_j + confidence, 0).

    The Linf form of Madry et al. (2018) with the NoFrost authors' confidence of 50. Maximal, and flat, once a wrong
    class leads by `confidence`.

    Args:
        logits: Shape (N, K).
        target: Class indices (N,) or soft targets (N, K), of which the largest entry counts.
        confidence: Lead of a wrong class, in logits, that ends the ascent.
    """
    target = hard_labels(target)[:, None]
    correct = logits.gather(1, target).squeeze(1)
    wrong = logits.scatter(1, target, float('-inf')).amax(dim=1)
    return -F.relu(correct - wrong + confidence)
