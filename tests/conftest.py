import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.models.families.random_teacher import make_teacher
from tests.storage_schemas.io.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]

# Slow machines draw slowly: that is no fault of a test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Tests run side by side. `make test-cpus` asks for several threads.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_garbage_among_modules():
    # Each build collects garbage between its stages: walking a million objects of torch and diffusers took two thirds
    # of the time of a small one.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache_home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SECONDCAST_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


@pytest.fixture(scope="session")
def dev_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / "dev-like")


@pytest.fixture(scope="session")
def schnell_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / "schnell-like", seed=1, guidance=False)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "animals.txt"
    file.write_text(
        "".join(f"a red {thing} on the {side}\n" for thing in ("dog", "cat", "car") for side in ("left", "right"))
    )
    return file


@pytest.fixture(scope="session")
def shared_prompts() -> Path:
    folder = SHARED / "prompts"
    if not folder.is_dir():
        pytest.skip("the prompt sets used while developing are not here")
    return folder
