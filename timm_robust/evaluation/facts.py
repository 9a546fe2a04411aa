"""What a report is made of: network, data, threat model, settings, versions, findings, example images."""
import math
import platform
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import torch

from ..settings import check_types
from ..version import __version__

__all__ = ['DataFacts', 'Example', 'Finding', 'ModelFacts', 'RunFacts', 'ThreatFacts', 'versions']


def versions() -> Dict[str, str]:
    """Versions of what an evaluation depends on."""
    import timm
    import torchvision
    return {
        'timm_robust': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'torchvision': torchvision.__version__,
        'python': platform.python_version(),
    }


@dataclass(frozen=True)
class ThreatFacts:
    """A threat model, which a reader need not know the norm of.

    Attributes:
        norm: Name of the norm, 'Linf' for example; of several threat models the names of all.
        eps: Largest perturbation in pixel units on [0, 1]; 0 for several, of which each outcome has its own.
        text: As people write it, 'Linf 8/255', or 'Linf 8/255, L2 0.5'.
    """
    norm: str
    eps: float
    text: str

    def __post_init__(self) -> None:
        check_types(self)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The network that was measured.

    Attributes:
        name: Model name, or the class of a module.
        num_classes: Number of classes it tells apart.
        weights_sha256: Hash of the weights that answered.
        checkpoint: File the weights are from, '' for pretrained ones.
        use_ema: Whether averaged weights of the checkpoint were preferred.
        model_kwargs: Further arguments of the model.
        bn_mode: Which statistics normalization used, None for the model's own.
        gamma: Share of the BatchNorm of adversarial images, None for a network with one.
        input_size, mean, std, interpolation, crop_pct, crop_mode: Preprocessing; None for a module on pixels.
    """
    name: str
    num_classes: int = 0
    weights_sha256: str = ''
    checkpoint: str = ''
    use_ema: bool = True
    model_kwargs: Dict[str, object] = field(default_factory=dict)
    bn_mode: Optional[str] = None
    gamma: Optional[float] = None
    input_size: Optional[Tuple[int, ...]] = None
    mean: Optional[Tuple[float, ...]] = None
    std: Optional[Tuple[float, ...]] = None
    interpolation: Optional[str] = None
    crop_pct: Optional[float] = None
    crop_mode: Optional[str] = None

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def resizing(self) -> str:
        """How images were resized and cropped, by RobustBench's names: 'Res256Crop224' (bilinear), 'Res224'.

        '' where that is not known, or the crop is neither central nor none.
        """
        if not (self.input_size and self.crop_pct and self.interpolation):
            return ''
        size = self.input_size[-1]
        how = '' if self.interpolation == 'bilinear' else self.interpolation.capitalize()
        if self.crop_mode == 'squash':
            return f'{how}Res{size}' if self.crop_pct == 1 else ''
        return f'{how}Res{math.floor(size / self.crop_pct)}Crop{size}' if self.crop_mode == 'center' else ''


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The images that were measured on.

    Attributes:
        dataset: Name of the data set, 'ImageFolder' for a folder, 'tensors' for images in memory.
        data_dir: Its folder.
        split: Its split.
        subset: How images were chosen.
        num_images: Images the data set has.
        indices: Index in the data set of each image that was chosen.
        labels: Their labels.
        sha256: Hash of these images and labels.
        class_names: Names of the classes, where the data set knows them.
        mismatch: How its classes differ from those of the network, and images under two labels; '' if nothing.
    """
    dataset: str = ''
    data_dir: Optional[str] = None
    split: Optional[str] = None
    subset: str = ''
    num_images: int = 0
    indices: Tuple[int, ...] = ()
    labels: Tuple[int, ...] = ()
    sha256: str = ''
    class_names: Optional[Tuple[str, ...]] = None
    mismatch: str = ''

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def num_examples(self) -> int:
        """Images that were chosen."""
        return len(self.indices)

    @property
    def source(self) -> str:
        """Where the images are from, for people."""
        return self.data_dir or '' if self.dataset in ('', 'ImageFolder') else self.dataset

    def class_name(self, index: int) -> str:
        """Name of a class; a network may know classes that the data set has no name for."""
        names = self.class_names or ()
        return names[index] if index < len(names) else f'class {index}'


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """How it was measured.

    Attributes:
        seed: Seed of subset and noise.
        batch_size: Images in the network at once.
        batch_dependent: A prediction depends on the other images of the batch.
        worst_case: Each attack ran only on images that withstood those before it.
        exact: Attacks ran on the network itself, not on a faster copy.
        fast_dtype: Precision of the faster copy.
        device: Where.
        dtype: Precision of verdicts.
        surrogate: Network the attacks were crafted on, '' if it is the one that was measured.
        surrogate_sha256: Hash of its weights.
        command: Command line, '' for a call from Python.
        date: When it began, ISO 8601.
    """
    seed: int = 0
    batch_size: int = 0
    batch_dependent: bool = False
    worst_case: bool = False
    exact: bool = False
    fast_dtype: str = 'float32'
    device: str = 'cpu'
    dtype: str = 'float32'
    surrogate: str = ''
    surrogate_sha256: str = ''
    command: str = ''
    date: str = ''

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Finding:
    """Outcome of one check of a diagnosis.

    Attributes:
        name: The check, for example 'zero_gradients'.
        verdict: 'ok', 'warning', 'alarm' or 'skipped'.
        text: What was measured, and what to conclude.
        measured: The numbers behind the text, for JSON.
    """
    name: str
    verdict: str
    text: str
    measured: Dict[str, object]

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, eq=False)
class Example:
    """An image, and what an attack made of it.

    Attributes:
        clean, adversarial: Shape (C, H, W), pixels in [0, 1].
        attack: The attack that fooled the network, or the last one.
        label: True class.
        prediction: Class of the adversarial image.
        clean_confidence, confidence: Probability of the predicted class, clean and adversarial.
    """
    clean: torch.Tensor
    adversarial: torch.Tensor
    attack: str
    label: int
    prediction: int
    clean_confidence: float
    confidence: float

    @property
    def fooled(self) -> bool:
        """Whether the adversarial image is misclassified."""
        return self.prediction != self.label
