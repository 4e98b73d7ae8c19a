"""Caches out of caches: the same bits, the bytes of a build, resumed after a kill, each refusal by its words."""

import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.codecs.step_int8 import StepInt8
from secondcast.storage_schemas.errors import (
    DamagedCacheError,
    DerivationMismatchError,
    SettingsError,
    SettingsMismatchError,
)
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.maintenance.merge import merge
from secondcast.storage_schemas.maintenance.rewrite import Source, rewrite, ways_made
from secondcast.storage_schemas.maintenance.subset import subset
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.schema.fields import DTYPES, same_bits
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Segment
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import data_files, keyed_arrays, some_manifest, some_prompts, write_keyed_cache

ROOT = Path(__file__).resolve().parents[3]


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, message):
        self.lines.append(message)


def segment(first_prompt, prompts, first_sample, samples_per_prompt, shard_size=4):
    return Segment(
        first_prompt=first_prompt,
        prompts=prompts,
        first_sample=first_sample,
        samples_per_prompt=samples_per_prompt,
        shard_size=shard_size,
    )


EXTENDED = (segment(0, 5, 0, 2), segment(5, 4, 0, 1), segment(0, 5, 2, 1))


def sourced(count):
    return [
        replace(prompt, sources=("animals",) if i % 3 else ("animals", "colours") if i % 2 else ("colours",))
        for i, prompt in enumerate(some_prompts(count))
    ]


def assert_same_rows(a: Cache, b: Cache, prompts):
    """Every trajectory and embedding of these prompts is in both, bit for bit."""
    numbers = {prompt.id: i for i, prompt in enumerate(b.prompts)}
    places = [(i, a.layout.place(i)) for i in range(a.planned)]
    compared = 0
    for i, place in places:
        if (identity := a.prompts[place.prompt].id) in {p.id for p in prompts}:
            ours, theirs = a.trajectory(i), b.trajectory(b.layout.find(numbers[identity], place.sample_index))
            assert (ours.key, ours.guidance) == (theirs.key, theirs.guidance)
            assert same_bits(ours.hidden_states_KSC, theirs.hidden_states_KSC)
            assert same_bits(ours.velocity_KSC, theirs.velocity_KSC)
            assert same_bits(ours.final_latent_SC, theirs.final_latent_SC)
            assert same_bits(a.embedding(place.prompt), b.embedding(theirs.prompt))
            compared += 1
    return compared


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("begin", "there"),
    [
        ({"format": "zarr"}, {"format": "webdataset"}),
        ({"format": "webdataset"}, {"format": "zarr"}),
        ({"latents": "derived"}, {"latents": "stored"}),
        ({"latents": "stored", "format": "webdataset"}, {"latents": "derived"}),
        ({"compression": "none"}, {"compression": "lossless"}),
        (
            {"compression": "lossless", "format": "webdataset"},
            {"compression": "none", "format": "zarr", "latents": "stored"},
        ),
        ({"compression": "int8", "latents": "stored"}, {"format": "webdataset"}),
        ({"latents": "stored", "dtype": "float32"}, {"format": "webdataset", "latents": "derived"}),
    ],
)
def test_there_and_back_gives_the_same_bytes(tmp_path, begin, there):
    write_keyed_cache(tmp_path / "a", some_prompts(9), segments=EXTENDED, **begin)
    a = Cache.open(tmp_path / "a")
    convert(a, tmp_path / "b", Silent(), **there)
    b = Cache.open(tmp_path / "b")
    assert b.finished and b.planned == len(b) == 19
    assert {name: getattr(b.manifest.sampling.storage, name) for name in there} == there
    assert assert_same_rows(a, b, list(a.prompts)) == 19
    convert(b, tmp_path / "c", Silent(), **{name: getattr(a.manifest.sampling.storage, name) for name in there})
    assert data_files(tmp_path / "a") == data_files(tmp_path / "c")


