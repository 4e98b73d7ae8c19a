"""Stop requests and timed checkpoints between the steps of a run; a step of FLUX may take minutes."""

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
# torchrun forwards a signal that the terminal already sent to its workers: within this time it is the same request.
_SAME_REQUEST_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class StopRequest:
    """Whether to stop, and whether to write a checkpoint, after a step."""

    stop: bool = False
    keep: bool = False


class SignalHandler:
    """Records whether a signal requests that this process stops after the current step."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal arrived since `listening` started."""
        return self._asked_at is not None

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """A context around the steps: the first signal requests a stop, a later one interrupts at once.

        Handlers of ignored signals are not changed, nor any handlers outside of the main thread.
        """
        self._asked_at = None

        def hear(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._asked_at is None:
                self._asked_at = now
                # In a thread: the display may hold a lock that this handler would wait for.
                _thread.start_new_thread(
                    say, ("stopping after this step with a checkpoint; interrupt again to stop now without one",)
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
    """Decides when a run stops or writes an extra checkpoint, after the same step in all processes.

    minutes: maximum time between checkpoints.
    """

    def __init__(self, processes: Distributed, *, minutes: float) -> None:
        self._processes, self._minutes = processes, minutes
        self._stopping, self._agreed = SignalHandler(), StopRequest()
        self.kept()

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """A context around the steps; see SignalHandler.listening."""
        self.kept()
        with self._stopping.listening(say):
            yield

    def kept(self) -> None:
        """Reset the timer after a checkpoint."""
        self._kept_at = time.monotonic()

    def gathered(self, values: Sequence[float]) -> list[float]:
        """Values of all processes, see Distributed.gathered; the requests of the processes are gathered with them."""
        own, stride = self._own, len(values) + 2
        gathered = self._processes.gathered([*values, own.stop, own.keep])
        self._agreed = StopRequest(stop=any(gathered[stride - 2 :: stride]), keep=any(gathered[stride - 1 :: stride]))
        return [value for index, value in enumerate(gathered) if index % stride < len(values)]

    @property
    def wish(self) -> StopRequest:
        """The request after a step; of several processes, the one gathered with its losses."""
        return self._agreed if self._processes.ranks > 1 else self._own

    @property
    def _own(self) -> StopRequest:
        overdue = time.monotonic() - self._kept_at > 60 * self._minutes
        return StopRequest(stop=self._stopping.asked, keep=self._stopping.asked or overdue)
