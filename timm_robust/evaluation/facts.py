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
    """Versions of the software that an evaluation depends on."""
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
    """A threat model as recorded; its norm need not be registered.

    Attributes:
        norm: Name of the norm, for example 'Linf'; for several threat models, all their names.
        eps: Largest perturbation in pixel units on [0, 1]; 0 for several, since each outcome has its own.
        text: For display, 'Linf 8/255', or 'Linf 8/255, L2 0.5'.
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
        num_classes: Number of classes.
        weights_sha256: Hash of the evaluated weights.
        checkpoint: File of the weights, '' for pretrained ones.
        use_ema: Whether averaged weights of the checkpoint were preferred.
        model_kwargs: Further arguments of the model.
        bn_mode: Which statistics normalization used, None for the model's own.
        gamma: Weight of the BatchNorm for adversarial images; None for a network with one BatchNorm.
        input_size, mean, std, interpolation, crop_pct, crop_mode: Preprocessing; None for a module on pixels.
        logits: First logits of `logits_of_fixed_input`; None for a module on pixels or a randomized network.
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
    logits: Optional[Tuple[float, ...]] = None

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def resizing(self) -> str:
        """How images were resized and cropped, by RobustBench's names: 'Res256Crop224' (bilinear), 'Res224'.

        '' if unknown, and for crops other than a center crop.
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
        subset: How images were chosen; '' if all were taken in their order.
        num_images: Number of images in the data set.
        class_sizes: How many of them each class has, of the classes that occur; empty if labels are unknown.
        indices: Data set index of each chosen image.
        labels: Their labels.
        sha256: Hash of these images and labels.
        class_names: Names of the classes, if the data set knows them.
        mismatch: Class differences from the network, and images with two labels; '' if none.
    """
    dataset: str = ''
    data_dir: Optional[str] = None
    split: Optional[str] = None
    subset: str = ''
    num_images: int = 0
    class_sizes: Tuple[int, ...] = ()
    indices: Tuple[int, ...] = ()
    labels: Tuple[int, ...] = ()
    sha256: str = ''
    class_names: Optional[Tuple[str, ...]] = None
    mismatch: str = ''

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def num_examples(self) -> int:
        """Number of chosen images."""
        return len(self.indices)

    @property
    def class_sizes_differ(self) -> bool:
        """Whether class-balanced images were chosen from classes of clearly different sizes.

        If so, at least 5 % of all images would have to change their class for a balanced data set.
        """
        sizes = self.class_sizes
        surplus = sum(max(size - self.num_images / len(sizes), 0) for size in sizes)
        return self.subset == 'balanced' and self.num_examples < self.num_images and surplus >= .05 * self.num_images

    @property
    def source(self) -> str:
        """Where the images are from, for display."""
        return self.data_dir or '' if self.dataset in ('', 'ImageFolder') else self.dataset

    def class_name(self, index: int) -> str:
        """Name of a class, or 'class INDEX' if the data set has no name for it."""
        names = self.class_names or ()
        return names[index] if index < len(names) else f'class {index}'


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """How the accuracies were measured.

    Attributes:
        seed: Seed of the image subset and the noise.
        batch_size: Batch size.
        batch_dependent: Whether a prediction depends on the other images in the batch.
        randomized: Whether two passes of the same images differ; None if unknown, or if several passes decide.
        suspicions: Reasons to doubt the accuracies, found on the first images; None if unknown.
        worst_case: Whether each attack ran only on images that withstood all earlier attacks.
        exact: Whether attacks ran on the network itself, not on a faster copy.
        fast_dtype: Precision of the faster copy.
        device: Device.
        dtype: Precision of the passes that decide whether an image is classified correctly.
        surrogate: Network the attacks were crafted on, '' if it is the evaluated network.
        surrogate_sha256: Hash of its weights.
        command: Command line, '' for a call from Python.
        date: Start time, ISO 8601.
    """
    seed: int = 0
    batch_size: int = 0
    batch_dependent: bool = False
    randomized: Optional[bool] = None
    suspicions: Optional[Tuple[str, ...]] = None
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
        measured: The numbers in the text, for JSON.
    """
    name: str
    verdict: str
    text: str
    measured: Dict[str, object]

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, eq=False)
class Example:
    """A clean image and its adversarial version.

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
