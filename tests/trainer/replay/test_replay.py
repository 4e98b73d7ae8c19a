"""Law 3: cached embedding and cached pooled vector, through a freshly loaded backbone, give the stored velocity."""

from functools import partial

import pytest
import torch

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.replay_dataset import BatchSpec, ReplayDataset, Source
from secondcast.trainer.losses.vision import replay
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.train import train
from tests.cache_builder.building import build_cache

CPU = torch.device("cpu")


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.thorough
@pytest.mark.parametrize("pooled", ["zero", "clip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("teacher", "form", "schedule"),
    [("dev_teacher", "zarr", "diffusers"), ("schnell_teacher", "webdataset", "distillt5")],
)
def test_replay_of_a_non_square_cache_is_the_recording_bit_for_bit(
    tmp_path, prompt_file, teacher, form, schedule, dtype, pooled, request
):
    folder = request.getfixturevalue(teacher)
    flags = {"pooled": pooled, "dtype": dtype, "format": form, "schedule": schedule, "text_length": 15}
    build_cache(tmp_path / "c", folder, prompt_file, batch_size=3, height=16, width=28, **flags)
    cache = Cache.open(tmp_path / "c")
    backbone = Backbone.load(
        folder, recorded_geometry(cache.manifest.sampling), text_length=15, dtype=DTYPES[dtype], device=CPU
    )
    dataset = ReplayDataset([Source(cache=cache, indices=cache.indices())], device=CPU)
    for first in (0, 3):
        for k in range(4):
            batch = dataset.replay_batch([(position, k) for position in range(first, first + 3)])
            assert (
                bool(batch.conditioning["pooled_projections"].any()) == (pooled == "clip")
                and batch.conditioning["pooled_projections"].dtype == DTYPES[dtype]
            )
            teacher_BTD = dataset.teacher_embeddings([(0, prompt) for prompt in range(first, first + 3)])
            with torch.no_grad():
                assert torch.equal(replay(backbone, teacher_BTD, batch), batch.velocity_BSC)


def test_pooled_vectors_read_ahead_are_those_of_each_rows_prompt(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, pooled="clip", steps=1)
    cache = Cache.open(tmp_path / "c")
    dataset = ReplayDataset([Source(cache=cache, indices=cache.indices())], device=CPU)
    rows = [(4, 0), (1, 0), (4, 0), (2, 0)]
    with dataset.prefetch([BatchSpec(replays=True, rows=rows)] * 3) as batches:
        found = [batch.conditioning["pooled_projections"] for batch in batches]
    expected = dataset.replay_batch(rows).conditioning["pooled_projections"]
    assert all(torch.equal(one, expected) for one in found) and len({tuple(row) for row in expected.tolist()}) == 3


def test_other_pooled_vectors_would_not_replay(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, pooled="clip", steps=1, dtype="float32", batch_size=3)
    cache = Cache.open(tmp_path / "c")
    dataset = ReplayDataset([Source(cache=cache, indices=cache.indices())], device=CPU)
    batch = dataset.replay_batch([(0, 0), (1, 0), (2, 0)])
    backbone = Backbone.load(
        dev_teacher, recorded_geometry(cache.manifest.sampling), text_length=12, dtype=torch.float32, device=CPU
    )
    batch.conditioning["pooled_projections"].zero_()
    with torch.no_grad():
        assert not torch.equal(
            replay(backbone, dataset.teacher_embeddings([(0, prompt) for prompt in range(3)]), batch),
            batch.velocity_BSC,
        )


@pytest.mark.thorough
def test_a_student_trains_on_a_schnell_cache_and_its_replay_error_is_zero(
    tmp_path, schnell_teacher, prompt_file, t5_config
):
    build_cache(tmp_path / "c", schnell_teacher, prompt_file, pooled="clip", steps=2, batch_size=4, dtype="float32")
    heard = Heard()
    flags = {"steps": 2, "pretrain_steps": 1, "batch_size": 4, "checkpoint_every": 2}
    settings = TrainFlags.from_flags(student=str(t5_config), **flags).settings()
    teacher = find_teacher(str(schnell_teacher), REPLAY_PARTS)
    cache, source = Cache.open(tmp_path / "c"), str(t5_config)
    train(tmp_path / "r", settings, {"c": cache}, teacher, CPU, heard, student_source=source, ignore_replay_error=False)
    assert any(line.startswith("replay error ") and "(0.00 % of the velocity's norm)" in line for line in heard.lines)
    assert (tmp_path / "r/checkpoint-00000003").is_dir()


def test_the_backend_of_attention_can_be_set_and_set_back(dev_teacher, tmp_path, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, steps=1)
    geometry = recorded_geometry(Cache.open(tmp_path / "c").manifest.sampling)
    load = partial(Backbone.load, dev_teacher, geometry, text_length=12, dtype=torch.float32, device=CPU)
    backbone = load(attention_backend="_native_math")
    processors = [block.attn.processor for block in backbone.transformer.transformer_blocks]
    assert [processor._attention_backend for processor in processors] == ["_native_math"]
    backbone.use_attention(None)
    assert [processor._attention_backend for processor in processors] == [None]
    assert [block.attn.processor._attention_backend for block in load().transformer.transformer_blocks] == [None]
