"""Writing that survives a kill and a power cut: temporary name, fsync, rename, fsync of the folder.

A name never shows a half-written file. `publish` creates and never replaces, so that of two builders
one wins and the other is told.
"""

import fcntl
import hashlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

LEFTOVER_SECONDS = 86_400.0
"""A temporary file of another machine that is older belongs to a writer that died there."""


def _write_temporary(path: Path, data: bytes | memoryview) -> Path:
    owner = f"{_machine_token()}-{os.getpid()}"
    temporary = path.with_name(f".{path.name}.{owner}-{secrets.token_hex(4)}.tmp")
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

    Files of live writers stay: a name carries machine and process. Whether a process of another machine, which shares
    the disk, is alive cannot be known: its files go after LEFTOVER_SECONDS.
    """
    removed = 0
    for leftover in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):
            if _is_left_over(leftover):
                leftover.unlink()
                removed += 1
    return removed


def _is_left_over(temporary: Path) -> bool:
    *machine, process, _ = ["", *temporary.name.rsplit(".", 2)[-2].split("-")]
    if not process.isdigit():
        return False
    if machine[-1] in ("", _machine_token()):
        return not is_alive(int(process))
    return time.time() - temporary.stat().st_mtime > LEFTOVER_SECONDS


def this_machine() -> dict[str, str]:
    """Within which process numbers mean the same: containers may share a host name."""
    identity = {"host": socket.gethostname(), "boot": "", "processes": ""}
    with suppress(OSError):
        identity["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity["processes"] = str(Path("/proc/self/ns/pid").readlink())
    return identity


@cache
def _machine_token() -> str:
    return hashlib.blake2b(repr(sorted(this_machine().items())).encode(), digest_size=4).hexdigest()


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
