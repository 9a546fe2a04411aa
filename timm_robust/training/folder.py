"""The folder of a run: its name, and a lock so that no two runs share it."""
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Iterator, Optional

from filelock import FileLock, Timeout

from ..errors import InputError
from ..inputs.files import file_name
from .checkpoint import is_resuming
from .config import TrainConfig

__all__ = ['export_incomplete', 'locked', 'output_dir']


def _folder_of(config: TrainConfig) -> Optional[Path]:
    """The folder of a named run, or of the resumed one if it is in `output`; None for a new name."""
    root = Path(config.output or './output/train')
    if config.experiment:
        return root / config.experiment
    if config.resume and (resumed := Path(config.resume).resolve().parent).parent == root.resolve():
        return root / resumed.name
    return None


def _new_folder(config: TrainConfig, size: int) -> Path:
    root = Path(config.output or './output/train')
    name = f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{file_name(config.model)}-{size}"
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = root / (name if number == 1 else f'{name}-{number}')
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def output_dir(config: TrainConfig, size: int) -> Path:
    """The folder of a run, created if missing; a generated name is never the name of another run.

    Without a name, a resumed run continues in its folder.

    Args:
        config: Settings of the run.
        size: Height of its images, for the name.

    Raises:
        InputError: If the folder holds another run.
    """
    path = _folder_of(config)
    if path is None:
        return _new_folder(config, size)
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
    run, folder = Path(config.resume).parent, _folder_of(config)
    return (run / 'model_best.pth.tar').is_file() and not (run / 'export' / 'config.json').is_file() and (
        folder is not None and is_resuming(config, folder))
