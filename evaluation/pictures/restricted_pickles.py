"""Forces torch's restricted loader for .pth weights that libraries download."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def restricted_pickles() -> Iterator[None]:
    """Within this context torch.load reads tensors and plain containers only: a pickle cannot run code.

    torch.hub.load_state_dict_from_url uses the unrestricted loader by default, and torchvision and torch-fidelity do
    not change that.
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
