"""The most memory that a stage held: of the host (resident) and of the GPU (allocated)."""

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
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def begin_peak(device: torch.device) -> None:
    """Begin a stage: what was held before does not count."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_CLEAR_PEAK)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> PeakMemory:
    """The peaks since `begin_peak`. Where the system cannot begin anew, the host's is that of the whole process."""
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return PeakMemory(host_bytes=host_peak_bytes(), gpu_bytes=gpu)


def largest_peaks(peaks: Iterable[Mapping[str, PeakMemory]]) -> dict[str, PeakMemory]:
    """By stage the largest of several workers."""
    largest: dict[str, PeakMemory] = {}
    for stage, peak in (pair for worker in peaks for pair in worker.items()):
        known = largest.get(stage, peak)
        gpu_bytes = [value for value in (known.gpu_bytes, peak.gpu_bytes) if value is not None]
        largest[stage] = PeakMemory(
            host_bytes=max(known.host_bytes, peak.host_bytes), gpu_bytes=max(gpu_bytes, default=None)
        )
    return largest
