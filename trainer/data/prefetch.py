"""Prefetching in threads; values are returned in the order of their tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Value]):
    """A value to compute: `run` computes it (in any thread), `size_bytes` is its size."""

    run: Callable[[], Value]
    size_bytes: int


class Prefetch(Generic[Value]):
    """Iterates over the values of tasks, which `readers` threads run.

    At most `ahead` values, and no more than fit into `ahead_bytes` (but always one), are started before they are
    requested. An error of a task is raised where its value is requested. `close`, or the end of a `with`, drops the
    tasks that are not started and waits for the threads.
    """

    def __init__(self, tasks: Iterable[Task[Value]], *, readers: int, ahead: int, ahead_bytes: int) -> None:
        self._tasks = iter(tasks)
        self._ahead, self._ahead_bytes, self._begun_bytes = ahead, ahead_bytes, 0
        self._begun: deque[tuple[Future[Value], int]] = deque()
        self._executor = ThreadPoolExecutor(readers, thread_name_prefix="prefetch")
        self._next: Task[Value] | None = next(self._tasks, None)

    def __iter__(self) -> Iterator[Value]:
        return self

    def __next__(self) -> Value:
        self._begin()
        if not self._begun:
            raise StopIteration
        value = self._begun[0][0].result()
        self._begun_bytes -= self._begun.popleft()[1]
        self._begin()
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; no thread is left when this returns."""
        self._executor.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        while self._next is not None and self._has_room(self._next.size_bytes):
            self._begun.append((self._executor.submit(self._next.run), self._next.size_bytes))
            self._begun_bytes += self._next.size_bytes
            self._next = next(self._tasks, None)

    def _has_room(self, size_bytes: int) -> bool:
        if not self._begun:
            return True
        return len(self._begun) < self._ahead and self._begun_bytes + size_bytes <= self._ahead_bytes
