"""Download teachers from the hub: only the required parts, with their commit."""

import re
from collections.abc import Sequence
from pathlib import Path

from secondcast.storage_schemas.errors import TeacherError

_NAMED_REVISION = re.compile(r"([\w.-]+/[\w.-]+)@(.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(source: str) -> tuple[str, str | None]:
    """Name and revision of NAME@REVISION; the revision is None if there is none."""
    match = _NAMED_REVISION.fullmatch(source)
    return (match[1], match[2]) if match else (source, None)


def commit_of(path: Path) -> str | None:
    """The commit of a downloaded snapshot, from the name of its folder."""
    return path.name if _COMMIT.fullmatch(path.name) else None


def download(name: str, patterns: Sequence[str], revision: str | None) -> Path:
    """The local folder of a hub repository with the matching files; TeacherError if the download fails."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TeacherError(
            f"no teacher {name!r}: there is no such folder; give 'pocket', an existing folder, or a hub name such as "
            f"black-forest-labs/FLUX.1-dev"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["model_index.json", *patterns]))
    except GatedRepoError as error:
        raise TeacherError(
            f"{name} is gated: accept its licence on its page, then run `hf auth login` and this command again"
        ) from error
    except RepositoryNotFoundError as error:
        raise TeacherError(
            f"no teacher {name!r}: it is neither a folder nor a hub repository (if it is private or gated, run "
            f"`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise TeacherError(f"{name} has no revision {revision!r}: see its page for branches and commits") from error
    except Exception as error:
        wanted = name if revision is None else f"{name} at revision {revision}"
        raise TeacherError(
            f"{wanted} is not a folder and cannot be downloaded ({type(error).__name__}): check the name and the "
            f"network, or give a folder"
        ) from error
