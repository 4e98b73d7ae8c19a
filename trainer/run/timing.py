"""Where the time of optimizer steps goes, told apart without waiting for the device."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch

Part = Literal["data_wait", "student_forward", "backbone_forward", "loss", "backward", "optimizer"]
"""data_wait: until the batch is on the device, its copy among it. backbone_forward: and the vision loss of what it
predicts; `loss` is that of embeddings, without a backbone. backward: and what checkpointing or streaming computes
again. optimizer: all else of the step, such as clipping, the average and the line in metrics.jsonl."""
PARTS: tuple[Part, ...] = get_args(Part)

# The first steps of a stage allocate, compile, and wait for the first batch.
WARM_STEPS = 2


class Stamps(Protocol):
    """Moments of the work of a device, in the order of `now`."""

    def now(self) -> Any:
        """The moment when all that was asked of the device up to now is done."""
        ...

    def passed(self, stamp: Any) -> bool:
        """Whether a moment is over; does not wait."""
        ...

    def seconds(self, first: Any, second: Any) -> float:
        """From one moment to another; both are over, or are waited for."""
        ...


class HostStamps:
    """A device that is done when the call is, as a CPU."""

    def now(self) -> float:
        """See Stamps."""
        return time.perf_counter()

    def passed(self, stamp: float) -> bool:
        """See Stamps."""
        return True

    def seconds(self, first: float, second: float) -> float:
        """See Stamps."""
        return second - first


class CudaStamps:
    """Events on the stream that is current when `now` is called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        """See Stamps."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, stamp: torch.cuda.Event) -> bool:
        """See Stamps."""
        return bool(stamp.query())

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """See Stamps."""
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """The mean of so many optimizer steps of a stage: seconds of each part that they have, in the order of PARTS."""

    steps: int
    seconds: Mapping[Part, float]

    @property
    def step_seconds(self) -> float:
        """Of a whole step: the parts leave nothing out."""
        return sum(self.seconds.values())


@dataclass
class _Sums:
    steps: int = 0
    seconds: dict[Part, float] = field(default_factory=dict)

    def add(self, seconds: Mapping[Part, float]) -> None:
        self.steps += 1
        for part, value in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value


class StepClock:
    """Divides optimizer steps: what is between two marks belongs to the part that the second one names.

    Of a GPU the times are those of its stream: the wait for data is how long it had nothing to do. They are read when
    they have passed, steps later if need be. The first steps of a stage count only where it has no others. Parts of a
    step that come several times are summed. Validation and checkpoints are no part of a step: beside_seconds.
    """

    def __init__(self, stamps: Stamps, *, host_seconds: Callable[[], float] = time.perf_counter) -> None:
        self._stamps, self._host_seconds = stamps, host_seconds
        self._marks: list[tuple[Part, Any]] = []
        self._began: Any = None
        self._unread: deque[tuple[str, Any, list[tuple[Part, Any]]]] = deque()
        self._first: dict[str, _Sums] = {}
        self._rest: dict[str, _Sums] = {}
        self.beside_seconds = 0.0

    @classmethod
    def of(cls, device: torch.device) -> "StepClock":
        """The clock for work on a device."""
        return cls(CudaStamps(device) if device.type == "cuda" else HostStamps())

    def begin(self) -> None:
        """A step begins."""
        self._began, self._marks = self._stamps.now(), []

    def mark(self, part: Part) -> None:
        """What was done since the last mark, or since the step began, was this."""
        self._marks.append((part, self._stamps.now()))

    def end(self, stage: str) -> None:
        """The step was one of this stage, and ended with the last mark."""
        self._unread.append((stage, self._began, self._marks))
        while self._unread and self._stamps.passed(self._unread[0][2][-1][1]):
            self._read()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Around what is no optimizer step."""
        began = self._host_seconds()
        try:
            yield
        finally:
            self.beside_seconds += self._host_seconds() - began

    def times(self) -> dict[str, StageTimes]:
        """By name of stage, in their order; waits for the device."""
        while self._unread:
            self._read()
        chosen = {stage: self._rest.get(stage, first) for stage, first in self._first.items()}
        return {
            stage: StageTimes(
                steps=sums.steps,
                seconds={part: sums.seconds[part] / sums.steps for part in PARTS if part in sums.seconds},
            )
            for stage, sums in chosen.items()
        }

    def _read(self) -> None:
        stage, last, marks = self._unread.popleft()
        seconds: dict[Part, float] = {}
        for part, stamp in marks:
            seconds[part] = seconds.get(part, 0.0) + self._stamps.seconds(last, stamp)
            last = stamp
        first = self._first.setdefault(stage, _Sums())
        (first if first.steps < WARM_STEPS else self._rest.setdefault(stage, _Sums())).add(seconds)
