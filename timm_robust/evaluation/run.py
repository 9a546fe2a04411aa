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
    """A list as a tuple; text, an attack and None unchanged."""
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
        distributed: bool = True,
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

    Images are attacked in pools, with noise seeded by image: neither batch size nor number of processes changes an
    outcome. The batch size is halved when memory runs out. Under torch.distributed, the processes of the default group
    share the images, and all get the same report; they must all be given the same.

    Args:
        model: A timm model (its input is normalized by its `pretrained_cfg`) or any other module that takes pixels,
            switched to eval mode for the evaluation; a model name, the folder of an exported model or hf-hub:ORG/NAME;
            or a `NetworkConfig`.
        data: Images (N, C, H, W) with pixels in [0, 1] if `labels` are given, or a pair of both; a data set of pictures
            or of such tensors; a folder or the name of a timm data set; or an `ImagesConfig`.
        labels: Class indices (N,), if `data` is a tensor.
        attacks: 'clean,pgd20,autoattack', or a list of names and attacks; by default 'clean,fgsm,pgd20', or none with
            `benchmarks`.
        threat: Threat model: `Linf('8/255')` or 'Linf 8/255'; with several, such as 'Linf 8/255, L2 0.5', every attack
            runs under each of them.
        attack_settings: Settings for every chosen attack that has a field of that name.
        worst_case: Run each attack only on images that withstood all earlier attacks; by default on all images
            classified correctly.
        eps_sweep: Also measure accuracy over these eps under the last attack.
        gamma_sweep: Also measure the trade-off of a network with two BatchNorms (`convert_aux_norm`).
        surrogate: Another network with the same classes, by name or as a module, to craft attacks on.
        surrogate_checkpoint: Weights of a surrogate given by name.
        exact: Attack the network itself. By default the attack runs on a faster copy, and every result is verified on
            the network.
        fast_dtype: Precision of the faster copy, 'float32' or 'bfloat16'.
        seed: Seed of the image subset and the noise.
        allow_chance: Evaluate a network even if its clean accuracy is no better than chance.
        diagnose: Check whether the robustness is real; by default after AutoAttack.
        save_images: Number of clean and adversarial images in the report.
        benchmarks: 'clean', 'corruptions', 'c', '3dcc', 'r', 'a', 'sketch', 'stylized', 'v2', 'cifar10-c',
            'cifar100-c', 'cifar10.1', each as NAME=FOLDER, or NAME for its usual folder in the data folder.
        corruptions: Corruptions in these benchmarks; by default the 15 of ImageNet-C and the 12 of 3dcc.
        severities: Severities of the corruptions.
        output: Folder for results.json, report.html, report.md and figures; nothing is written by default.
        resume: Continue the interrupted evaluation in `output`. Outcomes for other weights, images or settings are not
            used.
        distributed: Share the images among the processes of torch.distributed, if there are any. Pass False if each
            process has its own images or network, as in the validation of a training loop: its report is of them.
        progress: Show a progress bar; by default only on a terminal. Without a terminal, a log line is written for each
            pool.
        command: Command line to record.
        checkpoint: Weights of a model given by name.
        device: Device; by default the module's own, or CUDA if available for a model given by name.
        split: Split of a folder or named data set. This and the following arguments are as in `ImagesConfig`; if `data`
            is one, set them there.
        num_examples: Number of images. Without it, images in memory and data set objects keep their order.
        subset: How images are chosen: 'balanced', 'robustbench', or a file of image names.
        batch_size: Batch size.
        workers: Processes that load images.
        allow_class_mismatch: Evaluate even if the classes of the data and the network differ.

    Returns:
        The report. It is saved before the optional stages (sweeps, images, diagnosis, figures) begin, so that a failure
        there loses nothing.

    Raises:
        InputError: On invalid or incompatible arguments.
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
        raise InputError('is a setting of the ImagesConfig', 'set it there', argument=name, value=value)
    source: Any = data if labels is None else (data, labels)
    # Lightning tests in inference mode by default, where gradients are not available
    with Peers(distributed) as peers, torch.inference_mode(False), eval_mode(model, surrogate):
        with float32_proper():
            stages = Stages(config, peers, model, source, images, checkpoint, device)
        return stages.run()
