import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import AutoImageProcessor

from tests.evaluation.image_metrics.tiny_networks import make_blip, make_clip, make_trocr

PROMPTS = ["a red book and a blue cup", "a blue book", "a sign that says 'open'", "a red cup"]


@pytest.fixture(autouse=True, scope="session")
def _reads_pictures():
    # A stand-in that only raises: with the first versions of transformers 5, [metrics] needs its torchvision for this.
    if type(AutoImageProcessor).__name__ == "DummyObject":
        pytest.skip(f"transformers {transformers.__version__} reads pictures with torchvision alone, which is missing")


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    # This one puts some pictures near their prompts and others opposite.
    return make_clip(tmp_path_factory.mktemp("networks") / "clip", seed=1)


@pytest.fixture(scope="session")
def blip(tmp_path_factory) -> Path:
    return make_blip(tmp_path_factory.mktemp("networks") / "blip")


@pytest.fixture(scope="session")
def trocr(tmp_path_factory) -> Path:
    return make_trocr(tmp_path_factory.mktemp("networks") / "trocr")


def make_pictures(folder: Path, *, seed: int = 0, count: int = 4, index: bool = True, side: int = 20) -> Path:
    """Random pictures, with an index as `secondcast generate` writes it."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        coarse = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(folder / f"{number:06d}.png")
        entry = {"number": number, "prompt": PROMPTS[number % 4], "file": f"{number:06d}.png", "seed": 0}
        lines.append(json.dumps({**entry, "guidance": None}) + "\n")
    if index:
        (folder / "index.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    return make_pictures(tmp_path / "pictures")
