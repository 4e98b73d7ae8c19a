"""Shards are encoded in a process of its own, to the same bytes; its errors are those of encoding here."""

import numpy as np
import pytest

from secondcast.cache_builder import sample_stage
from secondcast.cache_builder.pipeline.encoding import EncodingProcess
from secondcast.storage_schemas.errors import DerivationMismatchError, NonFiniteError, WorkerFailedError
from secondcast.storage_schemas.writer import CacheWriter
from tests.cache_builder.building import build_cache, data_files
from tests.storage_schemas.caches import some_arrays, some_manifest, some_prompts


@pytest.fixture
def writer(tmp_path) -> CacheWriter:
    prompts = some_prompts(10)
    return CacheWriter.create_or_resume(tmp_path / "c", some_manifest(prompts), prompts, {})


@pytest.mark.thorough
def test_the_files_and_the_errors_are_those_of_encoding_here(writer):
    first, second, *_ = writer.missing("trajectories")
    text = writer.missing("embeddings")[0]
    with EncodingProcess(writer) as process:
        for kind, shard in (("trajectories", first), ("embeddings", text), ("trajectories", second)):
            arrays = some_arrays(writer.manifest, shard, kind)
            assert process.encode(kind, shard, arrays) == writer.encode(kind, shard, arrays)
        broken = some_arrays(writer.manifest, first)
        broken["velocity"][0, 0] = np.nan
        with pytest.raises(NonFiniteError) as there:
            process.encode("trajectories", first, broken)
        with pytest.raises(NonFiniteError) as here:
            writer.encode("trajectories", first, broken)
        assert str(there.value) == str(here.value)
        broken = some_arrays(writer.manifest, first)
        broken["final_latent"][0] = 0
        with pytest.raises(DerivationMismatchError, match="trajectory 0, derived from noise and velocity, differs"):
            process.encode("trajectories", first, broken)
        # After an error it goes on.
        arrays = some_arrays(writer.manifest, first)
        assert process.encode("trajectories", first, arrays) == writer.encode("trajectories", first, arrays)
    assert process._process.returncode == 0


def test_a_process_that_was_killed_is_named(writer):
    shard = writer.missing("trajectories")[0]
    with EncodingProcess(writer) as process:
        process._process.kill()
        with pytest.raises(WorkerFailedError) as caught:
            process.encode("trajectories", shard, some_arrays(writer.manifest, shard))
    assert str(caught.value) == (
        "the process that encodes shards ended with exit code -9 (out of host memory?): committed shards are kept; "
        "rerun "
        "the same command"
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_large_build_encodes_there_and_has_the_same_bytes(tmp_path, dev_teacher, prompt_file, monkeypatch, form):
    build_cache(tmp_path / "here", dev_teacher, prompt_file, format=form, dtype="float32")
    started: list[EncodingProcess] = []

    class Watched(EncodingProcess):
        def __init__(self, writer: CacheWriter) -> None:
            super().__init__(writer)
            started.append(self)

    monkeypatch.setattr(sample_stage, "EncodingProcess", Watched)
    monkeypatch.setattr(sample_stage, "WORTH_BYTES", 1)
    build_cache(tmp_path / "there", dev_teacher, prompt_file, format=form, dtype="float32")
    assert len(started) == 1 and started[0]._process.returncode == 0
    assert data_files(tmp_path / "there") == data_files(tmp_path / "here")
