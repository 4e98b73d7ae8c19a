import os
import warnings

import pytest

from tests.simulated_cuda.device.shim import missing
from tests.simulated_cuda.runner import Runner


@pytest.fixture(scope="session")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Skips where it cannot run, with a warning that names the reason."""
    if why := missing():
        warnings.warn(f"CUDA is not simulated: {why}", stacklevel=1)
        pytest.skip(why)
    folder = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist share the results.
    return Runner((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "simulated-cuda")
