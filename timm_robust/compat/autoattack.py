"""A drop-in replacement for auto-attack's `AutoAttack`: existing scripts run after changing one import.

    from timm_robust.compat import AutoAttack  # was: from autoattack import AutoAttack

Croce & Hein 2020 - https://arxiv.org/abs/2003.01690; names and defaults follow https://github.com/fra31/auto-attack.
"""
import hashlib
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterable, List, Optional, Union

import torch

from .. import attacks
from ..attacks import (
    Attack,
    check_batch,
    check_images,
    image_seeds,
    logits_of,
    make_fast_model,
    make_threat,
    parse_attack,
)
from ..attacks.context import without_ddp
from ..devices import halving
from ..errors import InputError, check_choice
from ..evaluation import make_plan
from ..evaluation.journal import image_hashes
from ..evaluation.subject import eval_mode, network_sha256
from ..inputs import resolve_device
from ..layers import has_batch_statistics
from ..precision import float32_proper
from .state import EvaluationState

__all__ = ['AutoAttack']

_NAMES = ('apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t')
_VERSIONS = ('standard', 'plus', 'rand', 'custom')
_SETTINGS = {'n_restarts': 'restarts', 'n_iter': 'steps', 'n_target_classes': 'num_targets', 'n_queries': 'query_limit'}
_MANY = 1000  # a number of classes with which no attack is skipped
_BATCHES_IN_POOL = 8  # keeps the batch full while fooled images leave it


