"""A cache on an object store, through obstore: data first, then the commit record by conditional PUT.

Settings come from where obstore takes them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT,
AWS_ALLOW_HTTP and their like. Requests that fail on the way are tried again by obstore.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from storage_schemas.errors import MissingExtra, ShardTaken, StoreFails

CLAIM_SECONDS = 900.0
"""A claim older than this belongs to a builder that died elsewhere: writing one shard takes far less."""
_CLAIMS_FOLDER = "claims"
_ATTEMPTS = 4


class ObjectFolder:
    """A prefix of a bucket. See Folder."""

    def __init__(self, url: str) -> None:
        """StoreFails for a URL that obstore does not take, MissingExtra without obstore."""
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise MissingExtra(
                f"{url} is on an object store and obstore is not installed: pip install 'understudy[s3]'"
            ) from error
        self._url, self._api, self._error = url.rstrip("/"), obstore, BaseError
        retry: Any = {
            "max_retries": 6,
            "retry_timeout": timedelta(seconds=120),
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=5), "base": 2},
        }
        try:
            self._store = from_url(self._url, retry_config=retry)
        except (BaseError, ValueError) as error:
            raise self._failure("", "be opened", error) from error

    def __str__(self) -> str:
        return self._url

    def entries(self) -> list[str]:
        """See Folder."""
        return sorted({name.split("/")[0] for name in self.names()})

    def read(self, path: str, begin: int = 0, end: int | None = None) -> bytes:
        """See Folder."""
        if end is not None and end <= begin:
            return b""
        for attempt in range(_ATTEMPTS):
            try:
                return self._read_once(path, begin, end)
            except FileNotFoundError:
                raise
            except self._error as error:
                # A connection that breaks within the body is not tried again by obstore.
                if attempt == _ATTEMPTS - 1:
                    raise self._failure(path, "be read", error) from error
                time.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    def _read_once(self, path: str, begin: int, end: int | None) -> bytes:
        if end is not None:
            return bytes(self._api.get_range(self._store, path, start=begin, end=end))
        options: Any = {"range": {"offset": begin}} if begin else None
        return bytes(self._api.get(self._store, path, options=options).bytes())

    def size(self, path: str) -> int | None:
        """See Folder."""
        try:
            return int(self._api.head(self._store, path)["size"])
        except FileNotFoundError:
            return None
        except self._error as error:
            raise self._failure(path, "be looked at", error) from error

    def names(self, under: str = "") -> list[str]:
        """See Folder."""
        try:
            parts = self._api.list(self._store, prefix=under or None)
            found = sorted(str(entry["path"]) for part in parts for entry in part)
        except self._error as error:
            raise self._failure(under, "be listed", error) from error
        return [name for name in found if not name.startswith(f"{_CLAIMS_FOLDER}/")]

    def replace(self, path: str, data: bytes) -> None:
        """See Folder."""
        try:
            self._api.put(self._store, path, data)
        except self._error as error:
            raise self._failure(path, "be written", error) from error

    def publish(self, path: str, data: bytes) -> bool:
        """See Folder. An answer lost on the way makes obstore put twice: what lies there decides."""
        from obstore.exceptions import AlreadyExistsError

        try:
            self._api.put(self._store, path, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return self.read(path) == data
        except self._error as error:
            raise self._failure(path, "be written", error) from error
        return True

    def remove(self, path: str) -> None:
        """See Folder."""
        try:
            self._api.delete(self._store, path)
        except FileNotFoundError:
            return
        except self._error as error:
            raise self._failure(path, "be deleted", error) from error

    @contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """See Folder: an object that says who writes; one of a dead process, or an old one, is taken over."""
        path = f"{_CLAIMS_FOLDER}/{name.replace('/', '-')}"
        claim = {"host": socket.gethostname(), "process": os.getpid(), "stamp": secrets.token_hex(8)}
        data = json.dumps({**claim, "since": time.time()}).encode()
        if not self.publish(path, data):
            self._take_over(path, name)
            if not self.publish(path, data):
                raise self._taken(name)
        try:
            yield
        finally:
            self.remove(path)

    def _take_over(self, path: str, name: str) -> None:
        try:
            found = json.loads(self.read(path))
            alive = found["host"] != socket.gethostname() or _is_alive(int(found["process"]))
            if alive and time.time() - float(found["since"]) < CLAIM_SECONDS:
                raise self._taken(name, f" (process {found['process']} on {found['host']})")
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            pass
        self.remove(path)

    def _taken(self, name: str, who: str = "") -> ShardTaken:
        return ShardTaken(
            f"{self}/{name} is being written by another builder{who}: nothing is lost; stop one of the two, or wait "
            f"{CLAIM_SECONDS:.0f} seconds if that one is dead"
        )

    def sweep(self) -> None:
        """See Folder: an object is whole or not there, so there is nothing to delete."""

    def _failure(self, path: str, what: str, error: Exception) -> StoreFails:
        reason = " ".join(str(error).split())[:300]
        where = f"{self}/{path}" if path else str(self)
        return StoreFails(
            f"{where} cannot {what} ({reason}): check the address, the credentials (AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT) and the network, then give the command again"
        )


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
