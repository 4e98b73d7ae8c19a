"""What a check is run on: versions, and the rates that its figures are compared with."""

import platform
import shutil
import subprocess
import time
from importlib.metadata import version

import torch

from secondcast.check.results import CheckRow, Machine
from secondcast.models.cost.gpu_memory import GpuMemory
from secondcast.models.cost.matrix_rate import matrix_rate
from secondcast.models.device import total_bytes

_COPIED_BYTES, _COPIES = 2**28, 8


def this_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine and its device."""
    on_gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        total_bytes=total_bytes(device),
        driver=_driver() if on_gpu else None,
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
        torch=torch.__version__,
        diffusers=version("diffusers"),
        transformers=version("transformers"),
        threads=torch.get_num_threads(),
        matrix_flops_per_second=matrix_rate(device, dtype),
        copy_bytes_per_second=_copy_rate(device) if on_gpu else None,
    )


def with_memory(row: CheckRow, device: torch.device, planned: GpuMemory | None) -> CheckRow:
    """A row with the peak memory of the GPU since begin_peak beside the plan; on a CPU the row as it is."""
    if device.type != "cuda":
        return row
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return beside_plan(row, peak, reserved, planned)


def beside_plan(row: CheckRow, peak_bytes: int, reserved_bytes: int, planned: GpuMemory | None) -> CheckRow:
    """A row with these peaks, broken if they exceed the plan and its margin: what a plan fits must fit."""
    figures: dict[str, object] = {"peak_bytes": peak_bytes, "reserved_bytes": reserved_bytes}
    if planned is not None:
        # The allocator does not count the memory of CUDA itself.
        figures["planned_bytes"] = planned.total_bytes - planned.cuda_bytes
        if peak_bytes > planned.needed_bytes - planned.cuda_bytes:
            exceeded = "the peak exceeds the plan and its margin"
            figures |= {"result": "broken", "detail": "; ".join(filter(None, (row.detail, exceeded)))}
    return row.model_copy(update=figures)


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return words[0] if words else None


def _copy_rate(device: torch.device) -> float:
    """Bytes per second from pinned host memory to the GPU."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(_COPIES):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return _COPIED_BYTES / min(seconds)
