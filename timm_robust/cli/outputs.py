"""Where the commands that judge a network write, and what they all say of it."""
import argparse
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
import torch.nn as nn
from timm.models import safe_model_name

from ..attacks import ThreatModel
from ..errors import InputError
from ..evaluation import DataFacts, ModelFacts, RunFacts, versions
from ..evaluation.outcome import threat_facts
from ..inputs import weights_sha256
from ..settings import to_mapping
from .inputs import Inputs

__all__ = [
    'data_facts', 'measured_facts', 'model_facts', 'new_output', 'own_positions', 'resumable_output', 'run_facts']


def _refuse_finished(output: Path, file_name: str) -> None:
    if (output / file_name).exists():
        raise InputError(f'--output {output}: already holds {file_name}, choose another folder')


def _folder(args: argparse.Namespace, command: str) -> Path:
    named = datetime.now().strftime('%Y%m%d-%H%M%S') + '-' + safe_model_name(args.model)
    return Path(args.output or Path('output') / command / named)


def new_output(args: argparse.Namespace, file_name: str) -> Path:
    """The folder of --output, or one of the command named by time and model; it is not made yet.

    Raises:
        InputError: If it already holds the file.
    """
    output = _folder(args, Path(file_name).stem)
    _refuse_finished(output, file_name)
    return output


def resumable_output(args: argparse.Namespace, file_name: str) -> Path:
    """The folder of --output for an evaluation that can go on, the same in every process.

    Raises:
        InputError: If --resume has no folder, or the evaluation there is at its end.
    """
    if args.resume and not args.output:
        raise InputError('--resume: name the folder of the evaluation that was cut off with --output')
    output = [_folder(args, 'eval')]
    if args.distributed:
        torch.distributed.broadcast_object_list(output)
    _refuse_finished(output[0], file_name)
    return output[0]


def own_positions(count: int, args: argparse.Namespace, batch_dependent: bool) -> List[int]:
    """Positions of this process: every world_size-th, or whole batches where they must be those of a single process."""
    together = args.batch_size if batch_dependent else 1
    return [i for i in range(count) if i // together % args.world_size == args.rank]


def model_facts(args: argparse.Namespace, model: nn.Module, data_config: Dict[str, Any]) -> ModelFacts:
    """What results say of the network."""
    return ModelFacts(
        name=args.model,
        checkpoint=args.checkpoint,
        use_ema=args.use_ema,
        model_kwargs=args.model_kwargs,
        bn_mode=args.bn_mode,
        gamma=args.gamma,
        num_classes=model.num_classes,
        weights_sha256=weights_sha256(model),
        **{k: data_config[k] for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
    )


def data_facts(args: argparse.Namespace, **found: Any) -> DataFacts:
    """What results say of the images."""
    return DataFacts(
        dataset=args.dataset or 'ImageFolder', data_dir=args.data_dir, split=args.split, subset=args.subset, **found)


def run_facts(args: argparse.Namespace, command: str, argv: Sequence[str], **found: Any) -> RunFacts:
    """What results say of a run."""
    return RunFacts(
        seed=args.seed, batch_size=args.batch_size, command=shlex.join(['timm-robust', command, *argv]),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'), **found)


def measured_facts(
        command: str,
        argv: Sequence[str],
        inputs: Inputs,
        threat: ThreatModel,
        **settings: Any,
) -> Dict[str, Any]:
    """What a file of `diagnose`, `properties` or `statistics` says beside its figures."""
    args = inputs.args
    return {
        'model': to_mapping(model_facts(args, inputs.model, inputs.data_config)),
        'data': to_mapping(data_facts(
            args, num_images=len(inputs.dataset), indices=tuple(inputs.indices), class_names=inputs.class_names)),
        'threat': to_mapping(threat_facts(threat)),
        'settings': {**to_mapping(run_facts(args, command, argv, device=str(inputs.device))), **settings},
        'versions': versions(),
    }
