"""Teachers from the hub: only the parts that are needed, and which commit they are of."""

import re
from collections.abc import Sequence
from pathlib import Path

from secondcast.storage_schemas.errors import TeacherError

_NAMED_REVISION = re.compile(r"([\w.-]+/[\w.-]+)@(.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(source: str) -> tuple[str, str | None]:
    """Name and revision of NAME@REVISION; the name alone where there is none."""
    match = _NAMED_REVISION.fullmatch(source)
    return (match[1], match[2]) if match else (source, None)


def commit_of(path: Path) -> str | None:
    """The commit of a downloaded snapshot, whose folder is named by it."""
    return path.name if _COMMIT.fullmatch(path.name) else None


def download(name: str, patterns: Sequence[str], revision: str | None) -> Path:
    """The folder of a hub repository, with what matches of it; TeacherError says why it could not be had."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TeacherError(
            f"no teacher {name!r}: expected 'pocket', an existing folder, or a hub name such as "
            f"black-forest-labs/FLUX.1-dev; there is no such folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["model_index.json", *patterns]))
    except GatedRepoError as error:
        raise TeacherError(
            f"{name} is gated: accept its licence on its page, then give `hf auth login` and this command again"
        ) from error
    except RepositoryNotFoundError as error:
        raise TeacherError(
            f"no teacher {name!r}: neither a folder here nor a repository of the hub (if it is private or gated, "
            f"give `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise TeacherError(f"{name} has no revision {revision!r}: see its page for branches and commits") from error
    except Exception as error:
        wanted = name if revision is None else f"{name} at revision {revision}"
        raise TeacherError(
            f"{wanted} is no folder here and could not be fetched ({type(error).__name__}): check the name and the "
            f"network, or give a folder"
        ) from error
