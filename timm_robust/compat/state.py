"""auto-attack's state file, for resuming an interrupted evaluation."""
import ast
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch

from ..errors import InputError
from ..inputs import read_json, write_json

__all__ = ['EvaluationState']

_CLEAN_SLACK = .002  # another device may classify images at the boundary differently


@dataclass
class EvaluationState:
    """Progress of an evaluation: which attacks have run, and which images are still robust.

    Attributes:
        attacks_to_run: Maps each attack's name to everything its result depends on; empty in auto-attack's own files.
        path: The file, or None.
        run_attacks: Completed attacks.
        robust_flags: For each image, whether it is still robust; empty before the evaluation.
        clean_accuracy: In [0, 1].
    """
    attacks_to_run: Dict[str, Dict[str, Any]]
    path: Optional[Path] = None
    run_attacks: List[str] = field(default_factory=list)
    robust_flags: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    clean_accuracy: float = float('nan')

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are still robust."""
        return self.robust_flags.float().mean().item()

    @classmethod
    def begin(
            cls,
            path: Union[str, Path, None],
            attacks_to_run: Dict[str, Dict[str, Any]],
            right: torch.Tensor,
    ) -> 'EvaluationState':
        """The state in a file, or a new one.

        Args:
            path: The file.
            attacks_to_run: See the attribute.
            right: For each image, whether it is classified correctly.

        Raises:
            InputError: If the file is for other attacks, another network or other images.
        """
        clean = right.float().mean().item()
        path = Path(path) if path else None
        if path is None or not path.exists():
            return cls(attacks_to_run, path, [], right, clean)
        state = cls.from_disk(path)
        own, flags = state.attacks_to_run, state.robust_flags
        if own.keys() != attacks_to_run.keys() or any(own[k] not in ({}, v) for k, v in attacks_to_run.items()):
            raise cls._other(path)
        if not len(flags):
            state.robust_flags, state.clean_accuracy = right, clean
        elif len(flags) != len(right) or abs(state.clean_accuracy - clean) > _CLEAN_SLACK + 1 / len(right):
            raise cls._other(path)  # auto-attack's own files allow no further check
        else:
            state.robust_flags = flags & right
        return state

    @staticmethod
    def _other(path: Path) -> InputError:
        return InputError('is for other attacks, images, network or threat model', 'name another file',
                          argument='state_path', value=str(path))

    def to_disk(self) -> None:
        """Write the file, with the names that auto-attack reads."""
        if self.path is not None:
            write_json(self.path, {
                '_attacks_to_run': self.attacks_to_run, 'path': str(self.path), '_run_attacks': self.run_attacks,
                '_robust_flags': self.robust_flags.tolist(),
                '_last_saved': time.strftime('%Y-%m-%d %H:%M:%S'), '_clean_accuracy': self.clean_accuracy})

    @classmethod
    def from_disk(cls, path: Union[str, Path]) -> 'EvaluationState':
        """Read a file of this class or of auto-attack.

        Raises:
            InputError: If it is not a state file.
        """
        found = read_json(path)
        try:
            names, flags = found['_attacks_to_run'], found['_robust_flags']
            if isinstance(names, str):  # how auto-attack writes a set
                names = {name: {} for name in ast.literal_eval(names)}
            return cls(
                dict(names), Path(path), list(found['_run_attacks']),
                torch.tensor(flags or [], dtype=torch.bool), float(found['_clean_accuracy']))
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise InputError('is not the state of an evaluation', argument='state_path', value=str(path)) from error
