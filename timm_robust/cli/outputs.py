"""Where the commands that measure a network write, and what they all say of it."""
import secrets
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Sequence

from timm.models import safe_model_name

from ..attacks import ThreatModel
from ..errors import InputError
from ..evaluation import RunFacts, versions
from ..evaluation.plan import threat_facts
from ..evaluation.sources import Source, Subject
from ..settings import to_mapping

__all__ = ['measured_facts', 'new_name', 'new_output']


def new_name(command: str, model: str) -> str:
    """A folder of the command, named by time and model, that no other run has."""
    time = datetime.now().strftime('%Y%m%d-%H%M%S')
    return str(Path('output') / command / f'{time}-{safe_model_name(model)}-{secrets.token_hex(3)}')


def new_output(output: str, file_name: str, model: str) -> Path:
    """The folder of `output`, or one of the command; it is not made yet.

    Raises:
        InputError: If it already holds the file.
    """
    folder = Path(output or new_name(Path(file_name).stem, model))
    if (folder / file_name).exists():
        raise InputError(f'already holds {file_name}', 'choose another folder', argument='output', value=output)
    return folder


def measured_facts(
        command: str,
        argv: Sequence[str],
        subject: Subject,
        source: Source,
        threat: ThreatModel,
        seed: int,
        **settings: Any,
) -> Dict[str, Any]:
    """What a file of `diagnose`, `properties` or `statistics` says besides its figures."""
    run = RunFacts(
        seed=seed, batch_size=source.batch_size, device=str(subject.device),
        command=shlex.join(['timm-robust', command, *argv]),
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'))
    return {
        'model': to_mapping(subject.facts),
        'data': {**to_mapping(source.facts), 'indices': source.indices},
        'threat': to_mapping(threat_facts(threat)),
        'settings': {**to_mapping(run), **settings},
        'versions': versions(),
    }
