"""Sizes of a cache from its manifest: raw exactly, stored within the range that the codecs give."""

from pathlib import Path

import numpy as np
import pytest

from secondcast.cache_builder.opening.disk import check_disk
from secondcast.cache_builder.opening.new_manifest import outline_manifest
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.models.teacher.planned import planned_teacher
from secondcast.storage_schemas.codecs.by_field import field_codec
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import CommitRecord, FileRecord, Records
from secondcast.storage_schemas.schema.fields import DTYPES, fields_of
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.sizes import cache_sizes, remaining_bytes, stored_ratio
from tests.cache_builder.building import build_cache

KIB, GIB = 2**10, 2**30


def outline(*, count: int = 100_000, **flags) -> Manifest:
    return outline_manifest(PlannedBuild(**flags), planned_teacher("FLUX.1-dev")[0], prompt_count=count)


def sizes_of(manifest: Manifest) -> dict:
    return {size.name: size for size in cache_sizes(manifest)}


@pytest.mark.parametrize(("size", "gib", "with_latents"), [(512, 256, 488), (1024, 1025, 1953)])
def test_100_k_trajectories_of_flux_dev_take_what_was_calculated(size, gib, with_latents):
    sizes = sizes_of(outline(resolution=size))
    assert (sizes["velocity"].raw_bytes + sizes["noise"].raw_bytes) / GIB == pytest.approx(gib, rel=0.002)
    sizes = sizes_of(outline(resolution=size, latents="stored"))
    assert (sizes["velocity"].raw_bytes + sizes["hidden_states"].raw_bytes) / GIB == pytest.approx(
        with_latents, rel=0.002
    )
    assert "noise" not in sizes


def test_rows_of_flux_dev_have_the_published_bytes():
    sizes = sizes_of(outline())
    assert sizes["velocity"].row_bytes == 20 * 128 * KIB
    assert sizes["noise"].row_bytes == sizes["final_latent"].row_bytes == 128 * KIB
    assert sizes["encoder_hidden_states"].row_bytes == 616 * KIB
    assert sizes["guidance"].row_bytes == 4


def test_embeddings_are_one_per_prompt_and_may_be_left_out():
    sizes = sizes_of(outline(count=10, samples_per_prompt=3))
    assert (sizes["velocity"].rows, sizes["encoder_hidden_states"].rows) == (30, 10)
    assert sizes_of(outline(count=10, store_embeddings=False))["encoder_hidden_states"].raw_bytes == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_ratio_of_noise_is_what_its_codec_gives(dtype):
    manifest = outline(count=1, dtype=dtype)
    for kind, name in (("trajectories", "noise"), ("embeddings", "encoder_hidden_states")):
        field = next(field for field in fields_of(manifest, kind) if field.name == name)
        values = np.random.default_rng(0).standard_normal(field.row_shape).astype(DTYPES[dtype])
        stored = len(field_codec(field, "lossless").encode(values))
        low, high = stored_ratio(field, "lossless")
        assert low <= stored / values.nbytes <= high


