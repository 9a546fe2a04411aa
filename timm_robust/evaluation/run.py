"""`timm_robust.evaluate`: clean and robust accuracy of a network, image by image."""
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union, cast

import torch
import torch.nn as nn

from ..attacks import Attack, ThreatModel
from ..data.corruptions import SEVERITIES
from ..errors import InputError
from ..inputs import ImagesConfig, Peers
from ..precision import float32_proper
from .config import EvalConfig
from .report import EvaluationReport
from .sources import DataSource
from .stages import Stages
from .subject import ModelSource, eval_mode

__all__ = ['evaluate']


def _frozen(value: Any) -> Any:
    """A list as a tuple; text, an attack and None as they are."""
    return value if value is None or isinstance(value, (str, Attack)) else tuple(value)


def evaluate(
        model: ModelSource,
        data: Optional[DataSource] = None,
        labels: Any = None,
        *,
        attacks: Union[str, Attack, Sequence[Union[str, Attack]], None] = None,
        threat: Union[str, ThreatModel, Sequence[Union[str, ThreatModel]]] = 'Linf 8/255',
        attack_settings: Optional[Mapping[str, Any]] = None,
        worst_case: bool = False,
        eps_sweep: Union[str, Sequence[Union[str, float]]] = '',
        gamma_sweep: bool = False,
        surrogate: Union[str, nn.Module] = '',
        surrogate_checkpoint: str = '',
        exact: bool = False,
        fast_dtype: str = 'float32',
        seed: int = 0,
        allow_chance: bool = False,
        diagnose: Optional[bool] = None,
        save_images: int = 8,
        benchmarks: Union[str, Sequence[str]] = '',
        corruptions: Optional[Sequence[str]] = None,
        severities: Sequence[int] = SEVERITIES,
        output: Union[str, Path] = '',
        resume: bool = False,
        progress: Optional[bool] = None,
        command: str = '',
        checkpoint: str = '',
        device: Optional[str] = None,
        split: Optional[str] = None,
        num_examples: Optional[int] = None,
        subset: Optional[str] = None,
        batch_size: Optional[int] = None,
        workers: Optional[int] = None,
        allow_class_mismatch: Optional[bool] = None,
) -> EvaluationReport:
    """Measure clean and robust accuracy.

    Images are attacked in pools, with noise seeded by the image: neither batch size nor number of processes changes an
    outcome, and where memory ends the batch is halved. Under torch.distributed the processes of the default group share
    the images, and all get the same report.

    Args:
        model: A timm model (mean and std are those of its `pretrained_cfg`) or any other module that takes pixels,
            in eval mode meanwhile; a model name, the folder of an exported model or hf-hub:ORG/NAME; or a
            `NetworkConfig`.
        data: Images (N, C, H, W) with pixels in [0, 1], and `labels`, or a pair of both; a data set of pictures or of
            such tensors; a folder or the name of a timm data set; or an `ImagesConfig`.
        labels: Class indices (N,), if `data` is a tensor.
        attacks: 'clean,pgd20,autoattack', or a list of names and attacks; 'clean,fgsm,pgd20' by default, and nothing if
            there are `benchmarks`.
        threat: Threat model: `Linf('8/255')` or 'Linf 8/255'; or several, 'Linf 8/255, L2 0.5', and every
            attack is run under each.
        attack_settings: Settings that go to every attack named which has such a field.
        worst_case: Run each attack only on images that withstood those before it; by default on all images classified
            correctly.
        eps_sweep: Also measure accuracy over these eps under the last attack.
        gamma_sweep: Also measure the trade-off of a network with two BatchNorms (`convert_aux_norm`).
        surrogate: Another network of the same classes, by name or as a module, to craft attacks on.
        surrogate_checkpoint: Its weights, if it is a name.
        exact: Search on the network itself, not on a faster copy whose results are verified on it.
        fast_dtype: Precision of that copy, 'float32' or 'bfloat16'.
        seed: Seed of subset and noise.
        allow_chance: Evaluate a network whose clean accuracy is that of guessing.
        diagnose: Check whether the robustness is real; by default after AutoAttack.
        save_images: Number of clean and adversarial images in the report.
        benchmarks: 'clean', 'corruptions', 'c', '3dcc', 'r', 'a', 'sketch', 'stylized', 'v2', 'cifar10-c',
            'cifar100-c', 'cifar10.1', as NAME=FOLDER or by their names in the data folder.
        corruptions: Corruptions of these; the 15 of ImageNet-C, and the 12 of 3dcc, by default.
        severities: Their severities.
        output: Folder for results.json, report.html, report.md and figures; nothing is written by default.
        resume: Continue an evaluation that was cut off there. What is of other weights, images or settings is not used.
        progress: Show a progress bar; by default on a terminal, and a line for each pool in a log.
        command: Command line to write down.
        checkpoint: Weights of a network by name.
        device: Where to, by default where a module is, and for a network by name the best there is.
        split: Split of a folder or named data set; this and what follows are as in `ImagesConfig`, and belong in one if
            `data` is one.
        num_examples: Number of images. Images in memory and data set objects keep their order unless it chooses some.
        subset: How those are chosen: 'balanced', 'robustbench', or a file of image names.
        batch_size: Images in the network at once.
        workers: Processes that load images.
        allow_class_mismatch: Evaluate although the classes of the data are not those of the network.

    Returns:
        The report. It is written before anything optional begins (sweeps, images, diagnosis, figures), whose failure is
        logged and costs nothing.

    Raises:
        InputError: On bad arguments, and whatever does not fit together.
        OSError: If `output` cannot be written.

    Examples:

        ```python
        report = evaluate('nofrost_nfnet18_cifar', 'data/cifar10', split='test', num_examples=1000)
        print(report)
        ```
    """
    config = EvalConfig(
        attacks=_frozen(attacks), threat=cast(Any, tuple(threat) if isinstance(threat, list) else threat),
        attack_settings=dict(attack_settings or {}), worst_case=worst_case, eps_sweep=_frozen(eps_sweep),
        gamma_sweep=gamma_sweep, surrogate=surrogate, surrogate_checkpoint=surrogate_checkpoint, exact=exact,
        fast_dtype=fast_dtype, seed=seed, allow_chance=allow_chance, diagnose=diagnose, save_images=save_images,
        benchmarks=_frozen(benchmarks), corruptions=_frozen(corruptions), severities=tuple(severities),
        output=str(output) if isinstance(output, Path) else output, resume=resume,
        progress=progress, command=command)
    given = dict(
        split=split, num_examples=num_examples, subset=subset, batch_size=batch_size, workers=workers,
        allow_class_mismatch=allow_class_mismatch)
    images = {name: value for name, value in given.items() if value is not None}
    if isinstance(data, ImagesConfig) and images:
        name, value = next(iter(images.items()))
        raise InputError('is a setting of the ImagesConfig', 'give it there', argument=name, value=value)
    source: Any = data if labels is None else (data, labels)
    # inside of inference mode, Lightning's default for tests, no gradient can be taken
    with Peers() as peers, torch.inference_mode(False), eval_mode(model, surrogate):
        with float32_proper():
            stages = Stages(config, peers, model, source, images, checkpoint, device)
        return stages.run()
