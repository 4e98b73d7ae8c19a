"""Replace the manifest and the files it vouches for together: a kill leaves the old ones, or what any builder finishes.

The new files are written below next/, next/manifest.json last: the point of no return. Then the index is removed (the
cache is unfinished again), each file is put in its place, manifest.json last, and next/ is deleted. All of it under the
lock on the manifest.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from secondcast.storage_schemas.errors import DamagedCacheError, ExtensionPendingError, ShardLockedError
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Folder, LocalFolder
from secondcast.storage_schemas.schema.commits import COMMITS_FOLDER, INDEX_FILE
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest
from secondcast.storage_schemas.schema.prompts import OFFSETS_FILE, PROMPTS_FILE

NEXT_FOLDER = "next"
NEXT_MANIFEST = f"{NEXT_FOLDER}/{MANIFEST_FILE}"
PATIENCE_SECONDS = 30.0
"""How long to wait for another builder that changes the manifest or ends the build just now."""
_PAUSE_SECONDS = 0.2
_PLAIN = "|".join(map(re.escape, (MANIFEST_FILE, PROMPTS_FILE, OFFSETS_FILE)))
_STAGED = re.compile(rf"{NEXT_FOLDER}/({_PLAIN}|\w+\.zarr/(\w+/)?zarr\.json)")

Confirm = Callable[[], None]


@contextmanager
def locked_manifest(folder: Folder) -> Iterator[Confirm]:
    """Hold the right to change the manifest and to write the index, after a wait if need be. See Folder.lock."""
    end = time.monotonic() + PATIENCE_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                renew = stack.enter_context(folder.lock(MANIFEST_FILE))
                break
            except ShardLockedError:
                if time.monotonic() > end:
                    raise
                time.sleep(_PAUSE_SECONDS)
        yield renew


def is_pending(folder: Folder) -> bool:
    """Whether new files were staged whole and are not, or not all, in their places."""
    return folder.size(NEXT_MANIFEST) is not None


def is_staged(path: str) -> bool:
    """Whether a file is one of those that are staged; what else is below next/ is another's."""
    return _STAGED.fullmatch(path) is not None


def pending(folder: Folder) -> ExtensionPendingError:
    """The error for a cache that is read in between."""
    return ExtensionPendingError(
        f"{folder} is being extended, or an extension of it was interrupted: nothing is lost; give the build command "
        f"with --extend again (or `secondcast repair {folder}`) to finish it"
    )


def replace_together(folder: Folder, manifest: Manifest, files: dict[str, bytes], renew: Confirm) -> None:
    """Put the files that `manifest` vouches for in place, and the manifest; `confirm` is that of the lock held."""
    for name, data in files.items():
        renew()
        folder.replace(f"{NEXT_FOLDER}/{name}", data)
    renew()
    folder.replace(NEXT_MANIFEST, manifest.encode())
    _put_in_place(folder, renew)


def finish_pending(folder: Folder) -> tuple[str, ...]:
    """Finish what was interrupted, or sweep what was not staged whole; the files that were put in place."""
    if not any(map(is_staged, folder.names(NEXT_FOLDER))):
        return ()
    with locked_manifest(folder) as renew:
        return finish_pending_locked(folder, renew)


def finish_pending_locked(folder: Folder, renew: Confirm) -> tuple[str, ...]:
    """See `settle`, for who holds the lock."""
    if is_pending(folder):
        return _put_in_place(folder, renew)
    _sweep(folder, renew)
    return ()


def _put_in_place(folder: Folder, renew: Confirm) -> tuple[str, ...]:
    data = folder.read(NEXT_MANIFEST)
    staged = Manifest.decode(data, f"{folder}/{NEXT_MANIFEST}")
    live = Manifest.decode(folder.read(MANIFEST_FILE), f"{folder}/{MANIFEST_FILE}")
    done: tuple[str, ...] = ()
    if live != staged and _follows(staged, live):
        files = _staged_files(folder, staged)
        renew()
        folder.remove(f"{COMMITS_FOLDER}/{INDEX_FILE}")
        for name, content in (files | {MANIFEST_FILE: data}).items():
            renew()
            folder.replace(name, content)
        done = (*files, MANIFEST_FILE)
    _sweep(folder, renew)
    return done


def _follows(staged: Manifest, live: Manifest) -> bool:
    """Whether a staged manifest extends the one in place; one that was overtaken does not."""
    known = live.prompts.segments
    same = (staged.teacher, staged.sampling) == (live.teacher, live.sampling)
    return same and staged.prompts.segments[: len(known)] == known


def _staged_files(folder: Folder, staged: Manifest) -> dict[str, bytes]:
    """The staged files, all of them as the staged manifest says, before the first one in place is touched."""
    files = {}
    for name, expected in {PROMPTS_FILE: staged.prompts.xxh3_128, **staged.metadata}.items():
        path = f"{NEXT_FOLDER}/{name}"
        files[name] = folder.read(path) if folder.size(path) is not None else b""
        if (found := xxh3_128(files[name])) != expected:
            raise DamagedCacheError(
                f"{folder}/{path} has checksum {found} ({len(files[name])} bytes), {NEXT_MANIFEST} says {expected}: an "
                f"extension was interrupted and its files were changed or lost; delete {folder}/{NEXT_FOLDER}, give "
                f"`secondcast repair {folder}`, then extend again"
            )
    return files


def _sweep(folder: Folder, renew: Confirm) -> None:
    # The manifest first: without it the rest stands for nothing.
    for name in sorted(filter(is_staged, folder.names(NEXT_FOLDER)), key=lambda name: name != NEXT_MANIFEST):
        renew()
        folder.remove(name)
    if isinstance(folder, LocalFolder):
        top = folder.path / NEXT_FOLDER
        for path in (*sorted(top.rglob("*"), reverse=True), top):
            with suppress(OSError):
                path.rmdir()
