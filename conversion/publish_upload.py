"""Send files to a repository of the Hub in one commit, so that it can be stopped at any moment and run again.

Large files go first, one at a time. The Hub knows what has arrived by its sha256, so another run sends only the rest.
One commit then names them all: before it nothing is visible, after it everything is there.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from .publish_checks import human, is_read_by_name

# Seconds between attempts of what the client itself does not repeat; as many and as long as it waits elsewhere.
WAITS = (1, 2, 4, 8, 8)
PASSING = (408, 429, 500, 502, 503, 504)
CONFLICT = (409, 412)
# Files with which the library changes what it loads: an adapter, another `generate`, other chat templates.
OVERRIDES = re.compile(r"adapter_(config\.json|model\..*)|custom_generate/.*|additional_chat_templates/.*")
# The client's base class of everything that can go wrong between it and a server, whichever library it uses for HTTP.
_HTTP_ERROR = HfHubHTTPError.__mro__[1]


class PublishError(Exception):
    """It cannot be done. The message is one sentence that says what happened and what to do."""


@dataclass(frozen=True)
class LocalFile:
    """A file to publish; `git` is what git calls its content."""

    name: str
    path: Path
    size: int
    sha256: str
    git: str

    @classmethod
    def read(cls, folder: Path, name: str) -> "LocalFile":
        path = folder / name
        size = path.stat().st_size
        digest, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        with open(path, "rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
                git.update(piece)
        return cls(name, path, size, digest.hexdigest(), git.hexdigest())

    def is_same(self, remote: Any) -> bool:
        """Whether an entry of the repository's tree has this content."""
        return remote.lfs.sha256 == self.sha256 if remote.lfs else remote.blob_id == self.git


@dataclass(frozen=True)
class Uploaded:
    """A commit. `removed` went with it, `kept` was in the repository and is no part of it."""

    repository: str
    revision: str
    commit: str
    url: str
    removed: list[str]
    kept: list[str]


def upload(
    api: HfApi,
    files: Mapping[str, LocalFile],
    repo: str,
    *,
    private: bool = False,
    revision: str = constants.DEFAULT_REVISION,
    message: str = "Upload Keye checkpoint",
    say: Callable[[str], None] = print,
) -> Uploaded:
    """Send `files` (by name) to the branch `revision` of `repo`; both are made if they do not exist.

    Raises `PublishError` where the Hub refuses or cannot be reached, when `private` is asked for and the repository is
    public, when it holds an adapter, and when somebody else commits in between.
    """
    repo_id = _open_repository(api, repo, private, say)
    if "README.md" in files:
        # Before gigabytes are sent for a card that the Hub then refuses.
        text = files["README.md"].path.read_text(encoding="utf-8")
        insist("checking the card", repo_id, say, lambda: _check_card(api, text))
    parent = _open_branch(api, repo_id, revision, say)
    remote = insist("listing files", repo_id, say, lambda: _tree(api, repo_id, parent))
    removed, kept = plan_leftovers(remote, files)
    if kept:
        say(f"kept in {repo_id}, not part of this upload: {', '.join(kept)}")
    if removed:
        say(f"removed with this commit, left by an earlier upload: {', '.join(removed)}")
    additions = {name: CommitOperationAdd(name, str(file.path)) for name, file in files.items()}
    weights = [name for name in sorted(files) if name.endswith(".safetensors")]
    for number, name in enumerate(weights, 1):
        if name in remote and files[name].is_same(remote[name]):
            say(f"[{number}/{len(weights)}] {name}: unchanged")
            continue
        say(f"[{number}/{len(weights)}] {name}: {human(files[name].size)}")
        # The client repeats every request of this call itself, and asks first what has already arrived.
        send = partial(api.preupload_lfs_files, repo_id, [additions[name]], revision=revision, free_memory=False)
        insist(f"sending {name}", repo_id, say, send, waits=())
    operations = [*additions.values(), *(CommitOperationDelete(name, is_folder=False) for name in removed)]
    commit = _commit(api, repo_id, revision, parent, operations, files, removed, message, say)
    url = f"{api.endpoint}/{repo_id}/tree/{commit}"
    say(f"commit {commit} on {revision}: {url}")
    return Uploaded(repo_id, revision, commit, url, removed, kept)


