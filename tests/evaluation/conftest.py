from pathlib import Path

import pytest

from tests.evaluation.recorded import build_recorded, make_student
from tests.trainer.conftest import t5_config

__all__ = ["t5_config"]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    """12 trajectories in float32, 8 of them held out."""
    return build_recorded(tmp_path_factory.mktemp("evaluated") / "cache", dev_teacher)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, recorded: Path, t5_config: Path) -> Path:
    return make_student(tmp_path_factory.mktemp("student") / "s", t5_config, recorded)
