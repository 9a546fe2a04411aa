"""A card folder to the Hugging Face Hub: one commit, or nothing."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file

from ..errors import InputError
from ..inputs import weights_sha256
from .card import FIGURES

__all__ = ['Plan', 'plan_push', 'push']

_REQUIRED = ('README.md', 'config.json', 'results.json', 'model.safetensors')


@dataclass
class Plan:
    """What would be sent.

    Attributes:
        repo_id: Repository.
        files: What goes there, from the card folder.
        config: Content of config.json.
        message: Commit message.
    """
    repo_id: str
    files: List[Path]
    config: Dict[str, Any]
    message: str

    def __str__(self) -> str:
        sizes = [f'  {path.name:<20}{path.stat().st_size:>14,} bytes' for path in self.files]
        return '\n'.join([f'{self.repo_id}: {self.message}', *sizes])


def plan_push(folder: Path, repo_id: str) -> Plan:
    """Check a card folder and say what of it would be sent: nothing but card, config, results, weights and figures.

    Raises:
        InputError: If a file is missing or card, config and weights are not of one model.
    """
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise InputError(f'{folder}: has no {missing[0]}, build the folder with timm-robust card')
    try:
        config = json.loads((folder / 'config.json').read_text())
        results = json.loads((folder / 'results.json').read_text())
        of_file = weights_sha256(load_file(folder / 'model.safetensors'))
    except Exception as error:  # safetensors has an exception class of its own
        raise InputError(f'{folder}: is broken ({type(error).__name__}), build it again') from error
    hashes = {config.get('weights_sha256'), results.get('weights_sha256'), of_file}
    if len(hashes) != 1:
        raise InputError(f'{folder}: config, results and weights are of different networks, build it again')
    if f"'hf-hub:{repo_id}'" not in (folder / 'README.md').read_text():
        raise InputError(f'--repo-id {repo_id}: the card says to load the model from another repository, build it anew '
                         'with this --repo-id')
    figures = [p for p in sorted(folder.iterdir()) if p.name.endswith(FIGURES)]
    return Plan(repo_id, [folder / name for name in _REQUIRED] + figures, config, f'Upload {folder.name}')


def _name(config: Dict[str, Any]) -> str:
    return f"{config['architecture']}.{config['pretrained_cfg']['tag']}"


def _refuse_other(api: HfApi, plan: Plan, revision: Optional[str]) -> bool:
    """Whether the repository exists; refuses one that holds another model."""
    try:
        info = api.model_info(plan.repo_id, revision=revision)
    except RevisionNotFoundError:
        return _refuse_other(api, plan, None)  # the new branch begins as the main one
    except RepositoryNotFoundError:
        return False
    if {f.rfilename for f in info.siblings or []} <= {'.gitattributes'}:
        return True
    try:
        path = api.hf_hub_download(plan.repo_id, 'config.json', revision=revision)
        theirs = _name(json.loads(Path(path).read_text()))
    except (EntryNotFoundError, ValueError, KeyError, TypeError):
        theirs = 'no model of this package'
    if theirs != _name(plan.config):
        raise InputError(
            f'--repo-id {plan.repo_id}: holds {theirs}, not {_name(plan.config)}: choose another name')
    return True


def _explain(error: Exception, plan: Plan) -> InputError:
    cause: Optional[BaseException] = error
    while cause is not None and getattr(cause, 'response', None) is None:
        cause = cause.__cause__
    response = getattr(cause, 'response', None)
    status = response.status_code if response is not None else None
    reasons = {
        401: 'the token is missing or not valid: log in with `hf auth login` or set HF_TOKEN',
        403: 'the token may not write there: use one with write access, or another --org',
        404: 'no such repository or branch',
        429: 'too many requests: wait and repeat the command',
    }
    why = reasons.get(status) or (
        f'the Hub answered {status}: repeat the command' if status else
        f'the Hub cannot be reached ({type(error).__name__}): repeat the command')
    return InputError(f'--repo-id {plan.repo_id}: {why}; the repository is as it was')


def push(
        plan: Plan,
        *,
        private: bool = True,
        revision: Optional[str] = None,
        create_pr: bool = False,
) -> str:
    """Send a card folder as one commit, with the token of the environment or of `hf auth login`.

    Files go up first and become visible with the commit alone, so an upload that breaks off leaves the repository as it
    was and can be repeated.

    Args:
        plan: Of `plan_push`.
        private: Create the repository as a private one; one that exists stays as it is.
        revision: Branch, made if it is not there; the main one by default.
        create_pr: Open a pull request instead.

    Returns:
        Address of the commit or the pull request.

    Raises:
        InputError: If the repository holds another model, or the Hub refuses or cannot be reached.
    """
    api = HfApi(library_name='timm_robust')
    try:
        exists = _refuse_other(api, plan, revision)
        if not exists:
            api.create_repo(plan.repo_id, private=private, exist_ok=True)
        if revision and not create_pr:
            api.create_branch(plan.repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            plan.repo_id,
            [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in plan.files],
            commit_message=plan.message,
            revision=revision,
            create_pr=create_pr,
        )
    except InputError:
        raise
    except Exception as error:  # the client's HTTP library, and what the client wraps it in, change with its version
        raise _explain(error, plan) from error
    return commit.pr_url or commit.commit_url
