"""Commit shards in a thread, so that encoding, checking and writing cost the GPU no time."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from secondcast.storage_schemas.schema.commits import CommitRecord, Kind
from secondcast.storage_schemas.schema.fields import Arrays
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter, Encode

# Whole shards in host memory beside the one that is being made: one is written, one waits.
IN_FLIGHT = 2


class BackgroundWriter:
    """Commits shards one after the other, in the order given, beside the caller; used as a context manager.

    `rows` and `bytes` count what it has committed.
    After an error no later shard is committed; the error is raised by the next call, or at the end of the `with`.
    Where the `with` ends by an exception (Ctrl-C too), the shards already handed over are committed first.
    """

    def __init__(self, writer: CacheWriter, *, in_flight: int = IN_FLIGHT, encode: Encode | None = None) -> None:
        """`encode`: see CacheWriter.commit."""
        self._encoding: dict[str, Encode] = {} if encode is None else {"encode": encode}
        self._writer, self._in_flight, self._failed = writer, in_flight, False
        self._pending: deque[Future[CommitRecord | None]] = deque()
        self.rows = self.bytes = 0
        # One thread: of two, one could commit a later shard after the other's had failed.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="commit")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._executor.shutdown()
        except BaseException:
            # A second Ctrl-C: what waits is dropped; what is being written is finished, whole, before the process ends.
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
        """See CacheWriter.commit; waits while `in_flight` shards are not committed yet.

        `arrays` may be a function that gives them, called beside the caller too.
        """
        self.check()
        while len(self._pending) >= self._in_flight:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._commit, kind, shard, arrays, seconds, provenance))

    def check(self) -> None:
        """Raise the error of a commit that failed, if one did."""
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
