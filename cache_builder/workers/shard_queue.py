"""Which shards a worker of a pool makes next, and what happens to those that fail."""

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

_TASKS_PER_WORKER = 4
# Two: writing one goes on beside sampling the next, and progress is told by tasks that are through.
_MOST_SHARDS = 2
_TRIES = 2
_FAILURES_IN_A_ROW = 2

Run = tuple[int, ...]


@dataclass(frozen=True)
class GivenUp:
    """A run of shards that failed on every try, and what the last one failed with."""

    run: Run
    error: Exception


class ShardQueue:
    """Shards in runs of a few. A run that fails is tried once more, by whoever is free.

    A worker that fails twice in a row, whatever it was given, gets nothing more: a machine without the teacher's
    weights fails at once, and would use up every run.
    """

    def __init__(self, numbers: Sequence[int], workers: int) -> None:
        size = min(_MOST_SHARDS, max(1, len(numbers) // (_TASKS_PER_WORKER * workers)))
        self._left = deque(tuple(numbers[i : i + size]) for i in range(0, len(numbers), size))
        self._tried: Counter[Run] = Counter()
        self._in_a_row: Counter[Hashable] = Counter()
        self.given_up: list[GivenUp] = []
        self.last_error: Exception | None = None

    def __len__(self) -> int:
        return len(self._left)

    @property
    def unmade(self) -> list[int]:
        """Shards of the runs that were given up, and of those that nobody was left for."""
        return sorted(number for run in (*(one.run for one in self.given_up), *self._left) for number in run)

    def take(self, worker: Hashable) -> Run | None:
        """The next run; None where there is none for this worker."""
        return self._left.popleft() if self._left and not self.is_retired(worker) else None

    def is_retired(self, worker: Hashable) -> bool:
        """Whether a worker gets nothing more."""
        return self._in_a_row[worker] >= _FAILURES_IN_A_ROW

    def made(self, worker: Hashable) -> None:
        """A run is through."""
        self._in_a_row[worker] = 0

    def failed(self, worker: Hashable, run: Run, error: Exception) -> None:
        """A run has failed."""
        self.last_error = error
        self._in_a_row[worker] += 1
        self._tried[run] += 1
        if self._tried[run] < _TRIES:
            self._left.append(run)
        else:
            self.given_up.append(GivenUp(run, error))

    def retire(self, worker: Hashable, error: Exception) -> None:
        """A worker could not be started."""
        self.last_error = error
        self._in_a_row[worker] = _FAILURES_IN_A_ROW
