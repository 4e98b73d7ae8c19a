"""`--max-gpu-memory` in bytes."""

from typing import Any

from secondcast.models.memory.optional_packages import installed_version
from secondcast.models.memory.options import AUTO, size_bytes
from secondcast.storage_schemas.errors import SettingsError

GIB = 2**30


def named_bytes(max_gpu_memory: str | None) -> float | None:
    """--max-gpu-memory of a plan in bytes; None if it is not given."""
    if max_gpu_memory == AUTO:
        raise SettingsError(
            "--max-gpu-memory is 'auto', but a plan ignores this machine's GPU: name one, or give a size such as 16GiB"
        )
    return None if max_gpu_memory is None else size_bytes(max_gpu_memory)


def free_bytes(max_gpu_memory: str, device: Any) -> float:
    """--max-gpu-memory in bytes: the given size, or the free memory of this GPU."""
    if max_gpu_memory != AUTO:
        return size_bytes(max_gpu_memory)
    if device.type != "cuda":
        raise SettingsError(
            f"--max-gpu-memory auto uses the free GPU memory, but this run is on {device}: give a size such as 16GiB"
        )
    import torch

    return float(torch.cuda.mem_get_info(device)[0])


def installed_quantizers() -> tuple[str, ...]:
    """Kinds of quantized weights that the installed packages support, the most accurate first."""
    return tuple(kind for kind in ("int8", "nf4") if installed_version(kind) is not None)
