"""Push an export to a repository of the hub, in one commit, and never over anything but such an export."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from secondcast.models.student.folder import check_is_student
from secondcast.models.student.student import load_student
from secondcast.storage_schemas.errors import HubError, SettingsError, reason
from secondcast.trainer.run.export_facts import FACTS_FILE
from secondcast.trainer.run.model_card import HUB_NAME

# The hub puts it into every new repository.
_IN_EMPTY = frozenset({".gitattributes"})
# Names that exports write: what an earlier push had of these, and this one has not, would be read with it.
_WRITTEN = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "samples.png", "*student_network.py"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push has done.

    url: page of the repository.
    private: whether only its owner sees it.
    changed: whether the repository had other bytes before.
    """

    url: str
    private: bool
    files: int
    changed: bool


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A repository before a push, at a commit."""

    names: Sequence[str]
    private: bool
    commit: str


def check_target(repository: str) -> None:
    """Raise HubError unless this user's token is accepted and may be able to write an export there; uploads nothing.

    repository: OWNER/NAME. SettingsError for another form.
    """
    if HUB_NAME.fullmatch(repository) is None:
        raise SettingsError(f"--push is {repository!r}, expected OWNER/NAME, such as me/my-student")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HubError(
            f"--push {repository} needs a token for the hub, and there is none: run `hf auth login`, or set HF_TOKEN"
        )
    with _explained(repository):
        access = HfApi().whoami().get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise _not_permitted(repository)
        _find(repository)


def push(folder: Path, repository: str, *, public: bool) -> Pushed:
    """Upload the files of an export; a new repository is private unless `public`, others keep their visibility.

    The commit is made after all files are uploaded, so an interrupted push changes nothing, and a repeated one does
    not send large files again that arrived. Files of the repository that no export writes stay.

    public: also make an existing repository public.

    Raises StudentError for a folder without a complete student, SettingsError for one that records no training,
    HubError for a repository that is something else, and for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = _files(folder)
    with _explained(repository, folder):
        api = HfApi()
        if (found := _find(repository)) is None:
            api.create_repo(repository, private=not public)
            found = _find(repository)
        if found is None:
            raise HubError(f"{repository} cannot be seen after it was created: run the same command again")
        stale = [name for name in found.names if name not in files and _is_written(name)]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message="Upload a student by secondcast export",
            # Refused by the hub if somebody else has committed since.
            parent_commit=found.commit,
        )
        if public and found.private:
            api.update_repo_settings(repository, private=False)
        return Pushed(
            url=f"{api.endpoint}/{repository}",
            private=found.private and not public,
            files=len(files),
            changed=commit.oid != found.commit,
        )


def _files(folder: Path) -> dict[str, Path]:
    """The files of an export by name; hidden ones and subfolders are not of it."""
    check_is_student(folder)
    if not (folder / FACTS_FILE).is_file():
        raise SettingsError(
            f"{folder} has no {FACTS_FILE}, by which a later --push recognises the repository, so it is not the export "
            f"of a run: export a run that `secondcast train` wrote"
        )
    load_student(folder)
    return {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")}


def _find(repository: str) -> _Found | None:
    """The repository, None if there is none (or none that this user sees); HubError if it is something else."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repository)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    names = [file.rfilename for file in info.siblings or ()]
    if FACTS_FILE not in names and (others := sorted({*names} - _IN_EMPTY)):
        raise HubError(
            f"{repository} has {others[0]}{f' and {len(others) - 1} more files' if others[1:] else ''} but no "
            f"{FACTS_FILE}, so `secondcast export` did not write it: nothing was uploaded; give an empty or a new "
            f"repository"
        )
    return _Found(names=names, private=bool(info.private), commit=str(info.sha))


def _is_written(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _WRITTEN)


@contextmanager
def _explained(repository: str, folder: Path | None = None) -> Iterator[None]:
    """Turn errors of the hub and the network into HubError.

    folder: the export that is being uploaded; None before.
    """
    again = "the same command again"
    if folder is not None:
        again = f"`secondcast export {folder} --push {repository}` to upload the export, which is complete in {folder}"
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        if (cause := _cause(error)) is None:
            raise
        raise _refused(repository, cause, again) from error


def _refused(repository: str, cause: Any, again: str) -> HubError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, OfflineModeIsEnabled):
        return HubError(f"--push {repository} needs the network, but HF_HUB_OFFLINE is set: unset it")
    if isinstance(cause, GatedRepoError):
        return HubError(f"{repository} is gated: accept its terms on its page, then run {again}")
    if status == 401:
        return HubError(
            f"the hub does not accept the token: run `hf auth login` with a valid one, or set HF_TOKEN, then run "
            f"{again}"
        )
    if status == 403:
        return _not_permitted(repository)
    if status == 404:
        return HubError(f"{repository} is missing, or this token does not see it: check the name, then run {again}")
    if status in (409, 412):
        return HubError(f"{repository} was made or changed by somebody else meanwhile (status {status}): run {again}")
    if isinstance(cause, OSError) and cause.filename is not None:
        return HubError(f"{cause.filename} cannot be read ({reason(cause)}): correct that, then run {again}")
    if status is None:
        return HubError(
            f"{constants.ENDPOINT} cannot be reached ({type(cause).__name__}: {reason(cause)}): check the network, "
            f"then run {again}"
        )
    return HubError(f"the hub refused the upload to {repository} (status {status}: {reason(cause)}): run {again}")


def _not_permitted(repository: str) -> HubError:
    owner = repository.split("/")[0]
    return HubError(
        f"the token may not write to {repository}: give one with write permission for {owner} (`hf auth login`), or "
        f"another repository"
    )


def _cause(error: BaseException) -> Any:
    """The error of the hub or the network that is, or is behind, an error of the upload; None for any other."""
    from huggingface_hub.errors import HTTPError

    link: BaseException | None = error
    while link is not None and not isinstance(link, HTTPError | OSError):
        link = link.__cause__ or link.__context__
    return link
