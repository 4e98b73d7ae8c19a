"""What interrupts the steps of a run, or keeps what it learned between them, where a step of FLUX may take minutes."""

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from secondcast.trainer.distributed.processes import Distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun hands on what a terminal has sent to its workers already: within this time it is the same request.
_SAME_REQUEST_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class StopRequest:
    """Of a process behind a step: to stop, and to keep a checkpoint."""

    stop: bool = False
    keep: bool = False


class SignalHandler:
    """Whether this process was asked to stop after the step in hand."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        """By a signal, since listening."""
        return self._asked_at is not None

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Around the steps: the first signal asks, a later one interrupts at once.

        Signals that this process ignores, or that are not ours to hear (in another thread), stay as they are.
        """
        self._asked_at = None

        def hear(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._asked_at is None:
                self._asked_at = now
                # Not from here: what shows it may hold a lock that it would wait for.
                _thread.start_new_thread(
                    say, ("stopping after this step, with a checkpoint; once more: at once, without one",)
                )
            elif now - self._asked_at > _SAME_REQUEST_SECONDS:
                raise KeyboardInterrupt

        ours = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in SIGNALS if ours}
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                if callable(handler):
                    signal.signal(number, handler)


class CheckpointTimer:
    """When a run stops, or keeps a checkpoint besides those of its settings: behind the same step in all processes.

    minutes: the longest that a run goes on without a checkpoint.
    """

    def __init__(self, processes: Distributed, *, minutes: float) -> None:
        self._processes, self._minutes = processes, minutes
        self._stopping, self._agreed = SignalHandler(), StopRequest()
        self.kept()

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Around the steps; see Stopping."""
        self.kept()
        with self._stopping.listening(say):
            yield

    def kept(self) -> None:
        """A checkpoint was written."""
        self._kept_at = time.monotonic()

    def gathered(self, values: Sequence[float]) -> list[float]:
        """Numbers of all processes, see Processes.gathered; what each process wishes travels with them."""
        own, stride = self._own, len(values) + 2
        told = self._processes.gathered([*values, own.stop, own.keep])
        self._agreed = StopRequest(stop=any(told[stride - 2 :: stride]), keep=any(told[stride - 1 :: stride]))
        return [value for place, value in enumerate(told) if place % stride < len(values)]

    @property
    def wish(self) -> StopRequest:
        """Behind a step; of several processes what they agreed on with its losses."""
        return self._agreed if self._processes.ranks > 1 else self._own

    @property
    def _own(self) -> StopRequest:
        overdue = time.monotonic() - self._kept_at > 60 * self._minutes
        return StopRequest(stop=self._stopping.asked, keep=self._stopping.asked or overdue)
