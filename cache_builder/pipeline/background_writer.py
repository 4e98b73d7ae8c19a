"""Commits shards in a thread, so that encoding, checking and writing do not delay the GPU."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from secondcast.storage_schemas.schema.commits import CommitRecord, Kind
from secondcast.storage_schemas.schema.fields import Arrays
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter, Encode

# Shards in host memory besides the one being sampled: one is being written, one waits.
IN_FLIGHT = 2


class BackgroundWriter:
    """Commits shards in order in a background thread; used as a context manager.

    `rows` and `bytes` count the committed data.
    After an error no later shard is committed; the next call, or the end of the `with`, raises it.
    If the `with` ends with an exception (including Ctrl-C), the shards already submitted are committed first.
    """

    def __init__(self, writer: CacheWriter, *, in_flight: int = IN_FLIGHT, encode: Encode | None = None) -> None:
        """`encode`: see CacheWriter.commit."""
        self._encoding: dict[str, Encode] = {} if encode is None else {"encode": encode}
        self._writer, self._in_flight, self._failed = writer, in_flight, False
        self._pending: deque[Future[CommitRecord | None]] = deque()
        self.rows = self.bytes = 0
        # One thread: with two, a later shard could be committed after an earlier one failed.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="commit")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._executor.shutdown()
        except BaseException:
            # On a second Ctrl-C waiting shards are dropped; the one being written is completed.
            self._executor.shutdown(wait=False, cancel_futures=True)
            raise
        if error is None:
            self.check()

    def commit(
        self,
        kind: Kind,
        shard: ShardRange,
        arrays: Arrays | Callable[[], Arrays],
        *,
        seconds: float,
        provenance: dict[str, Any],
    ) -> None:
        """See CacheWriter.commit; blocks while `in_flight` shards are not yet committed.

        `arrays` may be a function that returns them, which is also called in the background thread.
        """
        self.check()
        while len(self._pending) >= self._in_flight:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._commit, kind, shard, arrays, seconds, provenance))

    def check(self) -> None:
        """Raise the error of a failed commit, if any."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _commit(
        self,
        kind: Kind,
        shard: ShardRange,
        arrays: Arrays | Callable[[], Arrays],
        seconds: float,
        provenance: dict[str, Any],
    ) -> CommitRecord | None:
        if self._failed:
            return None
        try:
            made = arrays() if callable(arrays) else arrays
            record = self._writer.commit(kind, shard, made, seconds=seconds, provenance=provenance, **self._encoding)
        except BaseException:
            self._failed = True
            raise
        self.rows += record.rows
        self.bytes += sum(file.bytes for file in record.files)
        return record
