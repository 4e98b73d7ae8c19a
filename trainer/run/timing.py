"""Times of the parts of optimizer steps, measured without waiting for the device."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch

Part = Literal["data_wait", "student_forward", "backbone_forward", "loss", "backward", "optimizer"]
"""Parts of an optimizer step.

data_wait: waiting for the batch, including its copy to the device.
backbone_forward: the backbone and the vision loss; `loss` is an embedding loss, without a backbone.
backward: includes the recomputation of checkpointed and streamed blocks.
optimizer: the rest of the step, such as clipping, the EMA and the line in metrics.jsonl.
"""
PARTS: tuple[Part, ...] = get_args(Part)

# The first steps of a stage allocate, compile, and wait for the first batch.
WARM_STEPS = 2


class Stamps(Protocol):
    """Timestamps on the timeline of a device, in the order of `now`."""

    def now(self) -> Any:
        """The time when all work queued so far is done."""
        ...

    def passed(self, stamp: Any) -> bool:
        """Whether a timestamp has passed; does not wait."""
        ...

    def seconds(self, first: Any, second: Any) -> float:
        """Seconds between two timestamps; waits until both have passed."""
        ...


class HostStamps:
    """Timestamps of a synchronous device, such as a CPU."""

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
    """CUDA events on the current stream."""

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
    """Mean seconds of each part over `steps` optimizer steps of a stage, in the order of PARTS."""

    steps: int
    seconds: Mapping[Part, float]

    @property
    def step_seconds(self) -> float:
        """Seconds of a whole step, the sum of its parts."""
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
    """Measures the parts of optimizer steps: the time between two marks belongs to the part that the second one names.

    On a GPU these are times of its stream, so data_wait is its idle time; they are read when they have passed, possibly
    steps later. The first steps of a stage only count if it has no others. Repeated parts of a step are summed.
    Validation and checkpoints are not part of a step: see beside_seconds.
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
        """The clock for a device."""
        return cls(CudaStamps(device) if device.type == "cuda" else HostStamps())

    def begin(self) -> None:
        """Start a step."""
        self._began, self._marks = self._stamps.now(), []

    def mark(self, part: Part) -> None:
        """Assign the time since the last mark, or since the start of the step, to a part."""
        self._marks.append((part, self._stamps.now()))

    def end(self, stage: str) -> None:
        """End a step of this stage at the last mark."""
        self._unread.append((stage, self._began, self._marks))
        while self._unread and self._stamps.passed(self._unread[0][2][-1][1]):
            self._read()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A context around work that is not part of an optimizer step."""
        began = self._host_seconds()
        try:
            yield
        finally:
            self.beside_seconds += self._host_seconds() - began

    def times(self) -> dict[str, StageTimes]:
        """Mean times by stage, in order; waits for the device."""
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
