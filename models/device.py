"""Where to compute, and without whose remarks."""

from pathlib import Path

import torch

from storage_schemas.errors import BadSettings


def usable_device(name: str) -> torch.device:
    """A torch device by name ("auto": a GPU if there is one); BadSettings if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            # Kernels outside of torch launch on the current device, whatever their tensors say.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        # For an unknown name torch lists every backend that was ever registered.
        reason = str(error).splitlines()[0].split("Expected one of ")[0] or "no such device"
        raise BadSettings(f"--device {name!r} cannot be used here ({reason}): take auto, cpu or cuda") from error
    return device


def total_bytes(device: torch.device) -> int | None:
    """Memory of a GPU in all, free or not; None for another device."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def free_host_bytes() -> int | None:
    """Host memory that this process may still take: of the machine, or of its control group; None where none says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        used = next(int(line.split()[1]) for line in lines if line.startswith("anon "))
    # "max" is no number: there is no limit.
    except (OSError, ValueError, StopIteration):
        return free
    return max(0, min(free, limit - used))


def quiet_libraries() -> None:
    """Silence the libraries' own bars and remarks: there is one style of progress."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers, huggingface_hub):
        library.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
