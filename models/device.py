"""Where to compute."""

import torch

from storage_schemas.errors import BadSettings


def usable_device(name: str) -> torch.device:
    """A torch device by name ("auto": a GPU if there is one); BadSettings if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadSettings(f"--device {name!r} cannot be used here ({reason}): take auto, cpu or cuda") from error
    return device
