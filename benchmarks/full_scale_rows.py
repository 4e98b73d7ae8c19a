"""A row of full_scale.py's table, and what is measured beside the steps."""

import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import torch

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table. resident: blocks of a streamed model; problem: why there are no figures.

    like: the online mode that online_ratio is measured against. The differences are relative, to the online loop:
    the largest of the losses, and that of the gradient of the student's parameters in the first step.
    """

    mode: str
    student: str
    resolution: int
    text_length: int
    batch_size: int
    cap_gib: float | None
    resident: int | None
    like: str
    problem: str | None = None
    step_ms: float = math.nan
    online_ratio: float = math.nan
    rate_part: float = math.nan
    wait_ms: float = math.nan
    peak_gib: float = math.nan
    reserved_gib: float = math.nan
    calculated_gib: float = math.nan
    host_gib: float = math.nan
    pinned_gib: float = math.nan
    loss_difference: float = math.nan
    gradient_difference: float = math.nan
    losses: tuple[float, ...] = ()

    @property
    def place(self) -> tuple[str, int, int, int]:
        """What it was measured on: rows of one place are compared."""
        return self.student, self.resolution, self.text_length, self.batch_size

    def cells(self) -> str:
        """As Markdown."""
        name = self.mode if self.resident is None else f"{self.mode}, {self.resident} resident"
        cap = "-" if self.cap_gib is None else f"{self.cap_gib:.1f}"
        size = f"{self.resolution} | {self.text_length} | {self.batch_size}"
        head = f"| {name} | {self.student.rpartition('/')[2]} | {size} | {cap} |"
        if self.problem is not None:
            return f"{head} {self.problem} | | | | | {_figure(self.calculated_gib, '.1f')} | | | |"
        ratio, wait = _figure(self.online_ratio, ".2f"), _figure(self.wait_ms, ".1f")
        if not math.isnan(self.online_ratio):
            ratio += f" ({self.like})"
        if not math.isnan(self.wait_ms):
            wait += f" ({self.wait_ms / self.step_ms:.1%})"
        figures = [
            _figure(self.step_ms, ".0f"), ratio, _figure(self.rate_part, ".0%"), wait,
            _pair(self.peak_gib, self.reserved_gib, ".2f"),
            _figure(self.calculated_gib, ".1f"),
            _pair(self.host_gib, self.pinned_gib, ".1f"),
            _figure(self.loss_difference, ".1e"), _figure(self.gradient_difference, ".1e"),
        ]  # fmt: skip
        return f"{head} {' | '.join(figures)} |"


def _figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _pair(first: float, second: float, form: str) -> str:
    return "-" if math.isnan(first) else f"{_figure(first, form)} / {_figure(second, form)}"


HEADER = (
    "| mode | student | px | text tokens | batch | cap, GiB | ms per step | online : this (online as) | of the matrix "
    "rate | waiting for data, ms (of the step) | peak of the GPU, GiB, allocated / reserved | calculated, GiB | host, "
    "GiB, resident / pinned weights | difference of losses | of the first gradient |\n" + "|---" * 15 + "|"
)


def machine(device: torch.device, rate: float) -> str:
    """What the figures were measured on, and when: the head of the table."""
    parts = [f"torch {torch.__version__}", datetime.now(UTC).date().isoformat()]
    parts.append(f"{rate / 1e12:.3g} TFLOP/s in products of matrices")
    if device.type != "cuda":
        return ", ".join(["CPU", *parts])
    name = torch.cuda.get_device_name(device)
    parts.append(f"{copy_rate(device) / 1e9:.3g} GB/s from pinned memory")
    return ", ".join([name, f"driver {_driver()}", *parts, f"caps emulated on {name}"])


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else "unknown"


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


def pinned_bytes(model: torch.nn.Module) -> int:
    """Weights of a model that lie in pinned memory of the host, between its steps."""
    tensors = chain(model.parameters(), model.buffers())
    # Those of FSDP2 are distributed tensors.
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in local if tensor.device.type == "cpu" and tensor.is_pinned())


def resident_bytes() -> int:
    """Memory of this process on the host now, pinned memory among it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Relative."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
