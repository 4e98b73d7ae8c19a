"""The text stage and the sample stage, on one machine or on several: per-prompt work once per prompt."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.cache_builder import teacher_models, waiting
from secondcast.cache_builder.waiting import needed_embeddings, wait_for_embeddings
from secondcast.cache_builder.worker import Worker, WorkerConfig
from secondcast.models.memory.peak import begin_peak, peak_memory
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.segments import added_segments
from secondcast.storage_schemas.writer import CacheWriter
from tests.cache_builder.building import build_cache, data_files
from tests.storage_schemas.caches import some_manifest, some_prompts


def share(**values) -> WorkerConfig:
    return WorkerConfig(batch_size=2, **values)


@pytest.fixture
def encoded_rows(monkeypatch) -> list[int]:
    rows: list[int] = []
    encode = TeacherTextEncoder.encode

    def counting(self, token_ids_BT, *others):
        rows.append(len(token_ids_BT))
        return encode(self, token_ids_BT, *others)

    monkeypatch.setattr(TeacherTextEncoder, "encode", counting)
    return rows


@pytest.mark.thorough
def test_the_text_encoder_runs_once_per_prompt_and_in_batches(tmp_path, dev_teacher, prompt_file, encoded_rows):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, samples_per_prompt=3)
    assert encoded_rows == [2, 1, 2, 1]
    build_cache(tmp_path / "c", dev_teacher, prompt_file, samples_per_prompt=3)
    assert sum(encoded_rows) == 6


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_the_stages_one_by_one_give_the_bytes_of_both_at_once(tmp_path, dev_teacher, prompt_file, form, encoded_rows):
    text = build_cache(tmp_path / "c", dev_teacher, prompt_file, config=share(stage="text"), format=form)
    assert (text.embeddings, text.trajectories, text.finished, set(text.peaks)) == (6, 0, False, {"text"})
    sampled = build_cache(tmp_path / "c", dev_teacher, prompt_file, config=share(stage="sample"), format=form)
    assert (sampled.trajectories, sampled.finished, set(sampled.peaks)) == (6, True, {"sample"})
    assert sum(encoded_rows) == 6
    build_cache(tmp_path / "whole", dev_teacher, prompt_file, format=form)
    assert data_files(tmp_path / "c") == data_files(tmp_path / "whole")


def test_sampling_asks_for_a_text_stage_that_is_not_finished(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, config=share(stage="text", worker=Worker(number=0, count=2)))
    with pytest.raises(NotInCacheError) as caught:
        build_cache(tmp_path / "c", dev_teacher, prompt_file, config=share(stage="sample"))
    assert str(caught.value) == (
        f"{tmp_path}/c lacks 1 of the 2 embedding shards that this stage samples from: give the command with --stage "
        f"text first (or --stage all), or --embeddings-timeout SECONDS where another machine is making them"
    )


def test_a_worker_that_waits_in_vain_names_those_who_should_have_come(tmp_path, dev_teacher, prompt_file, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)
    with pytest.raises(NotInCacheError) as caught:
        build_cache(
            tmp_path / "c",
            dev_teacher,
            prompt_file,
            config=share(worker=Worker(number=0, count=2), wait_seconds=0.05),
            shard_size=2,
            samples_per_prompt=2,
        )
    assert str(caught.value) == (
        f"{tmp_path}/c lacks 1 of the 3 embedding shards that this stage samples from after 0 seconds without a new "
        f"one: they are made by --worker 1/2; start what is not running, or give the command with --stage text once, "
        f"then this one again"
    )


@pytest.mark.thorough
def test_a_waiting_worker_goes_on_when_the_last_embedding_is_there(tmp_path, dev_teacher, prompt_file, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)
    first = share(worker=Worker(number=0, count=2), wait_seconds=30)
    said: list[str] = []
    listings = []
    listed = waiting.committed_shards
    monkeypatch.setattr(waiting, "committed_shards", lambda *of: listings.append(of) or listed(*of))

    class Listening(Silent):
        def say(self, message):
            said.append(message)

    results = []

    def wait_and_sample():
        results.append(
            build_cache(
                tmp_path / "c",
                dev_teacher,
                prompt_file,
                config=first,
                shard_size=2,
                samples_per_prompt=2,
                progress=Listening(),
            )
        )

    waiter = threading.Thread(target=wait_and_sample)
    waiter.start()
    while not any("waiting for 1 embedding shard made elsewhere" in message for message in said):
        assert waiter.is_alive()
        time.sleep(0.01)
    for stage in ("text", "sample"):
        # Not both at once: transformers cannot load two models in two threads.
        second = share(worker=Worker(number=1, count=2), stage=stage)
        build_cache(tmp_path / "c", dev_teacher, prompt_file, config=second, shard_size=2, samples_per_prompt=2)
        waiter.join()
    assert results[0].peaks.keys() == {"text", "sample"}
    # One at the beginning and one when the shard is there, not one at each look; the other worker waits for nothing.
    assert len(listings) <= 4
    build_cache(tmp_path / "whole", dev_teacher, prompt_file, shard_size=2, samples_per_prompt=2)
    assert Cache.open(tmp_path / "c").finished
    assert data_files(tmp_path / "c") == data_files(tmp_path / "whole")


@pytest.mark.thorough
def test_nothing_is_waited_for_where_all_is_there(tmp_path, dev_teacher, prompt_file, monkeypatch):
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    monkeypatch.setattr(teacher_models, "load_backbone", lambda *unused: pytest.fail("the transformer was loaded"))
    assert build_cache(tmp_path / "c", dev_teacher, prompt_file).peaks == {}


@pytest.mark.thorough
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any), st.integers(1, 5))
def test_needed_embeddings_are_those_of_the_prompts_of_the_shards(samples_per_prompt, size):
    samples_per_prompt = [bits for bits in samples_per_prompt if bits]
    prompts = some_prompts(len(samples_per_prompt))
    segments = added_segments({}, dict(enumerate(samples_per_prompt)), shard_size=size)
    manifest = some_manifest(prompts)
    changed = manifest.prompts.model_copy(update={"segments": segments, "count": len(prompts)})
    writer = CacheWriter(None, manifest.model_copy(update={"prompts": changed}), prompts)
    layout = Layout(segments)
    for shard in layout.trajectories:
        rows = range(shard.first, shard.first + shard.rows)
        expected = sorted({layout.embedding_place(layout.place(row).prompt)[0] for row in rows})
        found = [needed.shard for needed in needed_embeddings(writer, [shard])]
        assert found == expected


def test_the_peak_of_a_stage_is_that_of_the_stage():
    cpu = torch.device("cpu")
    begin_peak(cpu)
    large = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_memory(cpu).host_bytes > large.numel()
    large_bytes = large.numel()
    del large
    first = peak_memory(cpu)
    begin_peak(cpu)
    assert peak_memory(cpu).host_bytes < first.host_bytes - large_bytes // 2 and first.gpu_bytes is None


def test_waiting_for_nothing_returns(tmp_path):
    prompts = some_prompts(3)
    writer = CacheWriter.create_or_resume(tmp_path / "c", some_manifest(prompts), prompts, {})
    wait_for_embeddings(writer, [], Worker(), wait_seconds=0, progress=Silent())
