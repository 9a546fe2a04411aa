"""Upload a card folder to the Hugging Face Hub in one commit."""
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ..errors import InputError
from ..inputs import NetworkConfig, build_network, read_json
from .card import card_files, measured_preprocessing, read_card

__all__ = ['Plan', 'own_repo_id', 'plan_push', 'push']

_REQUIRED = ('README.md', 'config.json', 'results.json', 'model.safetensors')
_COMMIT = 'the commit arrived'
_PNG = b'\x89PNG\r\n\x1a\n'


@dataclass
class Plan:
    """What would be uploaded.

    Attributes:
        repo_id: Repository.
        files: By path in the repository, a file of the card folder, or a text that names the repository.
        name: Architecture and tag of the model.
        message: Commit message.
    """
    repo_id: str
    files: Dict[str, Union[Path, bytes]]
    name: str
    message: str

    def __str__(self) -> str:
        lengths = {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}
        sizes = [f'  {name:<28}{length:>14,} bytes' for name, length in lengths.items()]
        return '\n'.join([f'{self.repo_id}: {self.message}', *sizes])


def _check_file(path: Path) -> None:
    """Refuse links, which could lead out of the folder."""
    try:
        kind = path.lstat().st_mode
    except OSError as error:
        raise InputError(f'has no {path.name}', 'build it with timm-robust card') from error
    if not stat.S_ISREG(kind):
        raise InputError(f'{path.name} is a link or not a file', 'build the folder again')
    with open(path, 'rb') as file:
        if path.suffix == '.png' and file.read(len(_PNG)) != _PNG:
            raise InputError(f'{path.name} is not a PNG image', 'build the folder again')


def _check_folder(folder: Path, repo_id: str) -> Plan:
    for name in _REQUIRED:
        _check_file(folder / name)
    card, evaluations, content = read_card(folder)
    texts = card_files(card, evaluations)
    for name in (*card.figures, *texts):
        _check_file(folder / name)
    network = build_network(NetworkConfig(model=str(folder.resolve()), device='cpu'))
    hashes = {content.get('weights_sha256'), *(report.model.weights_sha256 for _, report in evaluations)}
    if hashes != {network.weights_sha256}:
        raise InputError('results and weights belong to different networks', 'build it again')
    if network.preprocessing != measured_preprocessing(evaluations):
        raise InputError('its config.json does not have the preprocessing of its evaluation',
                         'build it again')
    added = ''
    for name, text in texts.items():
        if name == 'results.json':  # checked above; its text may be from an earlier version
            continue
        found = (folder / name).read_text(encoding='utf-8')
        if name == 'README.md' and found.startswith(text):
            added = found[len(text):]
        elif found != text:
            raise InputError(f'{name} does not match results.json: one of them was edited',
                             'build it again, and put your own text at the end of README.md')
    texts = card_files(replace(card, repo_id=repo_id), evaluations)  # name the repository
    texts['README.md'] += added
    name = f'{card.architecture}.{card.tag}'
    if _name(read_json(folder / 'config.json')) != name:
        raise InputError(f'its config.json does not belong to {name}', 'build it again')
    files: Dict[str, Union[Path, bytes]] = {
        n: folder / n for n in ('config.json', 'model.safetensors', *card.figures)}
    return Plan(repo_id, {**files, **{n: text.encode() for n, text in texts.items()}}, name, f'Upload {card.name}')


def own_repo_id(folder: Path) -> str:
    """The logged-in user's repository with the name of the folder.

    Raises:
        InputError: If there is no token, or the Hub does not know it.
    """
    try:
        return f"{HfApi().whoami()['name']}/{folder.resolve().name}"
    except Exception as error:  # raised by the client or its HTTP library
        raise InputError(
            'is missing, and the Hub did not say who owns the token', 'log in with `hf auth login`, or give it',
            argument='repo_id') from error


def plan_push(folder: Path, repo_id: str = '') -> Plan:
    """Check a card folder and list what would be uploaded: card, config, results, weights, the card's figures.

    Every accuracy is recomputed from the outcomes of the images, and the card from the results. The uploaded card names
    `repo_id`, whatever the folder's card names; the default is the user's own repository with the folder's name.

    Raises:
        InputError: If a file is missing, broken or a link, or if card, config, results and weights do not agree.
    """
    if not folder.is_dir():
        raise InputError('no such folder', 'build it with timm-robust card', argument='folder', value=str(folder))
    try:
        return _check_folder(folder, repo_id or own_repo_id(folder))
    except UnicodeDecodeError as error:
        raise InputError('README.md is not text', 'build it again', argument='folder', value=str(folder)) from error
    except InputError as error:
        if error.argument in ('folder', 'repo_id'):
            raise
        raise error.about('folder', str(folder)) from error


