"""Devices, deterministic kernels, and the verbosity of libraries."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from secondcast.storage_schemas.errors import SettingsError

_SUPPORTED = ("cpu", "cuda")
# Of the fused kernels only FlashAttention has a deterministic backward pass.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
# cuBLAS is deterministic with a workspace of fixed size, which it reads before its first product.
# Source: torch.use_deterministic_algorithms.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def usable_device(name: str) -> torch.device:
    """A torch device by name ("auto": a GPU if available); SettingsError if it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in _SUPPORTED:
        # torch supports more (mps, xpu, meta, ...), but they are not tested here.
        raise SettingsError(f"--device {name!r} is not supported, expected auto, cpu, cuda or, for example, cuda:1")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            # Kernels outside of torch launch on the current device, not on that of their tensors.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        # Without the advice that follows in some versions of torch.
        reason = next(iter(str(error).splitlines()), "").partition(". ")[0] or "no such device"
        raise SettingsError(f"--device {name!r} cannot be used here ({reason}): use auto, cpu or cuda") from error
    return device


def total_bytes(device: torch.device) -> int | None:
    """Total memory of a GPU; None for another device."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU ran out of memory, in torch's allocator or in a CUDA library."""
    names = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return type(error).__name__ == "OutOfMemoryError" or any(name in str(error) for name in names)


def fix_cublas_workspace() -> None:
    """Give cuBLAS the workspace with which it is deterministic; too late behind the first product of this process."""
    os.environ.setdefault(*_WORKSPACE)


@contextmanager
def deterministic_algorithms(enabled: bool = True) -> Iterator[None]:
    """A context in which torch and its attention use deterministic kernels only, in all threads; a CPU does anyway.

    enabled: False changes nothing.

    An operation without such a kernel raises RuntimeError.
    """
    if not enabled:
        yield
        return
    fix_cublas_workspace()
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        with sdpa_kernel(_KERNELS):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of libraries.

    Their warnings about checkpoints are errors here anyway: see models/weights/checked_loading.py.
    """
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers, huggingface_hub):
        library.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def launched_device(name: str, local_number: int | None) -> torch.device:
    """The device of one of several launched processes, by its local rank (None: not launched)."""
    if name in ("auto", "cuda") and local_number is not None and torch.cuda.is_available():
        # Chosen directly: probing the first GPU would take memory on it for each process of the node.
        name = f"cuda:{local_number % torch.cuda.device_count()}"
    quiet_libraries()
    return usable_device(name)