class AutoAttack:
    """AutoAttack with auto-attack's arguments, settings (`adversary.apgd.n_restarts = 1`), methods and log lines.

    `model` maps pixels in [0, 1], (N, C, H, W), to logits; it is in eval mode during the evaluation. An `InputError`
    names any argument or setting that is not supported. For randomized networks (version rand, or `eot_iter` above 1)
    an image is broken if at least half of 100 passes misclassify it; auto-attack asks once.
    """

    def __init__(
            self, model: Any, norm: str = 'Linf', eps: float = .3, seed: Optional[int] = None, verbose: bool = True,
            attacks_to_run: Iterable[str] = (), version: str = 'standard', is_tf_model: bool = False,
            device: Union[str, torch.device] = 'cuda', log_path: Union[str, Path, None] = None):
        if is_tf_model:
            raise InputError('TensorFlow is not supported', argument='is_tf_model', value=is_tf_model)
        self.model, self.seed, self.verbose, self.log_path = without_ddp(model), seed, verbose, log_path
        self.threat, self.device = make_threat(norm, eps), resolve_device(str(device))
        self.apgd, self.apgd_targeted, self.fab, self.square = (SimpleNamespace() for _ in range(4))
        self.attacks_to_run = list(attacks_to_run)
        if version != 'custom' and self.attacks_to_run:
            raise InputError("only applies to version='custom'", argument='attacks_to_run', value=self.attacks_to_run)
        self.set_version(version)

    def set_version(self, version: str = 'standard') -> None:
        """Use the attacks of a version."""
        check_choice('version', version, _VERSIONS)
        self.version = version
        self.attacks_to_run = list(self._members(_MANY)) or self.attacks_to_run

    def _members(self, num_classes: int) -> Dict[str, Attack]:
        """The attacks of the version for a number of classes, keyed by their names for many classes."""
        if self.version == 'custom':
            return {}
        plan = make_plan([attacks.AutoAttack(version=self.version)], self.threat)
        names, members = ([m for _, m in plan.members(plan.attacks[0], n)] for n in (_MANY, num_classes))
        return dict(zip(map(str, names), members))

    def _attack(self, name: str, num_classes: int) -> Attack:
        """The attack with this name and the user's settings."""
        check_choice('attacks_to_run', name, _NAMES)
        restarts = {'restarts': 5} if self.version == 'custom' and name in ('apgd-ce', 'apgd-dlr', 'fab') else {}
        attack = self._members(num_classes).get(name) or parse_attack(name, **restarts)
        kind = 'apgd_targeted' if name == 'apgd-t' else name.partition('-')[0]
        known = {f.name for f in fields(attack)} - {'loss'}
        for key, value in vars(getattr(self, kind)).items():
            own = _SETTINGS.get(key, key)
            if own not in known | ({'num_targets'} if kind == 'fab' else set()):
                raise InputError(f'is not a supported setting of {name}', argument=f'{kind}.{key}', value=value)
            if own in known and (name, own) != ('fab-t', 'restarts'):  # auto-attack runs fab-t once
                attack = replace(attack, **{own: value})
        return attack

    def _log(self, text: str) -> None:
        if self.verbose:
            print(text)
            if self.log_path is not None:
                with open(self.log_path, 'a', encoding='utf-8') as file:
                    file.write(f'{text}\n')

    def _logits(self, x: torch.Tensor, bs: int) -> torch.Tensor:
        with float32_proper():
            return torch.cat([logits_of(self.model, part.to(self.device)).cpu() for part in x.split(bs)])

    def _predicted(self, x: torch.Tensor, y: torch.Tensor, bs: int, passes: int) -> torch.Tensor:
        """Predicted classes: a wrong one where at least half of the passes are wrong, else the label."""
        found = torch.stack([self._logits(x, bs).argmax(1) for _ in range(passes)])
        wrong = found != y
        example = found.gather(0, wrong.int().argmax(0, keepdim=True)).squeeze(0)
        return torch.where(wrong.float().mean(0) >= .5, example, y)

    def clean_accuracy(self, x_orig: torch.Tensor, y_orig: torch.Tensor, bs: int = 250) -> float:
        """Share of images classified correctly in one pass."""
        y = self._labels(x_orig, y_orig)
        with eval_mode(self.model):
            return (self._logits(x_orig, bs).argmax(1) == y).float().mean().item()

    def _labels(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Checked class indices of checked images, on the CPU."""
        check_images(x, None, self.model)
        checked = check_batch(x, y)
        if checked.soft is not None:
            raise InputError('are soft targets', 'give class indices of shape (N,)', argument='labels')
        return checked.labels.cpu()

    def run_standard_evaluation(
            self, x_orig: torch.Tensor, y_orig: torch.Tensor, bs: int = 250, return_labels: bool = False,
            state_path: Union[str, Path, None] = None) -> Any:
        """Attack each image until an attack succeeds; adversarial images found before resuming are not returned."""
        with eval_mode(self.model):
            return self._run(self.attacks_to_run, x_orig, y_orig, bs, return_labels, state_path)

    def run_standard_evaluation_individual(
            self, x_orig: torch.Tensor, y_orig: torch.Tensor, bs: int = 250, return_labels: bool = False) -> Any:
        """Run each attack on all images; returns a dictionary from its name to `run_standard_evaluation`'s result."""
        with eval_mode(self.model):
            return {n: self._run([n], x_orig, y_orig, bs, return_labels) for n in self.attacks_to_run}

    @torch.inference_mode(False)
    def _run(
            self, names: List[str], x: torch.Tensor, y: torch.Tensor, bs: int, return_labels: bool,
            path: Union[str, Path, None] = None) -> Any:
        if isinstance(self.model, torch.nn.Module) and has_batch_statistics(self.model):
            raise InputError('normalizes by the batch, so there is no result for a single image',
                             "evaluate(model, ..., attacks='adaptive') attacks whole batches", argument='model')
        if not names:
            raise InputError('names no attack', f'choose some of {", ".join(_NAMES)}', argument='attacks_to_run')
        y = self._labels(x, y)
        logits, start = self._logits(x[:bs], bs), time.time()
        known = {name: self._attack(name, logits.shape[1]) for name in self.attacks_to_run}
        todo, passes = {name: known[name] for name in names}, max((a.passes for a in known.values()), default=1)
        if passes == 1 and not torch.allclose(self._logits(x[:bs], bs), logits, 1e-4, 1e-4):
            self._log("Warning: the network is randomized, use version='rand'.")
        y_adv, x_adv = self._predicted(x, y, bs, passes), x.clone()
        seeds = image_seeds(self.seed, len(x), torch.device('cpu'))
        images = hashlib.sha256(' '.join(image_hashes(x, y)).encode()).hexdigest()
        decides = {'threat': str(self.threat), 'images': images,
                   'network': network_sha256(self.model) if isinstance(self.model, torch.nn.Module) else ''}
        settings = {name: {**attack.to_dict(), **decides} for name, attack in todo.items()}
        state = EvaluationState.begin(path, settings, y_adv == y)
        self._log(f"using {self.version} version including {', '.join(todo)}.")
        if passes > 1:
            self._log(f'an image counts as broken if at least half of {passes} passes misclassify it.')
        self._log(f'initial accuracy: {state.clean_accuracy:.2%}')
        fast = make_fast_model(self.model, x[:8].to(self.device)) if isinstance(self.model, torch.nn.Module) else None
        for name in (n for n in todo if n not in state.run_attacks):
            for rows in state.robust_flags.nonzero().squeeze(1).split(_BATCHES_IN_POOL * bs):
                craft = partial(
                    todo[name], self.model, x[rows].to(self.device), y[rows].to(self.device), self.threat,
                    seed=seeds[rows], fast_model=fast)
                with float32_proper() if fast is None else nullcontext():  # results of a copy are verified
                    adv, bs = halving(lambda size: craft(batch_size=size), bs)  # noqa: B023 (called here)
                predicted = self._predicted(adv, y[rows], bs, passes)
                found = rows[fooled := predicted != y[rows]]
                x_adv[found], y_adv[found] = adv.to(x.device)[fooled.to(x.device)], predicted[fooled]
                state.robust_flags[found] = False
                state.to_disk()
            state.run_attacks.append(name)
            state.to_disk()
            self._log(f'robust accuracy after {name.upper()}: {state.robust_accuracy:.2%} '
                      f'(total time {time.time() - start:.1f} s)')
        return (x_adv, y_adv.to(x.device)) if return_labels else x_adv
