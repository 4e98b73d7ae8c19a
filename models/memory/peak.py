"""Peak memory of a stage: resident on the host, and allocated on the GPU."""

import contextlib
import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from secondcast.models.memory.host_memory import host_peak_bytes

_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes; `gpu_bytes` is None on a CPU."""

    host_bytes: int
    gpu_bytes: int | None


def release_memory(device: torch.device) -> None:
    """Free unreferenced memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def begin_peak(device: torch.device) -> None:
    """Reset the peaks at the start of a stage."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_CLEAR_PEAK)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> PeakMemory:
    """The peaks since `begin_peak`; if the system cannot reset the host's peak, it is that of the whole process."""
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return PeakMemory(host_bytes=host_peak_bytes(), gpu_bytes=gpu)


def largest_peaks(peaks: Iterable[Mapping[str, PeakMemory]]) -> dict[str, PeakMemory]:
    """The maximum over several workers, by stage."""
    largest: dict[str, PeakMemory] = {}
    for stage, peak in (pair for worker in peaks for pair in worker.items()):
        known = largest.get(stage, peak)
        gpu_bytes = [value for value in (known.gpu_bytes, peak.gpu_bytes) if value is not None]
        largest[stage] = PeakMemory(
            host_bytes=max(known.host_bytes, peak.host_bytes), gpu_bytes=max(gpu_bytes, default=None)
        )
    return largest
