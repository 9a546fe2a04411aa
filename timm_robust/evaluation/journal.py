"""Outcomes by image, written to disk as soon as they are known, so that an evaluation can be resumed.

Each process appends to its own file, one line for each attack on some images. A line holds hashes of everything that
determines its outcomes: one of network, attack, threat model, seed and versions together (its context), and one of each
image with its label. A resumed evaluation reads the lines of all processes, whatever its own number of processes; lines
that do not match are not used.
"""
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import IO, Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from filelock import FileLock, Timeout

from ..errors import InputError

__all__ = ['FolderLock', 'Journal', 'Measured', 'batch_hashes', 'image_hashes']

_NAME = 'progress-{rank}.jsonl'
_LOCK = '.lock'
_DIGITS = 16  # of a hash: two of a million images collide with probability 3e-8

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Measurements of an outcome besides the verdict.

    Attributes:
        error_rate: Share of passes that misclassify the image, if several passes decide.
        distance: Distance of the nearest adversarial image, if an attack minimizes it and found one.
    """
    error_rate: Optional[float] = None
    distance: Optional[float] = None


State = Tuple[
    Dict[str, Dict[int, bool]], Dict[int, int], Dict[int, str], Dict[str, float], Dict[str, Dict[int, Measured]]]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def image_hashes(x: torch.Tensor, labels: torch.Tensor) -> List[str]:
    """A hash of each image, (N, C, H, W), and its label, (N,)."""
    return [
        hashlib.sha256(image.numpy().tobytes() + f'{tuple(image.shape)} {label}'.encode()).hexdigest()[:_DIGITS]
        for image, label in zip(x.detach().cpu().contiguous(), labels.tolist())]


def batch_hashes(hashes: Sequence[str]) -> List[str]:
    """Hashes of images whose outcome depends on the whole batch; each covers the batch and the position in it."""
    return [_hash([list(hashes), place]) for place in range(len(hashes))]


class FolderLock:
    """Locks a folder against other runs; the lock of a killed process is released.

    Raises:
        InputError: If another run holds it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _LOCK
        self._lock = FileLock(self.path)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                'another run is writing to this folder', 'wait for it or choose another folder', argument='output',
                value=str(folder)) from error

    def __enter__(self) -> 'FolderLock':
        return self

    def __exit__(self, *exception: Any) -> None:
        self.path.unlink(missing_ok=True)
        self._lock.release()


