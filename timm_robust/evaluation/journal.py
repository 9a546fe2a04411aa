"""What came out so far, image by image, on disk as soon as it is known.

Each process appends to a file of its own, one line for each attack on each pool of images. A line that a kill cut
short is passed over, and whoever resumes, with however many processes, reads the lines of all.
"""
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch.distributed as dist

from ..errors import InputError

__all__ = ['Journal']

_NAME = 'progress-{rank}.jsonl'


class Journal:
    """Outcomes by attack and index of the image in the data set.

    Args:
        folder: Where the files lie, or None to keep outcomes in memory alone.
        settings: What the outcomes depend on; a resumed evaluation must have the same.
        resume: Go on where an earlier evaluation in the same folder ended.
        rank: Number of this process.

    Attributes:
        correct: By attack and index, whether the image was classified correctly after it.
        labels: By index.
        seconds: By attack, over all processes.

    Raises:
        InputError: If the folder holds an unfinished evaluation and `resume` is not set, or one with other settings.
    """

    def __init__(self, folder: Optional[Path], settings: Dict[str, Any], resume: bool = False, rank: int = 0):
        self.correct: Dict[str, Dict[int, bool]] = defaultdict(dict)
        self.labels: Dict[int, int] = {}
        self.seconds: Dict[str, float] = defaultdict(float)
        self.file = self._path = None
        if folder is None:
            return
        settings = json.loads(json.dumps(settings))
        files = sorted(folder.glob(_NAME.format(rank='*')))
        if files and not resume:
            raise InputError(
                f'--output {folder}: holds an unfinished evaluation, add --resume to go on or choose another folder')
        for path in files:
            self._read(path, settings)
        self._path, self._settings = folder / _NAME.format(rank=rank), settings

    def __enter__(self) -> 'Journal':
        """Begin to write."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self._path.exists()
            self.file = open(self._path, 'a')
            if fresh:
                self._write({'settings': self._settings})
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _read(self, path: Path, settings: Dict[str, Any]) -> None:
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if 'settings' in entry:
                _compare(entry['settings'], settings, path.parent)
            elif 'attack' in entry:
                self._take(entry)

    def _take(self, entry: Dict[str, Any]) -> None:
        self.correct[entry['attack']].update(zip(entry['indices'], map(bool, entry['correct'])))
        self.labels.update(zip(entry['indices'], entry.get('labels', [])))
        self.seconds[entry['attack']] += entry['seconds']

    def _write(self, entry: Dict[str, Any]) -> None:
        # after a cut-off line the new one must begin on its own
        self.file.write('\n' + json.dumps(entry))
        self.file.flush()
        os.fsync(self.file.fileno())

    def record(
            self,
            attack: str,
            indices: List[int],
            correct: List[bool],
            seconds: float,
            labels: Optional[List[int]] = None,
    ) -> None:
        """Keep the outcome of an attack on some images."""
        entry = {'attack': attack, 'indices': indices, 'correct': [int(c) for c in correct],
                 'seconds': round(seconds, 3), **({'labels': labels} if labels else {})}
        self._take(entry)
        if self.file is not None:
            self._write(entry)

    def merge(self) -> None:
        """Take in what the other processes of a distributed run found."""
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (dict(self.correct), self.labels, dict(self.seconds)))
        for correct, labels, seconds in found:
            self.labels.update(labels)
            for attack, outcome in correct.items():
                self.correct[attack].update(outcome)
                self.seconds[attack] = max(self.seconds[attack], seconds[attack])


def _compare(then: Dict[str, Any], now: Dict[str, Any], folder: Path) -> None:
    for key in {**then, **now}:
        before, after = then.get(key), now.get(key)
        if before != after:
            if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
                before, after = next((a, b) for a, b in zip(before, after) if a != b)
            raise InputError(
                f'--resume: the evaluation in {folder} was begun with {key}={_brief(before)}, not {_brief(after)}: '
                'give the same settings or another --output')


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + '...'
