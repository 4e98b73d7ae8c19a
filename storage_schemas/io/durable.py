"""Writes that survive a kill or a power failure: temporary name, fsync, rename, fsync of the folder.

A final name never refers to a partly written file. `publish` creates and never replaces, so that of two builders
one wins and the other gets False.
"""

import errno
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from secondcast.storage_schemas.errors import StorageError

LEFTOVER_SECONDS = 86_400.0
"""Age from which a temporary file of another machine counts as left by a dead writer."""
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.tmp", re.DOTALL)
# Errors of file systems that lack an operation: exFAT, SMB, 9p and FUSE differ.
_UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EMLINK}


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
    """Name the target file in an error: a full disk names none, and a temporary name means nothing to a user."""
    if isinstance(error, OSError) and error.filename in (None, str(temporary)):
        error.filename = str(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems write folders synchronously and refuse fsync on them.
        if not (error.errno in _UNSUPPORTED and path.is_dir()):
            _name(error, path)
            raise
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically, replacing any existing file."""
    temporary = _write_temporary(path, data)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(path: Path, data: bytes | memoryview) -> bool:
    """Write `data` to `path` atomically if nothing exists there; otherwise change nothing and return False."""
    temporary = _write_temporary(path, data)
    try:
        _link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def _link(temporary: Path, path: Path) -> None:
    """Hard-link a file to a second name; FileExistsError if the name is taken."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # Without hard links no call creates a complete file exclusively. Builders hold the lock of the folder here.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder against other processes; the system releases it when the process ends in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def lock(file: int | IO[str], where: Path, *, wait: bool = True) -> None:
    """Lock an open file or folder until it is closed; StorageError on a file system without locks.

    wait: wait until another process releases the lock; otherwise BlockingIOError if another process holds it.
    """
    try:
        # Windows has no such module: caches are read there, and only writers lock.
        import fcntl
    except ImportError as error:
        raise StorageError(
            f"{where} cannot be locked: this system has no flock (module fcntl), which keeps two processes from "
            f"overwriting each other's files; caches and runs are written on Linux, this system only reads them"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            _name(error, where)
            raise
        raise StorageError(
            f"{where} is on a file system without locks (flock: {error.strerror}): two processes could overwrite each "
            f"other's files; use a folder on another disk, and copy it here when it is finished"
        ) from error


def usual_mode(folder: Path) -> int:
    """The permissions of a file newly created in a folder, according to the umask and the folder.

    safetensors creates files that only their owner can read.
    """
    probe = folder / f".mode.{_machine_token()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files that killed processes left in `folder`; return the number deleted.

    Files of live writers stay: their names carry machine and process. Whether a process of another machine that
    shares the disk is alive is unknown: its files are deleted after LEFTOVER_SECONDS.
    """
    removed = 0
    for leftover in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):
            if leftover.is_file() and _is_left_over(leftover):
                leftover.unlink()
                removed += 1
    return removed


def is_temporary(name: str) -> bool:
    """Whether a file name is a temporary name made by this module."""
    return _TEMPORARY.fullmatch(name) is not None


def _is_left_over(temporary: Path) -> bool:
    found = _TEMPORARY.fullmatch(temporary.name)
    if found is None:
        return False
    machine, process = found.groups()
    if machine == _machine_token():
        return not is_alive(int(process))
    return time.time() - temporary.stat().st_mtime > LEFTOVER_SECONDS


def this_machine() -> dict[str, str]:
    """Identifier of the host and its process namespace: containers may share a host name."""
    identity = {"host": socket.gethostname(), "boot": "", "processes": ""}
    with suppress(OSError):
        identity["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity["processes"] = str(Path("/proc/self/ns/pid").readlink())
    return identity


@cache
def _machine_token() -> str:
    return hashlib.blake2b(repr(sorted(this_machine().items())).encode(), digest_size=4).hexdigest()


def is_alive(process: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
