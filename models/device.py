"""Where to compute, and without whose remarks."""

import torch

from secondcast.storage_schemas.errors import SettingsError

_SUPPORTED = ("cpu", "cuda")


def usable_device(name: str) -> torch.device:
    """A torch device by name ("auto": a GPU if there is one); SettingsError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in _SUPPORTED:
        # torch knows more (mps, xpu, meta, ...): nothing here was ever checked on them.
        raise SettingsError(
            f"--device {name!r} is not supported: a CPU or a CUDA GPU is needed; take auto, cpu, cuda or cuda:1"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            # Kernels outside of torch launch on the current device, whatever their tensors say.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "") or "no such device"
        raise SettingsError(f"--device {name!r} cannot be used here ({reason}): take auto, cpu or cuda") from error
    return device


def total_bytes(device: torch.device) -> int | None:
    """Memory of a GPU in all, free or not; None for another device."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def quiet_libraries() -> None:
    """Silence the libraries' own bars and remarks: there is one style of progress.

    What they report of a checkpoint is an error here, with or without it: see models/weights/checked_loading.py.
    """
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers, huggingface_hub):
        library.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
