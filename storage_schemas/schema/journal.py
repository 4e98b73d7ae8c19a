"""Replaces the manifest and its files together: a kill leaves the old ones, or a state that any builder can complete.

The new files are written below next/, next/manifest.json last: from then on the replacement is final. Then the index is
removed (the cache is unfinished again), each file is moved in place, manifest.json last, and next/ is deleted. All of
it happens under the lock on the manifest.
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
"""How long to wait for another builder that is changing the manifest or finishing the build."""
_PAUSE_SECONDS = 0.2
_PLAIN = "|".join(map(re.escape, (MANIFEST_FILE, PROMPTS_FILE, OFFSETS_FILE)))
_STAGED = re.compile(rf"{NEXT_FOLDER}/({_PLAIN}|\w+\.zarr/(\w+/)?zarr\.json)")

Confirm = Callable[[], None]


@contextmanager
def locked_manifest(folder: Folder) -> Iterator[Confirm]:
    """Hold the lock for changing the manifest and writing the index, waiting if necessary. See Folder.lock."""
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
    """Whether a complete set of new files is staged that is not yet (fully) in place."""
    return folder.size(NEXT_MANIFEST) is not None


def is_staged(path: str) -> bool:
    """Whether a path is that of a staged file; other files below next/ are not the cache's."""
    return _STAGED.fullmatch(path) is not None


def pending(folder: Folder) -> ExtensionPendingError:
    """The error for reading a cache during a replacement."""
    return ExtensionPendingError(
        f"{folder} is being extended, or an extension of it was interrupted: nothing is lost; rerun the build command "
        f"with --extend (or `secondcast repair {folder}`) to finish it"
    )


def replace_together(folder: Folder, manifest: Manifest, files: dict[str, bytes], renew: Confirm) -> None:
    """Put the manifest and its files in place; `renew` is the function that the lock yielded."""
    for name, data in files.items():
        renew()
        folder.replace(f"{NEXT_FOLDER}/{name}", data)
    renew()
    folder.replace(NEXT_MANIFEST, manifest.encode())
    _put_in_place(folder, renew)


def finish_pending(folder: Folder) -> tuple[str, ...]:
    """Finish an interrupted replacement, or delete incomplete staged files; return the files put in place."""
    if not any(map(is_staged, folder.names(NEXT_FOLDER))):
        return ()
    with locked_manifest(folder) as renew:
        return finish_pending_locked(folder, renew)


def finish_pending_locked(folder: Folder, renew: Confirm) -> tuple[str, ...]:
    """See `finish_pending`; the caller holds the lock."""
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
    """Whether a staged manifest extends the one in place; a superseded one does not."""
    known = live.prompts.segments
    return staged.recording_digest() == live.recording_digest() and staged.prompts.segments[: len(known)] == known


def _staged_files(folder: Folder, staged: Manifest) -> dict[str, bytes]:
    """The staged files, all checked against the staged manifest before any file in place is touched."""
    files = {}
    for name, expected in {PROMPTS_FILE: staged.prompts.xxh3_128, **staged.metadata}.items():
        path = f"{NEXT_FOLDER}/{name}"
        files[name] = folder.read(path) if folder.size(path) is not None else b""
        if (found := xxh3_128(files[name])) != expected:
            raise DamagedCacheError(
                f"{folder}/{path} has checksum {found} ({len(files[name])} bytes), {NEXT_MANIFEST} has {expected}: an "
                f"extension was interrupted and its files were changed or lost; delete {folder}/{NEXT_FOLDER}, run "
                f"`secondcast repair {folder}`, then extend again"
            )
    return files


def _sweep(folder: Folder, renew: Confirm) -> None:
    # The manifest first: without it the other files have no effect.
    for name in sorted(filter(is_staged, folder.names(NEXT_FOLDER)), key=lambda name: name != NEXT_MANIFEST):
        renew()
        folder.remove(name)
    if isinstance(folder, LocalFolder):
        top = folder.path / NEXT_FOLDER
        for path in (*sorted(top.rglob("*"), reverse=True), top):
            with suppress(OSError):
                path.rmdir()
