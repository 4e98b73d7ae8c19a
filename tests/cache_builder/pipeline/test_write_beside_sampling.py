"""Shards are committed beside sampling: whole, in order, bounded, and a failure stops the build with its own words."""

import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from secondcast.cache_builder.pipeline.background_writer import BackgroundWriter
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter
from tests.cache_builder.building import build_cache, data_files
from tests.storage_schemas.caches import some_arrays, some_manifest, some_prompts, write_cache

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


def empty_cache(path: Path, **changes) -> CacheWriter:
    prompts = some_prompts(20)
    return CacheWriter.create_or_resume(path, some_manifest(prompts, **changes), prompts, {})


def hand_over(background: BackgroundWriter, writer: CacheWriter, shard: ShardRange, *, broken: bool = False) -> None:
    arrays = some_arrays(writer.manifest, shard)
    if broken:
        arrays["velocity"][0, 0] = np.nan
    background.commit("trajectories", shard, arrays, seconds=2.5, provenance={"who": "test"})


def committed(writer: CacheWriter) -> list[int]:
    return [shard for kind, shard in sorted(writer.records()) if kind == "trajectories"]


class Gate:
    """Holds every commit until it is opened."""

    def __init__(self, writer: CacheWriter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self._real = writer.commit
        monkeypatch.setattr(writer, "commit", self._commit)

    def _commit(self, *arguments, **named):
        self.entered.set()
        assert self.opened.wait(5)
        return self._real(*arguments, **named)


def commit_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("commit")]


@BOTH
def test_the_bytes_and_the_records_are_those_of_writing_in_turn(tmp_path, form):
    writer = empty_cache(tmp_path / "beside", format=form)
    with BackgroundWriter(writer) as background:
        for kind in ("embeddings", "trajectories"):
            for shard in writer.missing(kind):
                arrays = some_arrays(writer.manifest, shard, kind)
                background.commit(kind, shard, arrays, seconds=2.5, provenance={"who": "test"})
    assert writer.finish()
    write_cache(tmp_path / "in-turn", count=20, format=form)
    assert data_files(tmp_path / "beside") == data_files(tmp_path / "in-turn")
    assert {(r.seconds, r.provenance["who"]) for r in writer.records().values()} == {(2.5, "test")}
    assert commit_threads() == []


def test_the_maker_of_shards_goes_on_while_one_is_written_and_waits_at_two(tmp_path, monkeypatch):
    writer = empty_cache(tmp_path / "c")
    gate = Gate(writer, monkeypatch)
    handed: list[int] = []

    def make() -> None:
        with BackgroundWriter(writer, in_flight=2) as background:
            for shard in writer.missing("trajectories"):
                hand_over(background, writer, shard)
                handed.append(shard.shard)

    maker = threading.Thread(target=make)
    maker.start()
    assert gate.entered.wait(5)
    maker.join(0.1)
    assert handed == [0, 1] and committed(writer) == []
    gate.opened.set()
    maker.join()
    assert committed(writer) == [0, 1, 2, 3, 4]


def test_after_a_shard_that_failed_nothing_is_committed_and_its_error_is_raised(tmp_path, monkeypatch):
    writer = empty_cache(tmp_path / "c")
    gate = Gate(writer, monkeypatch)
    shards = writer.missing("trajectories")
    with (
        pytest.raises(NonFiniteError, match=r"velocity of \w+-0000 \('prompt number 4'\) is not finite: its shard"),
        BackgroundWriter(writer, in_flight=3) as background,
    ):
        hand_over(background, writer, shards[0])
        hand_over(background, writer, shards[1], broken=True)
        hand_over(background, writer, shards[2])
        gate.opened.set()
        hand_over(background, writer, shards[3])
    assert committed(writer) == [0]
    assert not [p for p in (tmp_path / "c").rglob("*") if p.name.endswith(".tmp")]
    assert commit_threads() == []


def test_a_failure_is_raised_by_the_next_check_not_at_the_end(tmp_path):
    writer = empty_cache(tmp_path / "c")
    background = BackgroundWriter(writer)
    hand_over(background, writer, writer.missing("trajectories")[0], broken=True)
    background._executor.shutdown()
    with pytest.raises(NonFiniteError, match="is not finite"):
        background.check()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_sampled_whole_is_committed_when_the_build_is_interrupted(tmp_path, monkeypatch, error):
    writer = empty_cache(tmp_path / "c")
    gate = Gate(writer, monkeypatch)
    with pytest.raises(error), BackgroundWriter(writer) as background:
        for shard in writer.missing("trajectories")[:2]:
            hand_over(background, writer, shard)
        gate.opened.set()
        raise error
    assert committed(writer) == [0, 1]
    assert len(Cache.open(tmp_path / "c")) == 8


def test_a_second_interrupt_drops_what_waits_and_leaves_no_half_shard(tmp_path, monkeypatch):
    writer = empty_cache(tmp_path / "c")
    gate = Gate(writer, monkeypatch)
    background = BackgroundWriter(writer)
    real = background._executor.shutdown

    def interrupted(wait: bool = True, **named) -> None:
        if wait:
            raise KeyboardInterrupt
        real(wait=False, **named)

    with pytest.raises(KeyboardInterrupt), background:
        for shard in writer.missing("trajectories")[:2]:
            hand_over(background, writer, shard)
        assert gate.entered.wait(5)
        monkeypatch.setattr(background._executor, "shutdown", interrupted)
        raise KeyboardInterrupt
    gate.opened.set()
    real()
    assert committed(writer) == [0]


def test_the_error_of_a_shard_stops_the_sampling_before_the_next_shard_ends(
    tmp_path, dev_teacher, prompt_file, monkeypatch
):
    sampled: list[int] = []

    class Counting:
        def bar(self, title, **counts):
            return nullcontext(self)

        def advance(self, count, note=""):
            sampled.append(count)

        def say(self, message):
            pass

    def full(self, kind, shard, arrays, **named):
        if kind == "trajectories":
            raise OSError(28, "No space left on device")
        return real(self, kind, shard, arrays, **named)

    real = CacheWriter.commit
    monkeypatch.setattr(CacheWriter, "commit", full)
    with pytest.raises(OSError, match="No space left on device"):
        build_cache(tmp_path / "c", dev_teacher, prompt_file, progress=Counting(), shard_size=1, batch_size=1)
    # 6 prompts in 6 embedding shards, then at most: the shard that fails, and those handed over before it did.
    assert len(sampled) <= 6 + 4
    assert len(Cache.open(tmp_path / "c")) == 0


def test_torch_draws_and_counts_threads_as_without_the_background(tmp_path):
    writer = empty_cache(tmp_path / "c", format="webdataset")
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with BackgroundWriter(writer) as background:
        for shard in writer.missing("trajectories"):
            hand_over(background, writer, shard)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