@pytest.mark.thorough
@pytest.mark.parametrize("format", ["zarr", "webdataset"])
@pytest.mark.parametrize("embeddings", ["stored", "none"])
def test_the_estimate_of_a_plain_cache_is_its_bytes_on_disk(tmp_path, dev_teacher, format, embeddings):
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"a red dog and {i} cats\n" for i in range(40)))
    flags = {
        "format": format,
        "compression": "none",
        "store_embeddings": embeddings == "stored",
        "shard_size": 16,
        "steps": 4,
    }
    build_cache(tmp_path / "c", dev_teacher, prompts, batch_size=16, **flags)
    folder = find_teacher(str(dev_teacher), BUILD_PARTS)
    manifest = outline_manifest(PlannedBuild(**flags), folder, prompt_count=40)
    cache = Cache.open(tmp_path / "c")
    sizes = cache_sizes(manifest)
    arrays = [size for size in sizes if size.name not in ("prompts", "records")]
    assert sum(size.raw_bytes for size in arrays) == sum(r.raw_bytes for r in cache.records.values())
    found = sum(_bytes(tmp_path / "c" / top) for top in ("trajectories.zarr", "embeddings.zarr") if format == "zarr")
    found += sum(_bytes(tmp_path / "c" / top) for top in ("trajectories", "embeddings") if format != "zarr")
    found += _bytes(tmp_path / "c/commits") + _bytes(tmp_path / "c/prompts.jsonl")
    assert sum(size.stored_high_bytes for size in sizes) == pytest.approx(found, rel=0.15)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def record(kind: str, shard: int, rows: int, bytes_: int) -> CommitRecord:
    file = FileRecord(path=f"{kind}/{shard:06d}.tar", bytes=bytes_, xxh3_128="")
    return CommitRecord(
        kind=kind, shard=shard, segment=0, rows=rows, content="", files=(file,), raw_bytes=0, seconds=0.0,
        finished_at="", provenance={},
    )  # fmt: skip


def test_what_remains_goes_by_what_was_written_once_there_is_some():
    manifest = outline(count=200, compression="none")
    low, high = remaining_bytes(manifest, Records(()))
    assert low == high == 200 * (22 * 128 * KIB + 4 + 616 * KIB)
    records = Records([record("trajectories", 0, 64, 640)])
    assert remaining_bytes(manifest, records) == (1360 + 200 * 616 * KIB,) * 2
    everything = [record("trajectories", 0, 200, 9), record("embeddings", 0, 200, 9)]
    assert remaining_bytes(manifest, Records(everything)) == (0, 0)


def test_embeddings_that_are_dropped_need_room_until_the_trajectories_are_there():
    manifest = outline(count=200, compression="none", store_embeddings=False)
    assert remaining_bytes(manifest, Records(()))[1] == 200 * (22 * 128 * KIB + 4 + 616 * KIB)
    assert remaining_bytes(manifest, Records([record("trajectories", 0, 200, 9)])) == (0, 0)


class Heard(Silent):
    def __init__(self):
        self.said = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_disk_that_is_too_small_is_one_line_with_the_ways_out(tmp_path):
    manifest = outline(count=10_000)
    with pytest.raises(SettingsError) as refusal:
        check_disk(tmp_path / "new/c", manifest, Silent(), skip_disk_check=False, free_bytes=10 * GIB)
    assert str(refusal.value) == (
        f"{tmp_path}/new/c needs 13.9 to 19.7 GiB more (estimated), but the disk of {tmp_path} has 10.0 GiB free: a "
        f"build "
        f"stops when the disk is full; give a smaller --limit, a stronger --compression (lossless; int8 with "
        f"--latents stored), "
        f"a folder on another disk, or --skip-disk-check"
    )
    heard = Heard()
    check_disk(tmp_path / "new/c", manifest, heard, skip_disk_check=True, free_bytes=10 * GIB)
    assert heard.said[0].endswith("has 10.0 GiB free: building anyway because of --skip-disk-check")
    check_disk(tmp_path / "new/c", manifest, Silent(), skip_disk_check=False, free_bytes=20 * GIB)
    check_disk("s3://bucket/c", manifest, Silent(), skip_disk_check=False, free_bytes=0)


def test_a_build_that_goes_on_needs_room_for_the_rest_only(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    manifest = Cache.open(tmp_path / "c").manifest
    check_disk(tmp_path / "c", manifest, Silent(), skip_disk_check=False, free_bytes=0)
    (tmp_path / "c/commits/index.json").unlink()
    (tmp_path / "c/commits/trajectories-000001.json").unlink()
    with pytest.raises(SettingsError, match=r"needs [\d.]+ (to [\d.]+ )?MiB more \(estimated\), .* has 0.0 MiB free"):
        check_disk(tmp_path / "c", manifest, Silent(), skip_disk_check=False, free_bytes=0)
