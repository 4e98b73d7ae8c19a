import json
from pathlib import Path

import pytest

from tests.cache_builder.building import build_cache


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    words = [(c, t, s) for c in ("red", "green", "blue") for t in ("dog", "cat", "car") for s in ("left", "right")]
    (folder / "p.txt").write_text("".join(f"a {c} {t} on the {s}\n" for c, t, s in words) + "two dogs 18\n")
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", shard_size=8, batch_size=8)
    return folder / "cache"


@pytest.fixture(scope="session")
def t5_config(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    """The configuration of a small T5 with the teacher's vocabulary, without weights."""
    folder = tmp_path_factory.mktemp("t5")
    teacher = json.loads((dev_teacher / "text_encoder_2/config.json").read_bytes())
    config = teacher | {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
