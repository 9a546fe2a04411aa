"""Example images for reports and the app."""
from dataclasses import replace
from typing import Any, Dict, List, Sequence, Tuple

import torch
from PIL import Image
from timm.data import create_transform

from ..attacks import ATTACKS, Clean, ThreatModel, parse_attack
from ..errors import InputError
from .accuracy import Runner
from .facts import Example
from .outcome import AttackOutcome
from .plan import Plan
from .subject import Subject

__all__ = ['attack_picture', 'attacks_of_pictures', 'example_images']


def example_images(
        runner: Runner,
        x: torch.Tensor,
        labels: torch.Tensor,
        indices: Sequence[int],
        outcomes: Sequence[AttackOutcome],
        count: int = 8,
) -> Tuple[Example, ...]:
    """Adversarial images for a figure, crafted again with the seeds of the evaluation.

    Each image is shown with the first attack that fooled the network, or with the last attack if none did.

    Args:
        runner: The runner of the evaluation.
        x: The first images of the evaluation; for a network with batch statistics, its first batch.
        labels: Their labels, shape (N,).
        indices: Their indices in the data set.
        outcomes: Outcomes of the attacks in `runner.plan`; the first entries belong to the images `x`.
        count: Number of images, chosen among those classified correctly when clean.
    """
    attacks = [(a, o) for a, o in zip(runner.plan.attacks, outcomes, strict=True) if not isinstance(a, Clean)]
    if not attacks:
        return ()
    clean = runner.logits(x, labels).softmax(1)
    rows = (clean.argmax(1) == labels).nonzero().squeeze(1)[:count].tolist()
    by_attack: Dict[int, List[int]] = {}
    for i in rows:
        fooled = [k for k, (_, outcome) in enumerate(attacks) if outcome.correct[i] is False]
        by_attack.setdefault(fooled[0] if fooled else len(attacks) - 1, []).append(i)
    examples: Dict[int, Example] = {}
    for k, remaining in by_attack.items():
        attack = attacks[k][0]
        for key, member in runner.plan.members(attack, runner.num_classes):
            picked = list(range(len(x))) if runner.batch_dependent else remaining
            adv = runner.craft(member, x[picked], labels[picked], [indices[i] for i in picked])
            after = runner.logits(adv, labels[picked]).softmax(1)
            for i in remaining:
                j = picked.index(i)
                examples[i] = Example(
                    clean=x[i].cpu(), adversarial=adv[j].cpu(), attack=key, label=int(labels[i]),
                    prediction=int(after[j].argmax()), clean_confidence=clean[i].max().item(),
                    confidence=after[j].max().item())
            remaining = [i for i in remaining if not examples[i].fooled]
            if not remaining:
                break
        for i in remaining:
            examples[i] = replace(examples[i], attack=str(attack))
    return tuple(sorted(examples.values(), key=lambda e: e.label))


def attacks_of_pictures(threat: ThreatModel, num_classes: int) -> List[str]:
    """Names of all attacks that `attack_picture` accepts, including variants such as apgd-dlr."""
    def fits(name: str) -> bool:
        try:
            Plan((parse_attack(name),), threat).check(num_classes, batch_dependent=False)
        except InputError:
            return False
        return True

    names = (name for cls in ATTACKS.values() if cls is not Clean for name in (cls.name, *cls.variants))
    return list(filter(fits, names))


def attack_picture(subject: Subject, picture: Image.Image, threat: ThreatModel, attack: str, seed: int = 0) -> Example:
    """Attack a network's prediction for a picture whose true class is unknown.

    Args:
        subject: A network that classifies each image independently and whose preprocessing is known.
        picture: A picture of any size and mode; preprocessed like the images of an evaluation.
        threat: Threat model; eps 0 leaves the picture unchanged.
        attack: Name of the attack, for example 'pgd20'.
        seed: Seed of the attack's noise.

    Returns:
        The preprocessed picture before and after the attack; `label` is the network's prediction before it.

    Raises:
        InputError: On an attack that is not defined for the threat model or the network.
    """
    assert subject.preprocessing is not None
    channels, *_ = subject.preprocessing['input_size']
    pixels: Dict[str, Any] = {**subject.preprocessing, 'mean': (0.,) * channels, 'std': (1.,) * channels}
    x = create_transform(**pixels)(picture.convert('RGB' if channels == 3 else 'L'))[None].to(subject.device)
    with torch.no_grad():
        clean = subject.model(x).softmax(1)[0]
    label, crafted = clean.argmax(), parse_attack(attack)
    Plan((crafted,), threat).check(len(clean), batch_dependent=False)
    adv = crafted(subject.model, x, label[None], threat, seed=seed) if threat.eps else x
    with torch.no_grad():
        after = subject.model(adv).softmax(1)[0]
    return Example(
        clean=x[0].cpu(), adversarial=adv[0].cpu(), attack=str(crafted), label=int(label),
        prediction=int(after.argmax()), clean_confidence=clean.max().item(), confidence=after.max().item())