def plan_leftovers(remote: Iterable[str], files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files of the repository that are not in the folder: those that go with the commit, and those that stay.

    What loading reads by name goes: an old shard, index, setting or code file would be mixed with the new ones.
    Raises `PublishError` for files with which the library would load something else, an adapter for example.
    """
    others = sorted(set(remote) - set(files))
    if overrides := [name for name in others if OVERRIDES.fullmatch(name)]:
        raise PublishError(
            f"the repository holds {', '.join(overrides)}, with which it would not load this model; remove that "
            "there, or publish to another repository or --revision"
        )
    removed = [name for name in others if is_read_by_name(name)]
    return removed, [name for name in others if name not in removed]


def check_target(repo: str, revision: str) -> None:
    """Refuse what cannot be the name of a repository or of a branch."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PublishError(f"{repo!r} is not the name of a repository, expected NAMESPACE/NAME ({error})") from error
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        raise PublishError(f"--revision {revision} is a commit, which cannot be changed; give the name of a branch")


def _open_repository(api: HfApi, repo: str, private: bool, say: Callable[[str], None]) -> str:
    if not (api.token or get_token()):
        raise PublishError("there is no access token; run `hf auth login`, or set HF_TOKEN to a token that may write")
    user = insist("asking who owns the token", repo, say, api.whoami)["name"]
    repo_id = repo if "/" in repo else f"{user}/{repo}"
    made = insist(
        "creating the repository",
        repo_id,
        say,
        lambda: api.create_repo(repo_id, private=private or None, exist_ok=True),
    )
    info = insist("reading the repository", made.repo_id, say, lambda: api.model_info(made.repo_id))
    if private and not info.private:
        raise PublishError(
            f"{made.repo_id} exists and is public, so --private cannot be kept; make it private in its settings, or "
            "choose another name"
        )
    say(f"{'private' if info.private else 'public'} repository {made.repo_id}, as {user}")
    return made.repo_id


def _check_card(api: HfApi, text: str) -> None:
    """`ModelCard.validate` of older clients asks a fixed host, whatever the endpoint is."""
    place = f"{api.endpoint}/api/validate-yaml"
    response = get_session().post(place, json={"repoType": "model", "content": text})
    if response.status_code == 400:
        errors = [error["message"] for error in response.json().get("errors", ())]
        raise PublishError(f"the Hub refuses the metadata of README.md ({'; '.join(errors)}); correct it")
    hf_raise_for_status(response)


def _open_branch(api: HfApi, repo_id: str, revision: str, say: Callable[[str], None]) -> str:
    """The commit that `revision` points to; the branch is made from the main one if there is none."""
    refs = insist("listing branches", repo_id, say, lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}
    if revision in heads:
        return heads[revision]
    if revision in {ref.name for ref in refs.tags}:
        raise PublishError(f"--revision {revision} is a tag of {repo_id}, which cannot be changed; give a branch")
    if revision.startswith("refs/"):
        raise PublishError(f"{repo_id} has no {revision}; it has {', '.join(sorted(heads))}")
    insist("creating the branch", repo_id, say, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return _head(api, repo_id, revision, say)


def _head(api: HfApi, repo_id: str, revision: str, say: Callable[[str], None]) -> str:
    return insist("reading the branch", repo_id, say, lambda: api.model_info(repo_id, revision=revision)).sha


def _tree(api: HfApi, repo_id: str, revision: str) -> dict[str, Any]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _commit(
    api: HfApi,
    repo_id: str,
    revision: str,
    parent: str,
    operations: list,
    files: Mapping[str, LocalFile],
    removed: list[str],
    message: str,
    say: Callable[[str], None],
) -> str:
    """One commit on top of `parent` and on nothing else; returns its hash.

    The client does not repeat a commit, because an answer can be lost after the work was done. Here the branch tells:
    if it still points to `parent` nothing happened; if it points to exactly these files the commit is ours.
    """
    for wait in (*WAITS, None):
        try:
            return api.create_commit(
                repo_id,
                operations=operations,
                commit_message=message,
                revision=revision,
                parent_commit=parent,
            ).oid
        except Exception as error:
            cause = _cause(error)
            if not (_is_passing(cause) or _status(cause) in CONFLICT):
                raise _explain("committing", repo_id, cause) from error
            head = _head(api, repo_id, revision, say)
            if head != parent:
                tree = insist("listing files", repo_id, say, lambda head=head: _tree(api, repo_id, head))
                complete = all(name in tree and file.is_same(tree[name]) for name, file in files.items())
                if complete and not set(removed) & set(tree):
                    return head
                raise PublishError(
                    f"somebody else changed {revision} of {repo_id} in the meantime (from {parent[:8]} to {head[:8]}), "
                    "so nothing was committed; look at that change and run the same command again, files that have "
                    "arrived are not sent twice"
                ) from error
            if wait is None or _status(cause) in CONFLICT:
                raise _explain("committing", repo_id, cause) from error
            say(f"committing: {_reason(cause)}; again in {wait} s")
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def insist(
    what: str, repo_id: str, say: Callable[[str], None], call: Callable[[], Any], waits: Sequence[int] = WAITS
) -> Any:
    """Call, again after errors that pass; raises `PublishError`."""
    for wait in (*waits, None):
        try:
            return call()
        except Exception as error:
            cause = _cause(error)
            if wait is None or not _is_passing(cause):
                raise _explain(what, repo_id, cause) from error
            say(f"{what}: {_reason(cause)}; again in {wait} s")
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def _cause(error: Exception) -> Exception:
    """The error of the connection or of the Hub that the client wrapped."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _is_passing(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return _status(error) in PASSING
    return isinstance(error, _HTTP_ERROR)


def _reason(error: Exception) -> str:
    status = _status(error)
    said = getattr(error, "server_message", None) or str(error)
    said = " ".join(said.split()) or type(error).__name__
    return f"the Hub answered {status} ({said})" if status else f"the connection failed ({said})"


def _explain(what: str, repo_id: str, error: Exception) -> PublishError:
    """One sentence for whatever stopped an upload."""
    status = _status(error)
    if isinstance(error, PublishError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return PublishError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return PublishError(
            f"{what}: the Hub does not accept the token ({_reason(error)}); make a new one that may write, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return PublishError(
            f"{what}: the token may not do this in {repo_id} ({_reason(error)}); use a token with write permission for "
            "that namespace, or a repository name in a namespace of yours"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return PublishError(
            f"{what}: the Hub does not find {repo_id} or does not show it to this token ({_reason(error)}); check the "
            "name and the token"
        )
    if _is_passing(error):
        return PublishError(
            f"{what}: {_reason(error)}, also after waiting; run the same command again later, files that "
            "have arrived are not sent twice"
        )
    if isinstance(error, (HfHubHTTPError, ValueError, OSError, RuntimeError)):
        return PublishError(f"{what} failed: {' '.join(str(error).split())}")
    raise error