def _name(config: Dict[str, Any]) -> str:
    return f"{config['architecture']}.{config['pretrained_cfg'].get('tag')}"


def _refuse_other(api: HfApi, plan: Plan, revision: Optional[str]) -> bool:
    """Whether the repository exists; refuses one that holds another model."""
    try:
        info = api.model_info(plan.repo_id, revision=revision)
    except RevisionNotFoundError:
        return _refuse_other(api, plan, None)  # a new branch starts from main
    except RepositoryNotFoundError:
        return False
    if {f.rfilename for f in info.siblings or []} <= {'.gitattributes'}:
        return True
    try:
        theirs = _name(read_json(api.hf_hub_download(plan.repo_id, 'config.json', revision=revision)))
    except (EntryNotFoundError, InputError, KeyError, TypeError, AttributeError):
        theirs = 'no model of this package'
    if theirs != plan.name:
        raise InputError(f'holds {theirs}, not {plan.name}', 'choose another name', argument='repo_id',
                         value=plan.repo_id)
    return True


@dataclass
class _Progress:
    """What is known to have happened on the Hub.

    Attributes:
        made: What was created before the commit.
        asked: The last request, if it has no answer yet.
    """
    made: List[str] = field(default_factory=list)
    asked: str = ''

    def state(self, refused: bool) -> str:
        """What is certain about the Hub; `refused` says that it refused the last request."""
        found = [f"nothing was committed, but {' and '.join(self.made)}"] if self.made else []
        if self.asked and not refused:
            found = [*found[:self.asked != _COMMIT], f'it is not known whether {self.asked}']
        return ', '.join(found) or 'nothing on the Hub was changed'


def _explain(error: Exception, plan: Plan, progress: _Progress) -> InputError:
    cause: Optional[BaseException] = error
    while cause is not None and getattr(cause, 'response', None) is None:
        cause = cause.__cause__
    response = getattr(cause, 'response', None)
    status = response.status_code if response is not None else None
    reasons = {
        401: 'the token is missing or not valid: log in with `hf auth login` or set HF_TOKEN',
        403: 'the token may not write there: use one with write access, or another repository',
        404: 'no such repository or branch',
        429: 'too many requests: wait and repeat the command',
    }
    why = reasons.get(status or 0) or (
        f'the Hub answered {status}' if status else f'the Hub did not answer ({type(error).__name__})')
    state = progress.state(refused=status is not None and status < 500)
    return InputError(f'{why}; {state}', 'repeat the command: it keeps what is already there',
                      argument='repo_id', value=plan.repo_id)


def push(
        plan: Plan,
        *,
        private: bool = True,
        revision: Optional[str] = None,
        create_pr: bool = False,
) -> str:
    """Upload a card folder as one commit, with the token from the environment or `hf auth login`.

    Files are uploaded first and become visible only with the commit, so an interrupted upload can be repeated.

    Args:
        plan: Returned by `plan_push`.
        private: Create the repository as private; an existing one is not changed.
        revision: Branch, created if missing; main by default.
        create_pr: Open a pull request instead.

    Returns:
        Address of the commit or the pull request.

    Raises:
        InputError: If the repository holds another model, or the Hub refuses or does not answer; the message says
            what is known about the resulting state.
    """
    api, progress = HfApi(library_name='timm_robust'), _Progress()
    try:
        if not _refuse_other(api, plan, revision):
            progress.asked = 'the repository was created'
            api.create_repo(plan.repo_id, private=private, exist_ok=True)
            progress.made.append('the empty repository was created')
        if revision and not create_pr:
            progress.asked = f'the branch {revision} was created'
            api.create_branch(plan.repo_id, branch=revision, exist_ok=True)
            progress.made.append(f'the branch {revision} was created')
        progress.asked = ''
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in plan.files.items()]
        # upload files first, so that any later failure concerns only the commit
        api.preupload_lfs_files(plan.repo_id, operations, revision=revision, create_pr=create_pr)
        progress.asked = _COMMIT
        commit = api.create_commit(
            plan.repo_id, operations, commit_message=plan.message, revision=revision, create_pr=create_pr)
    except InputError:
        raise
    except Exception as error:  # the client's HTTP library and its wrapped errors differ between versions
        raise _explain(error, plan, progress) from error
    return commit.pr_url or commit.commit_url
