"""The folder of a run: its name, and a lock so that no two runs share it."""
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Iterator

from filelock import FileLock, Timeout

from ..errors import InputError
from ..inputs.files import file_name
from .checkpoint import is_resuming
from .config import TrainConfig

__all__ = ['export_incomplete', 'locked', 'output_dir']


def output_dir(config: TrainConfig, size: int) -> Path:
    """The folder of a run, created if missing; a generated name is never the name of another run.

    Args:
        config: Settings of the run.
        size: Height of its images, for the name.

    Raises:
        InputError: If the folder holds another run.
    """
    root = Path(config.output or './output/train')
    if not config.experiment:
        name = f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{file_name(config.model)}-{size}"
        root.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = root / (name if number == 1 else f'{name}-{number}')
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    path = root / config.experiment
    last = path / 'last.pth.tar'
    if last.exists() and not is_resuming(config, path):
        raise InputError(f'{path} already holds a run', f"choose another name or continue with `resume='{last}'`",
                         argument='experiment', value=config.experiment)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs; the lock is released when the process ends, even if it is killed.

    Raises:
        InputError: If another run uses it.
    """
    try:
        with FileLock(folder / '.lock', timeout=0):
            yield
    except Timeout as error:
        raise InputError(f'another run is using {folder}', 'wait for it or choose another name',
                         argument='experiment', value=folder.name) from error


def export_incomplete(config: TrainConfig) -> bool:
    """Whether the resumed run was interrupted between its last checkpoint and the end of its export."""
    if not config.resume:
        return False
    run = Path(config.resume).parent
    return (run / 'model_best.pth.tar').is_file() and not (run / 'export' / 'config.json').is_file() and is_resuming(
        config, Path(config.output or './output/train') / config.experiment)