def test_a_converted_cache_is_the_one_that_a_build_would_have_made(tmp_path):
    write_keyed_cache(tmp_path / "a", some_prompts(6), format="zarr", samples_per_prompt=2)
    write_keyed_cache(tmp_path / "b", some_prompts(6), format="webdataset", latents="stored", samples_per_prompt=2)
    convert(Cache.open(tmp_path / "a"), tmp_path / "c", Silent(), format="webdataset", latents="stored")
    assert data_files(tmp_path / "b") == data_files(tmp_path / "c")


def test_latents_that_do_not_derive_are_not_dropped(tmp_path):
    prompts = some_prompts(4)
    writer = CacheWriter.create_or_resume(tmp_path / "a", some_manifest(prompts, latents="stored"), prompts, {})
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            arrays = keyed_arrays(writer, shard, kind)
            if kind == "trajectories":
                arrays["hidden_states"][2, 1, 0, 0] += 1
            writer.commit(kind, shard, arrays, seconds=0, provenance={})
    words = r"a: latent 1 of trajectory 2 derived .* differs from the stored one in 1 of 8 elements.*--latents stored"
    with pytest.raises(DerivationMismatchError, match=words):
        convert(Cache.open(tmp_path / "a"), tmp_path / "b", Silent(), latents="derived")
    assert not list((tmp_path / "b/commits").glob("trajectories-*"))


def test_commits_say_how_a_shard_was_made_and_where_it_came_from(tmp_path):
    write_keyed_cache(
        tmp_path / "a", some_prompts(4), provenance={"torch": "2.6", "batch_size": 2}, format="webdataset"
    )
    write_keyed_cache(
        tmp_path / "b", some_prompts(8)[4:], provenance={"torch": "2.7", "batch_size": 2}, format="webdataset"
    )
    a, b = Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")
    merge([a, b], tmp_path / "ab", Silent())
    ab = Cache.open(tmp_path / "ab")
    made = {"torch": "2.6", "batch_size": 2, "copied_from": [str(tmp_path / "a")]}
    assert ab.records["trajectories", 0].provenance == made
    subset(ab, tmp_path / "c", Silent(), listed=[p.id for p in some_prompts(5)])
    c = Cache.open(tmp_path / "c")
    assert c.records["trajectories", 1].provenance == {
        "torch": "2.7", "batch_size": 2, "copied_from": [str(tmp_path / "b"), str(tmp_path / "ab")]
    }  # fmt: skip


