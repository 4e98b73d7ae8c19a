"""A row of full_scale.py's table, and what its figures are measured against."""

import math
import time
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table. resident: blocks of a streamed model; problem: why there are no figures."""

    mode: str
    resolution: int
    text_length: int
    batch_size: int
    cap_gib: float | None
    resident: int | None
    problem: str | None = None
    step_ms: float = math.nan
    wait_ms: float = math.nan
    peak_gib: float = math.nan
    host_gib: float = math.nan
    rate_part: float = math.nan
    online_ratio: float = math.nan
    loss_difference: float = math.nan
    losses: tuple[float, ...] = ()

    def cells(self) -> str:
        """As Markdown."""
        name = self.mode if self.resident is None else f"{self.mode}, {self.resident} resident"
        cap = "-" if self.cap_gib is None else f"{self.cap_gib:.1f}"
        head = f"| {name} | {self.resolution} | {self.text_length} | {self.batch_size} | {cap} |"
        if self.problem is not None:
            return f"{head} {self.problem} | | | | | | |"
        figures = (
            (self.step_ms, ".0f"), (self.wait_ms, ".1f"), (self.online_ratio, ".2f"), (self.rate_part, ".0%"),
            (self.peak_gib, ".2f"), (self.host_gib, ".1f"), (self.loss_difference, ".1e"),
        )  # fmt: skip
        return f"{head} {' | '.join('-' if math.isnan(value) else format(value, form) for value, form in figures)} |"


HEADER = (
    "| mode | px | text tokens | batch | cap, GiB | ms per step | waiting for data, ms | online : this | of the "
    "matrix rate | peak of the GPU, GiB | host, GiB | difference of losses |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def copy_rate(device: torch.device) -> float:
    """Bytes per second from pinned host memory to the GPU."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return len(source) / min(seconds)


def impose(device: torch.device, cap_gib: float | None) -> None:
    """Let the process have so much of the GPU and no more; None: all of it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        part = 1.0 if cap_gib is None else min(1.0, cap_gib * GIB / total)
        torch.cuda.set_per_process_memory_fraction(part, device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
