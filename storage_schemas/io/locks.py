"""Locks on an object store: one object per shard being written, created by conditional PUT.

The locks of a file system end with their owner. Here a lock outlives a killed builder, so another builder may take it
over: at once if the owner's process is known to be dead, otherwise once the lock is older than LOCK_SECONDS by the
store's clock. A takeover is a conditional PUT on that version of the lock, so that exactly one of several builders
wins. A slow but live builder renews its lock the same way, and gets an error if it is too late.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

from secondcast.storage_schemas.errors import ShardLockedError, StorageError
from secondcast.storage_schemas.io.durable import is_alive, this_machine

LOCKS_FOLDER = "locks"
LOCK_SECONDS = 900.0
"""Age from which a lock that was not renewed counts as left by a dead builder."""
_ROUNDS = 5


class LockStore(Protocol):
    """The operations that locks need from an object store. See ObjectFolder."""

    def publish(self, path: str, data: bytes) -> bool:
        """Create an object; False if it exists."""
        ...

    def exchange(self, path: str, data: bytes, version: dict[str, Any]) -> bool:
        """Replace this version of an object; False if its version has changed."""
        ...

    def read_version(self, path: str) -> tuple[bytes, dict[str, Any], datetime] | None:
        """An object, its version, and when the store received it."""
        ...

    def remove(self, path: str) -> None:
        """Delete an object."""
        ...


@contextmanager
def lock(store: LockStore, name: str) -> Iterator[Callable[[], None]]:
    """Hold the lock on `name`; ShardLockedError if another builder holds it. See Folder.lock."""
    held = _Lock(store, name)
    held.take()
    try:
        yield held.renew
    finally:
        held.release()


class _Lock:
    def __init__(self, store: LockStore, name: str) -> None:
        self._store, self._name = store, name
        self._path = f"{LOCKS_FOLDER}/{name.replace('/', '-')}"
        self._stamp = secrets.token_hex(8)
        self._data = b""
        self._since = 0.0

    def take(self) -> None:
        """Create the lock, or take over an expired one."""
        who = ""
        for _ in range(_ROUNDS):
            data = self._renewed()
            if self._store.publish(self._path, data):
                return
            found = self._store.read_version(self._path)
            if found is None:
                continue
            content, version, taken_at = found
            who, in_force = self._judge(content, taken_at)
            if in_force:
                break
            if self._store.exchange(self._path, data, version):
                return
        raise self._taken(who)

    def renew(self) -> None:
        """Renew the lock if it is old; ShardLockedError if another builder has taken it over."""
        if _now() - self._since < LOCK_SECONDS / 3:
            return
        found = self._store.read_version(self._path)
        if found is None or found[0] != self._data or not self._store.exchange(self._path, self._renewed(), found[1]):
            self._data = b""
            raise self._taken(" that took over because this one was too slow")

    def release(self) -> None:
        """Release the lock, unless it may belong to another builder by now. A failure only costs a wait."""
        if self._data and _now() - self._since < LOCK_SECONDS:
            with contextlib.suppress(StorageError):
                self._store.remove(self._path)

    def _renewed(self) -> bytes:
        # The start of the lock is taken before the store receives it, so it is never too late.
        self._since = _now()
        body = {**_this_process(), "stamp": self._stamp, "renewal": secrets.token_hex(8)}
        self._data = json.dumps(body).encode()
        return self._data

    def _judge(self, content: bytes, taken_at: datetime) -> tuple[str, bool]:
        """A description of the holder of a lock, and whether the lock is in force."""
        try:
            holder = json.loads(content)
            who = f" (process {holder['process']} on {holder['host']})"
            here = all(holder[key] == value for key, value in this_machine().items())
            if here and not is_alive(int(holder["process"])):
                return who, False
        except (ValueError, KeyError, TypeError):
            who = ""
        return who, (self._store_time() - taken_at).total_seconds() < LOCK_SECONDS

    def _store_time(self) -> datetime:
        """Time by the store's clock: the clocks of two machines may be far apart."""
        path = f"{self._path}.clock-{self._stamp}"
        self._store.publish(path, self._stamp.encode())
        found = self._store.read_version(path)
        self._store.remove(path)
        if found is None:
            raise self._taken("")
        return found[2]

    def _taken(self, who: str) -> ShardLockedError:
        return ShardLockedError(
            f"{self._store}/{self._name} is being written by another builder{who}: nothing is lost; stop one of the "
            f"two, or wait {LOCK_SECONDS:.0f} seconds if that one is dead"
        )


def _now() -> float:
    """Seconds of a clock that keeps running while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _this_process() -> dict[str, Any]:
    return {**this_machine(), "process": os.getpid()}
