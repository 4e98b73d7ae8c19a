"""Training with modulation vectors of the host: read ahead with the batches, and the student's bits are the same."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.replay_dataset import BatchSpec
from tests.cache_builder.building import build_cache
from tests.trainer.making import make_trainer
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights

FLAGS: dict[str, Any] = {
    "batch_size": 4, "grad_accum_steps": 2, "steps": 4, "dropout": 0.1, "init": "random", "timesteps_per_sample": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip_cache(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "p.txt").write_text("".join(f"a red {c} {s}\n" for c in ("dog", "cat") for s in ("left", "right", "on")))
    flags = {"pooled": "clip", "dtype": "float32", "batch_size": 2, "shard_size": 4, "steps": 3}
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", **flags)
    return folder / "cache"


@pytest.fixture(scope="module")
def live(tmp_path_factory, clip_cache, dev_teacher, t5_config) -> Path:
    run = tmp_path_factory.mktemp("live") / "run"
    return run_training(run, clip_cache, dev_teacher, t5_config, modulation="gpu", **FLAGS)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": 1}, {"gpu_blocks": 0}])
def test_the_students_weights_are_those_of_live_modulation_also_when_it_is_killed(
    tmp_path, clip_cache, dev_teacher, t5_config, live, options
):
    heard = Listening()
    again = partial(run_training, tmp_path / "run", clip_cache, dev_teacher, t5_config, modulation="cpu", **FLAGS)
    if not options:
        with pytest.raises(KeyboardInterrupt):
            again(progress=StopAfter(3))
    again(progress=heard, **options)
    assert same_weights(tmp_path / "run", live)
    assert any(
        line.startswith("modulation vectors are computed on the host, a batch ahead, with ") for line in heard.heard
    )
    assert any(line.startswith("replay error 0 (0.00 %") for line in heard.heard)


def test_batches_read_ahead_bring_their_rows_which_count_in_what_is_read_ahead(
    tmp_path, clip_cache, dev_teacher, t5_config
):
    trainer = make_trainer(tmp_path / "r", clip_cache, dev_teacher, t5_config, modulation="cpu", **FLAGS)
    plain = make_trainer(tmp_path / "p", clip_cache, dev_teacher, t5_config, modulation="gpu", **FLAGS)
    host = trainer.objective.host_modulation
    requests = [request for step in range(4) for request in trainer.plan.requests(step)]
    with trainer.dataset.prefetch(requests) as batches:
        found = list(batches)
    for request, batch in zip(requests, found, strict=True):
        expected = host.rows(batch.timestep_B, batch.guidance_B, batch.conditioning["pooled_projections"])
        assert torch.equal(batch.modulation_BM, expected)
        assert torch.equal(batch.modulation_BM, trainer.dataset.replay_batch(request.rows).modulation_BM)
        added = trainer.dataset._size_bytes(request) - plain.dataset._size_bytes(request)
        assert added == batch.modulation_BM.nbytes == len(request.rows) * host.row_bytes
    assert plain.dataset.replay_batch(requests[0].rows).modulation_BM is None
    # The losses of embeddings replay nothing.
    text = BatchSpec(replays=False, rows=requests[0].rows)
    assert trainer.dataset._size_bytes(text) == plain.dataset._size_bytes(text)


def test_on_a_cpu_auto_keeps_the_weights_live(tmp_path, clip_cache, dev_teacher, t5_config):
    assert Cache.open(clip_cache).manifest.teacher.pooled == "clip"
    trainer = make_trainer(tmp_path / "run", clip_cache, dev_teacher, t5_config, **FLAGS)
    backbone = trainer.objective.backbones[0]
    assert backbone.host_modulation is None and backbone.table is None