def test_a_shard_of_rows_made_differently_keeps_both_ways(tmp_path):
    first, second = some_prompts(8)[:4], some_prompts(8)[4:]
    write_keyed_cache(tmp_path / "a", first, shard_size=4, provenance={"torch": "2.6"}, format="webdataset")
    write_keyed_cache(tmp_path / "b", second, shard_size=4, provenance={"torch": "2.7"}, format="webdataset")
    merge([Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")], tmp_path / "ab", Silent())
    # One segment over the seam, so that a shard takes rows of two.
    ab = Cache.open(tmp_path / "ab")
    one = ab.manifest.prompts.model_copy(update={"segments": (segment(0, 8, 0, 1, 8),)})
    rewrite(
        tmp_path / "c", ab.manifest.model_copy(update={"prompts": one}), list(ab.prompts), [Source(ab)], Silent(),
        title="copy",
    )  # fmt: skip
    made = Cache.open(tmp_path / "c").records["trajectories", 0].provenance
    assert made == {
        "torch": "2.6",
        "copied_from": [str(tmp_path / name) for name in ("a", "b", "ab")],
        "other_rows": [{"torch": "2.7"}],
    }
    assert ways_made(made) == [{"torch": "2.6"}, {"torch": "2.7"}]


@pytest.mark.thorough
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    prompts = some_prompts(24)
    write_keyed_cache(tmp_path / "a", prompts, shard_size=2, format="webdataset")
    code = (
        "from secondcast.storage_schemas.maintenance.convert import convert; "
        "from secondcast.storage_schemas.reader import Cache; "
        "from secondcast.storage_schemas.progress import Silent; "
        "convert(Cache.open('a'), 'b', Silent(), format='zarr', latents='stored')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    while len(list((tmp_path / "b/commits").glob("trajectories-*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Cache.open(tmp_path / "b").finished
    # What was being written at that moment has a name with a dot, and is cleared away.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b/commits").glob("trajectories-*.json")}
    convert(Cache.open(tmp_path / "a"), tmp_path / "b", Silent(), format="zarr", latents="stored")
    assert Cache.open(tmp_path / "b").finished
    assert {p: p.stat().st_mtime_ns for p in before} == before
    write_keyed_cache(tmp_path / "c", prompts, shard_size=2, format="zarr", latents="stored")
    assert data_files(tmp_path / "b") == data_files(tmp_path / "c")


def test_what_the_source_lacks_stays_missing_and_comes_once_it_is_there(tmp_path):
    prompts = some_prompts(10)
    write_keyed_cache(tmp_path / "a", prompts, leave_out=(("trajectories", 1), ("embeddings", 2)))
    a = Cache.open(tmp_path / "a")
    result = convert(a, tmp_path / "b", Silent(), format="webdataset")
    assert (result.trajectories, result.planned, result.embeddings_missing) == (6, 10, 2)
    assert not Cache.open(tmp_path / "b").finished
    part = subset(a, tmp_path / "s", Silent(), listed=[p.id for p in prompts[2:6]])
    assert (part.trajectories, part.planned, part.embeddings_missing) == (0, 4, 0)
    write_keyed_cache(tmp_path / "a", prompts)
    result = convert(Cache.open(tmp_path / "a"), tmp_path / "b", Silent(), format="webdataset")
    assert (result.trajectories, result.embeddings_missing) == (10, 0)
    assert Cache.open(tmp_path / "b").finished
    write_keyed_cache(tmp_path / "c", prompts, format="webdataset")
    assert data_files(tmp_path / "b") == data_files(tmp_path / "c")


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("samples_per_prompt", [1, 3])
def test_a_subset_is_the_cache_that_was_built_of_just_those_prompts(tmp_path, form, samples_per_prompt):
    prompts = sourced(14)
    write_keyed_cache(tmp_path / "a", prompts, format=form, samples_per_prompt=samples_per_prompt)
    a = Cache.open(tmp_path / "a")
    subset(a, tmp_path / "b", Silent(), sources=["colours"], count=4)
    kept = [p for p in prompts if "colours" in p.sources][:4]
    write_keyed_cache(tmp_path / "c", kept, format=form, samples_per_prompt=samples_per_prompt)
    assert data_files(tmp_path / "b") == data_files(tmp_path / "c")
    assert Cache.open(tmp_path / "b").manifest.prompts.sources == {"animals": 2, "colours": 4}


def test_a_subset_of_an_extended_cache_keeps_its_segments_but_empty_ones(tmp_path):
    prompts = some_prompts(9)
    write_keyed_cache(tmp_path / "a", prompts, segments=EXTENDED, format="webdataset")
    a = Cache.open(tmp_path / "a")
    kept = [prompts[i] for i in (1, 2, 4, 7)]
    subset(a, tmp_path / "b", Silent(), listed=[p.text for p in kept])
    expected = (segment(0, 3, 0, 2), segment(3, 1, 0, 1), segment(0, 3, 2, 1))
    write_keyed_cache(tmp_path / "c", kept, segments=expected, format="webdataset")
    assert data_files(tmp_path / "b") == data_files(tmp_path / "c")
    subset(a, tmp_path / "d", Silent(), listed=[prompts[6].id, prompts[8].id])
    assert Cache.open(tmp_path / "d").manifest.prompts.segments == (segment(0, 2, 0, 1),)


def test_selections_are_intersected_in_the_order_of_the_cache_and_unknown_lines_are_counted(tmp_path):
    prompts = sourced(12)
    write_keyed_cache(tmp_path / "a", prompts, format="webdataset")
    a, heard = Cache.open(tmp_path / "a"), Heard()
    listed = [prompts[6].id, f" {prompts[3].text} ", prompts[0].text, "", prompts[4].id, "no such prompt"]
    subset(a, tmp_path / "b", heard, sources=["colours"], listed=listed, count=2)
    assert [p.id for p in Cache.open(tmp_path / "b").prompts] == [prompts[0].id, prompts[3].id]
    assert heard.lines == [
        f"1 of 5 lines match no prompt of {tmp_path / 'a'}, the first: 'no such prompt'",
        "2 of 12 prompts, 2 of 12 trajectories",
    ]


def test_an_empty_selection_names_what_there_is(tmp_path):
    prompts = sourced(6)
    write_keyed_cache(tmp_path / "a", prompts, format="webdataset")
    a = Cache.open(tmp_path / "a")
    with pytest.raises(SettingsError, match=r"--source 'cats' is not in .*a: its sources are animals 5, colours 2"):
        subset(a, tmp_path / "b", Silent(), sources=["animals", "cats"])
    words = rf"nothing of .*a is selected: it has 6 prompts \(animals 5, colours 2\), the first is {prompts[0].id} "
    with pytest.raises(SettingsError, match=words + r'"prompt number 0"; give other --source or --ids'):
        subset(a, tmp_path / "b", Silent(), listed=["nix"])
    assert not (tmp_path / "b").exists()


def test_a_target_begun_otherwise_or_holding_its_source_is_refused(tmp_path):
    write_keyed_cache(tmp_path / "a", some_prompts(6))
    a = Cache.open(tmp_path / "a")
    before = data_files(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for target in ("a", "a/inside", "link", "a/../a", "."):
        with pytest.raises(
            SettingsError, match=r"target .* and the source .*a are one inside the other, but a source is never"
        ):
            convert(a, tmp_path / target, Silent(), format="webdataset")
    assert data_files(tmp_path / "a") == before
    convert(a, tmp_path / "b", Silent(), format="webdataset")
    with pytest.raises(
        SettingsMismatchError, match=r'b was built with sampling.storage.latents = "derived", requested "st'
    ):
        convert(a, tmp_path / "b", Silent(), format="webdataset", latents="stored")
    with pytest.raises(
        SettingsError, match=r"--compression: compression int8 rounds the velocity, .* use --latents stored$"
    ):
        convert(a, tmp_path / "c", Silent(), compression="int8")
    with pytest.raises(SettingsError, match=r"--compression is 'zip', expected .*"):
        convert(a, tmp_path / "c", Silent(), compression="zip")


def test_what_was_rounded_or_left_out_is_not_made_up_again(tmp_path):
    write_keyed_cache(tmp_path / "a", some_prompts(6), latents="stored", format="webdataset")
    a = Cache.open(tmp_path / "a")
    result = convert(a, tmp_path / "b", Silent(), compression="int8", embeddings="none")
    assert (result.trajectories, result.embeddings_missing) == (6, 0)
    b = Cache.open(tmp_path / "b")
    assert b.finished and not [kind for kind, _ in b.records if kind == "embeddings"]
    with pytest.raises(
        SettingsError, match=r"--compression none: the source has compression int8, which rounded the velocity, and"
    ):
        convert(b, tmp_path / "c", Silent(), compression="none")
    with pytest.raises(
        SettingsError, match=r"--store-embeddings: the source has none \(--no-store-embeddings\); build an"
    ):
        convert(b, tmp_path / "c", Silent(), embeddings="stored")
    with pytest.raises(
        SettingsMismatchError, match=r"`secondcast convert \S+/a NEW --compression int8 --latents stored`, then merge"
    ):
        merge([a, b], tmp_path / "c", Silent())
    convert(a, tmp_path / "d", Silent(), compression="int8")
    words = r'd has sampling.storage.embeddings = "stored", \S+b has "none": .*convert \S+/d NEW --no-store-embeddings`'
    with pytest.raises(SettingsMismatchError, match=words):
        merge([Cache.open(tmp_path / "d"), b], tmp_path / "c", Silent())
    subset(b, tmp_path / "e", Silent(), count=4)
    assert Cache.open(tmp_path / "e").finished
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_eight_bits_that_were_read_round_to_themselves(dtype):
    # Every scale that a row of bfloat16 can have, up to its power of two: a cache of a cache must not drift.
    dtype = DTYPES[dtype]
    largest = (np.arange(128, 257, dtype=np.float32)[:, None] * np.linspace(1, 1.01, 9, dtype=np.float32)).reshape(-1)
    rows_SC = (largest[:, None] * np.linspace(-1, 1, 255, dtype=np.float32)).astype(dtype)
    compression = StepInt8(shape=(1, *rows_SC.shape), dtype=dtype.name)
    once = compression.rounded(rows_SC[None])
    assert same_bits(compression.rounded(once), once)
    # Half a step, and what the largest lose where the scale was rounded down.
    error = np.abs(once[0].astype(np.float32) - rows_SC.astype(np.float32)).max(axis=1) / largest
    assert error.max() < 1.05 / 127


def test_a_damaged_source_stops_and_nothing_of_its_shard_is_written(tmp_path):
    write_keyed_cache(tmp_path / "a", some_prompts(8))
    file = tmp_path / "a/trajectories.zarr/velocity/c/1/0/0/0"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        DamagedCacheError, match=r"velocity/c/1/0/0/0 has checksum \w+, expected \w+: trajectories shard 1"
    ):
        convert(Cache.open(tmp_path / "a"), tmp_path / "b", Silent(), format="webdataset")
    assert [p.name for p in (tmp_path / "b/commits").glob("traj*")] == ["trajectories-000000.json"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_merge_holds_every_trajectory_once(tmp_path, form):
    prompts = sourced(12)
    theirs = [replace(p, sources=("signs",)) for p in (prompts[9], prompts[2], prompts[11], prompts[3], prompts[10])]
    write_keyed_cache(tmp_path / "a", prompts[:9], segments=EXTENDED, format=form)
    write_keyed_cache(tmp_path / "b", theirs, samples_per_prompt=4, shard_size=3, format=form)
    a, b, heard = Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b"), Heard()
    result = merge([a, b], tmp_path / "ab", heard)
    # Two shared prompts have samples 0, 1, 2 in both.
    assert heard.lines == ["33 trajectories of 12 prompts from 2 caches (6 duplicates dropped)"]
    ab = Cache.open(tmp_path / "ab")
    assert ab.finished and len(ab) == ab.planned == result.trajectories == 33 and not any(result.differing.values())
    assert [p.id for p in ab.prompts] == [p.id for p in (*prompts[:9], prompts[9], prompts[11], prompts[10])]
    assert ab.prompts[3].sources == (*prompts[3].sources, "signs")
    assert ab.manifest.prompts.sources == {"animals": 7, "colours": 3, "signs": 5}
    assert assert_same_rows(a, ab, list(a.prompts)) == 19 and assert_same_rows(b, ab, theirs) == 20
    assert ab.manifest.prompts.segments == (*EXTENDED, segment(2, 2, 3, 1), segment(9, 3, 0, 4))
    seen = {(t.prompt, t.sample_index) for t in map(ab.layout.place, range(33))}
    assert len(seen) == 33


def test_two_halves_of_a_build_are_merged_to_the_whole(tmp_path):
    prompts = some_prompts(12)
    write_keyed_cache(tmp_path / "a", prompts, leave_out=(("trajectories", 0), ("embeddings", 1)), format="webdataset")
    write_keyed_cache(
        tmp_path / "b", prompts, leave_out=(("trajectories", 2), ("trajectories", 1)), format="webdataset"
    )
    write_keyed_cache(tmp_path / "c", prompts, format="webdataset")
    merge([Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")], tmp_path / "ab", Silent())
    assert Cache.open(tmp_path / "ab").finished
    assert data_files(tmp_path / "ab") == data_files(tmp_path / "c")


@pytest.mark.parametrize(
    ("tokens", "pooled", "merges"), [((5, 2, 1), "zero", True), ((5, 3, 1), "zero", False), ((5, 2, 1), "clip", False)]
)
def test_two_spellings_of_a_prompt_are_merged_only_where_the_teacher_sees_one(tmp_path, tokens, pooled, merges):
    first = some_prompts(2)
    twin = replace(first[0], text="prompt  number 0", token_ids=tokens)
    write_keyed_cache(tmp_path / "a", first, pooled=pooled)
    write_keyed_cache(tmp_path / "b", [twin], pooled=pooled)
    caches = [Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")]
    if merges:
        merge(caches, tmp_path / "ab", Silent())
        assert [prompt.text for prompt in Cache.open(tmp_path / "ab").prompts] == ["prompt number 0", "prompt number 1"]
        return
    message = rf'^prompt {twin.id} is "prompt  number 0" in \S+/b and "prompt number 0" in an earlier cache: one embed'
    with pytest.raises(SettingsMismatchError, match=message):
        merge(caches, tmp_path / "ab", Silent())
    assert not (tmp_path / "ab").exists()


def test_duplicates_with_other_bits_are_counted_and_the_first_is_kept(tmp_path):
    prompts = some_prompts(6)
    write_keyed_cache(tmp_path / "a", prompts, format="webdataset")
    manifest = Cache.open(tmp_path / "a").manifest
    writer = CacheWriter.create_or_resume(tmp_path / "b", manifest, prompts, {"spiece.model": b"pieces"})
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            arrays = keyed_arrays(writer, shard, kind)
            if kind == "trajectories":
                arrays["guidance"][:1] += np.float32(0.5)
            elif shard.shard:
                arrays["encoder_hidden_states"][0, 0, 0] = -arrays["encoder_hidden_states"][0, 0, 0]
            writer.commit(kind, shard, arrays, seconds=0, provenance={})
    caches = [Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")]
    result = merge(caches, tmp_path / "ab", Silent())
    assert result.differing == {"trajectories": 2, "embeddings": 1}
    assert data_files(tmp_path / "ab") == data_files(tmp_path / "a")
    # Given again it writes nothing and still says so.
    assert merge(caches, tmp_path / "ab", Silent()).differing == {"trajectories": 2, "embeddings": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": 3},
            r"a has sampling.seed = 0, .*b has 3: different noise: .* not be merged; give caches of one teacher",
        ),
        (
            {"format": "webdataset"},
            r'a has sampling.storage.format = "zarr", .*b has "webdataset": the same trajectories in another storage '
            r"format: `secondcast convert` makes them equal; `secondcast convert \S+/b NEW --format zarr`, "
            r"then merge NEW",
        ),
        ({"guidance": (1.0,)}, r"sampling.guidance = \[2.0,3.5\], .*b has \[1.0\]: different trajectories: "),
    ],
)
def test_caches_that_do_not_belong_together_are_not_merged(tmp_path, changes, message):
    write_keyed_cache(tmp_path / "a", some_prompts(3))
    write_keyed_cache(tmp_path / "b", some_prompts(3), **changes)
    with pytest.raises(SettingsMismatchError, match=message):
        merge([Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")], tmp_path / "c", Silent())
    with pytest.raises(SettingsError, match=r"merge has 1 cache, expected two or more and the target"):
        merge([Cache.open(tmp_path / "a")], tmp_path / "c", Silent())
    assert not (tmp_path / "c").exists()


@st.composite
def extended(draw):
    """Segments as a build, extensions and merges make them: each (prompt, sample) once, no prompt skipped."""
    prompts = draw(st.integers(1, 6))
    parts = [segment(0, prompts, 0, draw(st.integers(1, 2)), 2)]
    if draw(st.booleans()):
        parts.append(segment(0, draw(st.integers(1, prompts)), parts[0].samples_per_prompt, draw(st.integers(1, 2)), 2))
    if draw(st.booleans()):
        more = draw(st.integers(1, 4))
        parts.append(segment(prompts, more, draw(st.integers(0, 2)), draw(st.integers(1, 2)), 2))
    return tuple(parts)


class Planned:
    """As much of a source as the planning of a merge looks at."""

    def __init__(self, segments, prompts):
        from types import SimpleNamespace

        self.prompts = prompts
        manifest = SimpleNamespace(prompts=SimpleNamespace(segments=segments), is_text=False)
        self.cache = SimpleNamespace(manifest=manifest)

    def pairs(self):
        layout = Layout(self.cache.manifest.prompts.segments)
        places = map(layout.place, range(len(layout)))
        return [(self.prompts[place.prompt].id, place.sample_index) for place in places]


@pytest.mark.thorough
@given(st.lists(extended(), min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_a_merged_plan_has_every_pair_of_its_sources_once_and_an_embedding_for_each_prompt(all_parts, random):
    from secondcast.storage_schemas.maintenance.merge import merged_prompts, merged_segments

    pool = some_prompts(14)
    sources = []
    for parts in all_parts:
        count = max(g.first_prompt + g.prompts for g in parts)
        sources.append(Planned(parts, random.sample(pool, count)))
    prompts = merged_prompts(sources)
    parts = merged_segments(sources, prompts)
    pairs = Planned(parts, prompts).pairs()
    assert len(pairs) == len(set(pairs)) and set(pairs) == {pair for source in sources for pair in source.pairs()}
    layout = Layout(parts)
    assert sum(shard.rows for shard in layout.embeddings) == len(prompts)
    assert all(
        layout.find(p.prompt, p.sample_index) == i for i, p in ((i, layout.place(i)) for i in range(len(layout)))
    )
    assert len({layout.embedding_place(number) for number in range(len(prompts))}) == len(prompts)


def test_the_parts_of_a_cache_merge_to_all_of_it(tmp_path):
    prompts = sourced(8)
    write_keyed_cache(tmp_path / "a", prompts, samples_per_prompt=2, format="webdataset")
    a = Cache.open(tmp_path / "a")
    subset(a, tmp_path / "b", Silent(), count=3)
    subset(a, tmp_path / "c", Silent(), listed=[p.id for p in prompts[2:]])
    merge([Cache.open(tmp_path / "b"), Cache.open(tmp_path / "c")], tmp_path / "bc", Silent())
    bc = Cache.open(tmp_path / "bc")
    assert len(bc) == 16 and assert_same_rows(a, bc, prompts) == 16
    assert read_manifest(LocalFolder(tmp_path / "bc")).prompts.ids == a.manifest.prompts.ids
    shutil.rmtree(tmp_path / "a")
    assert bc.trajectory(15).key


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of a real S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1", "ALLOW_HTTP": "true",
        "ENDPOINT": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/caches", method="PUT"))
    yield "s3://caches"
    server.stop()


@pytest.mark.thorough
def test_from_a_folder_to_an_object_store_and_back(tmp_path, bucket):
    prompts = some_prompts(6)
    write_keyed_cache(tmp_path / "a", prompts)
    convert(Cache.open(tmp_path / "a"), f"{bucket}/tars", Silent(), format="webdataset")
    remote = Cache.open(f"{bucket}/tars")
    with pytest.raises(
        SettingsError, match=r"the target s3://caches/tars/x and the source s3://caches/tars are one inside the other"
    ):
        subset(remote, f"{bucket}/tars/x", Silent(), count=2)
    subset(remote, f"{bucket}/small", Silent(), count=2)
    merge([Cache.open(f"{bucket}/small"), remote], f"{bucket}/all", Silent())
    convert(Cache.open(f"{bucket}/all"), tmp_path / "b", Silent(), format="zarr")
    a, b = Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b")
    assert b.finished and assert_same_rows(a, b, prompts) == 6
    assert b.records["trajectories", 1].provenance["copied_from"] == [
        str(tmp_path / "a"), f"{bucket}/tars", f"{bucket}/all"
    ]  # fmt: skip