class Journal:
    """Outcomes by attack and index of the image in the data set.

    Args:
        folder: Folder of the files; None to keep outcomes in memory only.
        contexts: By attack, everything that determines its outcomes except the images.
        rank: Rank of this process.

    Attributes:
        correct: By attack and index, whether the image was classified correctly after it.
        labels: By index.
        hashes: By index, hash of image and label.
        seconds: By attack.
        measured: By attack and index, measurements besides the verdict.
    """

    def __init__(
            self,
            folder: Optional[Path] = None,
            contexts: Optional[Mapping[str, Mapping[str, Any]]] = None,
            *,
            rank: int = 0,
    ):
        self.correct: Dict[str, Dict[int, bool]] = defaultdict(dict)
        self.labels: Dict[int, int] = {}
        self.hashes: Dict[int, str] = {}
        self.seconds: Dict[str, float] = defaultdict(float)
        self.measured: Dict[str, Dict[int, Measured]] = defaultdict(dict)
        self._contexts = {key: json.loads(json.dumps(dict(c))) for key, c in (contexts or {}).items()}
        self._current = {key: _hash(c) for key, c in self._contexts.items()}
        self._found: Dict[str, Dict[int, Tuple[str, bool, float, Measured]]] = defaultdict(dict)
        self._changed: Counter[str] = Counter()
        self._file: Optional[IO[str]] = None
        self._path = None if folder is None else folder / _NAME.format(rank=rank)
        if folder is None:
            return
        self._read(sorted(folder.glob(_NAME.format(rank='*'))), say=rank == 0)

    def __enter__(self) -> 'Journal':
        """Begin to write."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, 'a')
            for key, context in self._contexts.items():
                self._write({'context': self._current[key], 'attack': key, 'settings': context})
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, files: Sequence[Path], say: bool) -> None:
        settings: Dict[str, Dict[str, Any]] = {}
        unused: Counter[Tuple[str, str]] = Counter()
        broken = 0
        for line in (line for path in files for line in path.read_bytes().splitlines() if line.strip()):
            entry = _entry(line)
            if entry is None:
                broken += 1
            elif 'settings' in entry:
                settings[entry['context']] = entry['settings']
            elif entry['context'] == self._current.get(entry['attack']):
                share = entry['seconds'] / max(len(entry['indices']), 1)
                self._found[entry['attack']].update(
                    (i, (digest, bool(right), share, Measured(**numbers))) for i, digest, right, numbers in zip(
                        entry['indices'], entry['images'], entry['correct'], entry.get('numbers') or repeat({})))
            elif entry['attack'] in self._current:
                unused[entry['attack'], entry['context']] += len(entry['indices'])
        if not say:
            return
        for (key, context), count in unused.items():
            then, now = settings.get(context, {}), self._contexts[key]
            differs = [name for name in {**then, **now} if then.get(name) != now.get(name)] if then else ['settings']
            detail = ', '.join(
                f'{name}={_brief(then[name])}, now {_brief(now[name])}' if name in then and name in now else name
                for name in differs)
            _logger.warning(f'{count} outcomes of {key} are not used: they belong to another evaluation ({detail})')
        if broken:
            _logger.warning(f'{broken} damaged lines of the journal are not used')

    def take(self, key: str, indices: Sequence[int], hashes: Sequence[str]) -> None:
        """Reuse the outcomes of an earlier run for some images, if the images are unchanged."""
        for index, digest in zip(indices, hashes):
            found = self._found[key].pop(index, None)
            if found is None:
                continue
            if found[0] == digest:
                self.correct[key][index] = found[1]
                self.seconds[key] += found[2]
                self.measured[key][index] = found[3]
            else:
                self._changed[key] += 1

    def say_changed(self) -> None:
        """Log how many outcomes are not used because their images have changed."""
        for key, count in self._changed.items():
            _logger.warning(f'{count} outcomes of {key} are not used: the images have changed since')
        self._changed.clear()

    def _write(self, entry: Dict[str, Any]) -> None:
        if self._file is None:
            return
        # the last line may have been cut off, so start a new one
        self._file.write('\n' + json.dumps({**entry, 'check': _hash(entry)}))
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(
            self,
            key: str,
            indices: Sequence[int],
            hashes: Sequence[str],
            correct: Sequence[bool],
            seconds: float,
            measured: Sequence[Measured] = (),
    ) -> None:
        """Record the outcomes of an attack on some images."""
        self.correct[key].update(zip(indices, correct))
        self.measured[key].update(zip(indices, measured))
        numbers = [{k: v for k, v in asdict(m).items() if v is not None} for m in measured]
        self.seconds[key] += seconds
        self._write({
            'context': self._current.get(key, ''), 'attack': key, 'indices': list(indices), 'images': list(hashes),
            'correct': [int(c) for c in correct], 'seconds': round(seconds, 3),
            **({'numbers': numbers} if any(numbers) else {})})

    def state(self) -> State:
        """Outcomes of this process, for the others."""
        return dict(self.correct), dict(self.labels), dict(self.hashes), dict(self.seconds), dict(self.measured)

    def merge(self, states: Sequence[State]) -> None:
        """Add the outcomes of other processes."""
        for correct, labels, hashes, seconds, measured in states:
            self.labels.update(labels)
            self.hashes.update(hashes)
            for key, outcome in correct.items():
                self.correct[key].update(outcome)
                self.seconds[key] = max(self.seconds[key], seconds.get(key, 0.))
                self.measured[key].update(measured.get(key, {}))

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder holds an unfinished evaluation."""
        return any(folder.glob(_NAME.format(rank='*')))

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete the files after an evaluation is finished."""
        for path in folder.glob(_NAME.format(rank='*')):
            path.unlink()


def _entry(line: bytes) -> Optional[Dict[str, Any]]:
    """The content of a line, None if it is damaged."""
    try:
        entry = json.loads(line)
        check = entry.pop('check')
        return entry if check == _hash(entry) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + '...'
