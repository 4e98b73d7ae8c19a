"""Writing that survives a kill and a power cut: temporary name, fsync, rename, fsync of the folder.

A name never shows a half-written file. `publish` creates and never replaces, so that of two builders
one wins and the other is told.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _write_temporary(path: Path, data: bytes | memoryview) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _name(error, path, temporary)
        raise
    return temporary


def _name(error: BaseException, path: Path, temporary: Path | None = None) -> None:
    """Have an error say which file: a full disk does not, and a temporary name tells a user nothing."""
    if isinstance(error, OSError) and error.filename in (None, str(temporary)):
        error.filename = str(path)


def sync(path: Path) -> None:
    """Have a file or a folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes | memoryview) -> None:
    """Put `data` under `path`, whole or not at all, replacing what was there."""
    temporary = _write_temporary(path, data)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(path: Path, data: bytes | memoryview) -> bool:
    """Put `data` under `path` if nothing is there; False, and nothing changed, if something is."""
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder against other processes; it is given up when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files that a killed process left in `folder`; the number deleted.

    Only files of processes that are gone are touched: a live writer's name carries its process id.
    """
    removed = 0
    for leftover in folder.rglob(".*.tmp"):
        owner = leftover.name.rsplit(".", 2)[-2].split("-")[0]
        if owner.isdigit() and not is_alive(int(owner)):
            leftover.unlink(missing_ok=True)
            removed += 1
    return removed


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
