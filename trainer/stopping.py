"""Ctrl-C and SIGTERM while a run makes its steps: what it learned is kept, where a step of FLUX may take minutes."""

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun hands on what a terminal has sent to its workers already: within this time it is the same request.
_SAME_REQUEST_SECONDS = 2.0


class Stopping:
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
