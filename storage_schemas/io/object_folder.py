"""A cache on an object store, through obstore: data first, then the commit record by conditional PUT.

obstore reads its settings from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT,
AWS_ALLOW_HTTP and similar variables.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, TypeVar

from secondcast.storage_schemas.errors import MissingExtraError, StorageError
from secondcast.storage_schemas.io.locks import LOCKS_FOLDER, lock

PATIENCE_SECONDS = 120.0
"""How long to retry a request to a store that has answered before."""
FIRST_PATIENCE_SECONDS = 4.0
"""How long to retry a request to a store that never answered, which more likely has a wrong address."""
PART_BYTES = 8 * 2**20
"""Larger objects are read and written in parts of this size: a request must end within its timeout."""
_PARALLEL_PARTS = 4
_ROUNDS = 5
_LAST_PAUSE_SECONDS = 5.0
_REFUSED = re.compile(r"status code: 4(?!08|09|29)\d\d")
_NOT_THE_OBJECT = re.compile("NoSuchBucket|NoSuchUpload")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT",
    "gs": "GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}

T = TypeVar("T")
Version = dict[str, Any]
"""Identifies one version of an object to the store."""


class ObjectFolder:
    """A prefix of a bucket. See Folder. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Raise StorageError for a URL that obstore does not accept, MissingExtraError without obstore."""
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise MissingExtraError(
                f"{url} is on an object store and obstore is not installed: pip install 'secondcast[s3]'"
            ) from error
        self._url, self._api, self._errors = url.rstrip("/"), obstore, exceptions
        self._reached = self._has_conditions = False
        retry: Any = {
            "max_retries": 6,
            "retry_timeout": timedelta(seconds=120),
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=5), "base": 2},
        }
        # Client options given here replace those of the environment, so this one is passed on.
        plain_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        client: Any = {"timeout": timedelta(seconds=120), **({"allow_http": True} if plain_http else {})}
        try:
            self._store = from_url(self._url, retry_config=retry, client_options=client)
        except (exceptions.BaseError, ValueError) as error:
            raise self._failure("", "be opened", error) from error

    def __str__(self) -> str:
        return self._url

    def entries(self) -> list[str]:
        """See Folder."""
        found = self._ask("", "be listed", lambda: self._api.list_with_delimiter(self._store))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted({str(path).rstrip("/") for path in paths} - {LOCKS_FOLDER})

    def read(self, path: str, begin: int = 0, end: int | None = None) -> bytes:
        """See Folder."""
        if end is not None:
            return self._ranges(path, begin, end)
        if begin:
            size = self.size(path)
            if size is None:
                raise FileNotFoundError(f"{self}/{path}")
            return self._ranges(path, begin, size)

        def whole() -> bytes | int:
            answer = self._api.get(self._store, path)
            size = int(answer.meta["size"])
            return size if size > PART_BYTES else bytes(answer.bytes())

        data = self._ask(path, "be read", whole)
        return data if isinstance(data, bytes) else self._ranges(path, 0, data)

    def _ranges(self, path: str, begin: int, end: int) -> bytes:
        begins = range(begin, end, PART_BYTES)
        if len(begins) < 2:
            return self._range(path, begin, end)
        with ThreadPoolExecutor(_PARALLEL_PARTS) as pool:
            return b"".join(pool.map(lambda b: self._range(path, b, min(b + PART_BYTES, end)), begins))

    def _range(self, path: str, begin: int, end: int) -> bytes:
        if end <= begin:
            return b""

        def part() -> bytes:
            try:
                return bytes(self._api.get_range(self._store, path, start=begin, end=end))
            except self._errors.GenericError as error:
                if "status code: 416" in str(error):  # the object ends before `begin`
                    return b""
                raise

        return self._ask(path, "be read", part)

    def size(self, path: str) -> int | None:
        """See Folder."""
        try:
            return int(self._ask(path, "be looked at", lambda: self._api.head(self._store, path))["size"])
        except FileNotFoundError:
            return None

    def names(self, under: str = "") -> list[str]:
        """See Folder."""

        def listed() -> list[str]:
            return [str(entry["path"]) for part in self._api.list(self._store, prefix=under or None) for entry in part]

        found = self._ask(under, "be listed", listed)
        return sorted(name for name in found if not name.startswith(f"{LOCKS_FOLDER}/"))

    def replace(self, path: str, data: bytes) -> None:
        """See Folder. Large objects are uploaded in parts, and exist only once all parts are uploaded."""

        def put() -> None:
            self._api.put(self._store, path, data, chunk_size=PART_BYTES, max_concurrency=_PARALLEL_PARTS)

        self._ask(path, "be written", put)

    def publish(self, path: str, data: bytes) -> bool:
        """See Folder. If the store's answer was lost, the content of the object decides."""
        for _ in range(_ROUNDS):
            try:
                return self._put_if(path, data, "create")
            except self._errors.AlreadyExistsError:
                # Refused with no object: the store answers a concurrent PUT so (409), or it was just deleted.
                with contextlib.suppress(FileNotFoundError):
                    return self.read(path) == data
        return False

    def exchange(self, path: str, data: bytes, version: Version) -> bool:
        """Write `data` to `path` if the object still has this version; otherwise change nothing and return False."""
        try:
            return self._put_if(path, data, version)
        except (self._errors.PreconditionError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                return self.read(path) == data
        return False

    def _put_if(self, path: str, data: bytes, mode: Any) -> bool:
        # A multipart upload would drop the condition.
        self._ask(path, "be written", lambda: self._api.put(self._store, path, data, mode=mode, use_multipart=False))
        return True

    def read_version(self, path: str) -> tuple[bytes, Version, datetime] | None:
        """An object, its version, and when the store received it; None if it does not exist."""

        def look() -> tuple[bytes, Version, datetime]:
            answer = self._api.get(self._store, path)
            version = {key: answer.meta[key] for key in ("e_tag", "version") if answer.meta[key] is not None}
            return bytes(answer.bytes()), version, answer.meta["last_modified"]

        try:
            return self._ask(path, "be read", look)
        except FileNotFoundError:
            return None

    def remove(self, path: str) -> None:
        """See Folder."""
        try:
            self._ask(path, "be deleted", lambda: self._api.delete(self._store, path))
        except FileNotFoundError:
            return

    @contextmanager
    def lock(self, name: str) -> Iterator[Callable[[], None]]:
        """See Folder: the lock is an object that names its owner. StorageError for a store without conditional PUT."""
        self._require_conditions()
        with lock(self, name) as renew:
            yield renew

    def _require_conditions(self) -> None:
        if self._has_conditions:
            return
        path = f"{LOCKS_FOLDER}/.probe-{secrets.token_hex(8)}"
        refuses = self.publish(path, b"first") and not self.publish(path, b"second")
        self.remove(path)
        if not refuses:
            raise StorageError(
                f"{self} cannot be built on: the store accepts a PUT with If-None-Match: * over an existing object, so "
                f"two builders would damage each other's shards; build into a local folder and copy it there"
            )
        self._has_conditions = True

    def sweep(self) -> None:
        """See Folder: objects are written atomically, so there is nothing to delete."""

    def _ask(self, path: str, what: str, request: Callable[[], T]) -> T:
        """Retry a request until the store answers. obstore itself retries neither conditional PUTs nor broken bodies.

        FileNotFoundError and failed conditions are answers; StorageError for anything that a retry cannot fix.
        """
        begun, pause = time.monotonic(), 0.05
        while True:
            try:
                answer = request()
            except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
                raise
            except (FileNotFoundError, self._errors.BaseError) as error:
                if isinstance(error, FileNotFoundError) and not _NOT_THE_OBJECT.search(str(error)):
                    self._reached = True
                    raise
                patience = PATIENCE_SECONDS if self._reached else FIRST_PATIENCE_SECONDS
                if self._is_final(error) or time.monotonic() - begun > patience:
                    raise self._failure(path, what, error) from error
                time.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_SECONDS)
            else:
                self._reached = True
                return answer

    def _is_final(self, error: Exception) -> bool:
        if "NoSuchUpload" in str(error):  # the answer that completes a multipart upload was lost: upload again
            return False
        if isinstance(error, (self._errors.GenericError, self._errors.JoinError)):
            return _REFUSED.search(str(error)) is not None
        return True

    def _failure(self, path: str, what: str, error: Exception) -> StorageError:
        where = f"{self}/{path}" if path else str(self)
        settings = _CREDENTIALS[self._url.split(":")[0]]
        return StorageError(
            f"{where} cannot {what} ({_reason(error)}): check the address, the credentials ({settings}) and the "
            f"network, then rerun the command"
        )


def _reason(error: Exception) -> str:
    """The store's own error message where there is one, else the first part of obstore's."""
    text = " ".join(str(error).split("Debug source")[0].split())
    answer = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text)
    if answer:
        return f"{answer[1]}: {answer[2].rstrip('.')}"
    return re.sub(r" in [\d.]+.?s(, after .*? retries, .*?)?(?= - )", "", text)[:300]
