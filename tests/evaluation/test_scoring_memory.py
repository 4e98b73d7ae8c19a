"""Scores do not depend on where the transformer's weights are, in every command that replays a cache."""

import json

import pytest

from secondcast.evaluation.on_cache import evaluate_on_cache
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.models.cost.gpu_memory import CUDA_BYTES, with_margin
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from tests.commands.test_cli import secondcast
from tests.evaluation.recorded import CPU, ROWS, replayed
from tests.evaluation.test_generate import Heard

pytest.importorskip("skimage")
# Whole batches: see docs/small-gpus.md.
FEW = {"num_trajectories": 2 * ROWS, "closed_loop": ROWS, "batch_size": ROWS, "timesteps": (0, 2)}
LIMIT = f"{with_margin(CUDA_BYTES + 8 * 2**20) / 2**20:.3f}MiB"


def scored(student, recorded, teacher, progress=None, **options):
    settings = CacheScoring.from_flags(**FEW, **options)
    return evaluate_on_cache(
        student, Cache.open(recorded), replayed(teacher), settings, device=CPU, progress=progress or Heard()
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options", [{"modulation": "precomputed"}, {"modulation": "cpu"}, {"gpu_blocks": 0}, {"max_gpu_memory": LIMIT}]
)
def test_a_score_is_the_same_in_every_exact_placement(student, recorded, dev_teacher, options):
    plain = scored(student, recorded, dev_teacher, modulation="gpu")
    assert scored(student, recorded, dev_teacher, **options) == plain


@pytest.mark.thorough
def test_a_limit_is_answered_with_the_placement_or_with_what_is_missing(student, recorded, dev_teacher):
    heard = Heard()
    scored(student, recorded, dev_teacher, progress=heard, max_gpu_memory=LIMIT)
    [said] = [line for line in heard.lines if line.startswith("to fit into")]
    assert said.startswith("to fit into 1.6 GiB: --modulation precomputed, 1.0 GiB by calculation (weights ")
    with pytest.raises(SettingsError, match="^nothing fits into 1.6 GiB: a batch of"):
        scored(student, recorded, dev_teacher, max_gpu_memory=f"{with_margin(CUDA_BYTES) / 2**20:.3f}MiB")


@pytest.mark.thorough
def test_compare_and_report_take_the_same_options(student, recorded, dev_teacher, tmp_path, capsys):
    def facts(name: str, *flags: str) -> dict:
        words = ["inspect", "compare", recorded, "--student", student, "--backbone", dev_teacher, "--json",
                 "--batch-size", ROWS, "--out", tmp_path / f"{name}.png", "--device", "cpu", *flags]  # fmt: skip
        code, said, _ = secondcast(*words, capsys=capsys)
        assert code == 0
        return json.loads(said) | {"picture": (tmp_path / f"{name}.png").read_bytes()}

    assert facts("plain", "--modulation", "gpu") == facts("streamed", "--gpu-blocks", "0", "--max-gpu-memory", LIMIT)
    words = ["inspect", "report", recorded, "--student", student, "--backbone", dev_teacher, "--teacher", dev_teacher,
             "--num-strips", "0", "--num-trajectories", "2", "--closed-loop", "1", "--device", "cpu", "--out",
             tmp_path / "r.html", "--max-gpu-memory", LIMIT]  # fmt: skip
    code, _, heard = secondcast(*words, capsys=capsys)
    assert code == 0 and "to fit into 1.6 GiB: --modulation precomputed" in heard
