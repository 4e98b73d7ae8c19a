"""Weights that libraries fetch as .pth: read by torch's restricted loader, whatever the library asks for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def restricted_pickles() -> Iterator[None]:
    """Within it torch.load, and what calls it, reads tensors and plain containers only: a pickle runs no code.

    torch.hub.load_state_dict_from_url asks for the unrestricted loader by default, and torchvision and torch-fidelity
    leave it at that.
    """
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before
