"""A thread-safe cache of decoded values."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


POOL_BYTES = 2 * 2**30
"""Bytes of decoded trajectories that a run keeps."""
AHEAD_PART = 16
"""Prefetched batches use at most this fraction of them, so that pinned memory stays small."""


class LRUCache(Generic[Key, Value]):
    """The most recently used values, up to a number of bytes (one value is always kept).

    If several threads request the same value, one reads it and the others wait for its value or error.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self.held_bytes = limit_bytes, 0
        self._lock = Lock()
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._reading: dict[Key, Future[Value]] = {}

    def get(self, key: Key, read: Callable[[Key], tuple[Value, int]]) -> Value:
        """The value of a key; on a miss `read` returns it with its size in bytes. Raises what `read` raises."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            reading = self._reading.get(key)
            if reading is None:
                mine = self._reading[key] = Future[Value]()
        if reading is not None:
            return reading.result()
        try:
            value, size_bytes = read(key)
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._reading[key]
            while self._values and self.held_bytes + size_bytes > self._limit_bytes:
                self.held_bytes -= self._values.popitem(last=False)[1][1]
            self._values[key] = (value, size_bytes)
            self.held_bytes += size_bytes
        mine.set_result(value)
        return value
