"""Law 3: cached embedding and cached pooled vector, through a freshly loaded backbone, give the stored velocity."""

import pytest
import torch

from models.backbone import FluxBackbone
from models.geometry import recorded_geometry
from models.schedule import DTYPES
from storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache
from trainer.feed import Feed, Request
from trainer.losses import replay

CPU = torch.device("cpu")


@pytest.mark.parametrize("pooled", ["zero", "clip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("teacher", "form", "schedule"),
    [("dev_teacher", "zarr", "pipeline"), ("schnell_teacher", "webdataset", "reference")],
)
def test_replay_of_a_non_square_cache_is_the_recording_bit_for_bit(
    tmp_path, prompt_file, teacher, form, schedule, dtype, pooled, request
):
    folder = request.getfixturevalue(teacher)
    flags = {"pooled": pooled, "dtype": dtype, "format": form, "schedule": schedule, "text_length": 15}
    build_cache(tmp_path / "c", folder, prompt_file, batch_size=3, height=16, width=28, **flags)
    cache = Cache.open(tmp_path / "c")
    backbone = FluxBackbone.load(
        folder, recorded_geometry(cache.manifest.sampling), text_length=15, dtype=DTYPES[dtype], device=CPU
    )
    feed = Feed(cache, cache.indices(), device=CPU)
    for first in (0, 3):
        for k in range(4):
            batch = feed.replay_batch([(position, k) for position in range(first, first + 3)])
            assert bool(batch.pooled_BP.any()) == (pooled == "clip") and batch.pooled_BP.dtype == DTYPES[dtype]
            teacher_BTD = feed.teacher_embeddings(range(first, first + 3))
            with torch.no_grad():
                assert torch.equal(replay(backbone, teacher_BTD, batch), batch.velocity_BSC)


def test_pooled_vectors_read_ahead_are_those_of_each_rows_prompt(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, pooled="clip", steps=1)
    cache = Cache.open(tmp_path / "c")
    feed = Feed(cache, cache.indices(), device=CPU)
    rows = [(4, 0), (1, 0), (4, 0), (2, 0)]
    with feed.prefetch([Request(loss="vision", rows=rows)] * 3) as batches:
        found = [batch.pooled_BP for batch in batches]
    expected = feed.replay_batch(rows).pooled_BP
    assert all(torch.equal(one, expected) for one in found) and len({tuple(row) for row in expected.tolist()}) == 3


def test_other_pooled_vectors_would_not_replay(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, pooled="clip", steps=1, dtype="float32", batch_size=3)
    cache = Cache.open(tmp_path / "c")
    feed = Feed(cache, cache.indices(), device=CPU)
    batch = feed.replay_batch([(0, 0), (1, 0), (2, 0)])
    backbone = FluxBackbone.load(
        dev_teacher, recorded_geometry(cache.manifest.sampling), text_length=12, dtype=torch.float32, device=CPU
    )
    batch.pooled_BP.zero_()
    with torch.no_grad():
        assert not torch.equal(replay(backbone, feed.teacher_embeddings([0, 1, 2]), batch), batch.velocity_BSC)
