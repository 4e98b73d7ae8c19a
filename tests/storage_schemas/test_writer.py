"""Committing: whole or not at all, once, and only what derives."""

import numpy as np
import pytest

from secondcast.storage_schemas.errors import (
    DerivationMismatchError,
    NonFiniteError,
    NotACacheError,
    SettingsMismatchError,
    ShardLockedError,
)
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import some_arrays, some_manifest, some_prompts, write_cache


def begin(path, **changes):
    prompts = some_prompts(6)
    return CacheWriter.create_or_resume(path, some_manifest(prompts, **changes), prompts, {})


def files_of(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file() and "commits" not in p.parts}


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_the_order_of_commits_does_not_change_a_byte(tmp_path, form):
    write_cache(tmp_path / "a", format=form)
    writer = begin(tmp_path / "b", format=form)
    for kind in ("trajectories", "embeddings"):
        for shard in reversed(writer.missing(kind)):
            writer.commit(kind, shard, some_arrays(writer.manifest, shard, kind), seconds=0, provenance={})
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_shard_is_committed_once_and_the_loser_is_told(tmp_path):
    writer, other = begin(tmp_path / "c"), begin(tmp_path / "c")
    shard = writer.missing("trajectories")[1]
    arrays = some_arrays(writer.manifest, shard)
    writer.commit("trajectories", shard, arrays, seconds=0, provenance={})
    with pytest.raises(ShardLockedError, match="another builder committed trajectories shard 1 in the meantime"):
        # Its numbers may differ in the last bit (another batch size): they must not land over the winner's.
        other.commit("trajectories", shard, arrays | {"guidance": arrays["guidance"] + 1}, seconds=0, provenance={})
    assert Cache.open(tmp_path / "c").trajectory(5).prompt == 5


def test_the_metadata_that_the_manifest_vouches_for_outlives_other_versions_of_zarr(tmp_path):
    write_cache(tmp_path / "c")
    file = tmp_path / "c/trajectories.zarr/zarr.json"
    manifest = read_manifest(LocalFolder(tmp_path / "c"))
    older = file.read_bytes() + b"\n"
    metadata = manifest.metadata | {"trajectories.zarr/zarr.json": xxh3_128(older)}
    file.write_bytes(older)
    (tmp_path / "c/manifest.json").write_bytes(manifest.model_copy(update={"metadata": metadata}).encode())
    begin(tmp_path / "c")
    assert file.read_bytes() == older and Cache.open(tmp_path / "c").trajectory(0).prompt == 0


def test_a_prediction_that_is_not_finite_is_refused_with_its_prompt(tmp_path):
    writer = begin(tmp_path / "c")
    shard = writer.missing("trajectories")[0]
    arrays = some_arrays(writer.manifest, shard)
    arrays["velocity"][2, 1, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"velocity of \w+-0000 \('prompt number 2'\) is not finite"):
        writer.commit("trajectories", shard, arrays, seconds=0, provenance={})
    assert not writer.records() and not list((tmp_path / "c").rglob("c/0/0/0/0"))


def test_a_trajectory_that_does_not_derive_stops_the_build(tmp_path):
    writer = begin(tmp_path / "c")
    shard = writer.missing("trajectories")[1]
    arrays = some_arrays(writer.manifest, shard)
    arrays["final_latent"][1, 0, 0] += np.float32(1).astype(arrays["final_latent"].dtype)
    with pytest.raises(
        DerivationMismatchError, match=r"trajectory 5, derived .* differs .* in 1 of 8 elements: .*--latents stored"
    ):
        writer.commit("trajectories", shard, arrays, seconds=0, provenance={})
    assert not writer.records()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"sampling.seed = 0, requested 3: every recorded trajectory depends on it"),
        ({"format": "webdataset"}, r'sampling.storage.format = "zarr", requested "webdataset"'),
        ({"samples_per_prompt": 2}, r"prompts.segments"),
        ({"dtype": "float32"}, r'sampling.dtype = "bfloat16", requested "float32"'),
    ],
)
def test_other_settings_are_refused_by_the_name_of_the_field(tmp_path, changes, message):
    write_cache(tmp_path / "c")
    before = files_of(tmp_path / "c")
    with pytest.raises(SettingsMismatchError, match=message):
        begin(tmp_path / "c", **changes)
    assert files_of(tmp_path / "c") == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(NotACacheError, match=r"has 'thesis.txt' and 0 more, but no manifest.json"):
        begin(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_prompts_of_the_user_are_not_taken_for_those_of_a_killed_builder(tmp_path):
    (tmp_path / "trajectories.zarr").mkdir()
    for name in ("prompts.jsonl", "trajectories.zarr/zarr.json"):
        file = tmp_path / name
        file.write_text("mine")
        with pytest.raises(
            NotACacheError, match=f"^{tmp_path} has '{name}', which this build did not write, and no man"
        ):
            begin(tmp_path)
        assert file.read_text() == "mine"
        file.unlink()


def test_what_a_builder_killed_before_its_manifest_wrote_is_gone_on_with(tmp_path):
    begin(tmp_path / "c")
    whole = files_of(tmp_path / "c")
    (tmp_path / "c/manifest.json").unlink()
    begin(tmp_path / "c")
    assert files_of(tmp_path / "c") == whole


def test_leftovers_of_a_killed_builder_are_swept(tmp_path):
    begin(tmp_path / "c")
    dead = tmp_path / f"c/trajectories.zarr/.0.{durable._machine_token()}-999999999-0badcafe.tmp"
    dead.write_bytes(b"half")
    begin(tmp_path / "c")
    assert not dead.exists()
