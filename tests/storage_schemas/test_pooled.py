"""CLIP's pooled vectors beside the embeddings: every format and codec gives them back, every transform carries them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from secondcast.storage_schemas.errors import DamagedCacheError, SettingsError, SettingsMismatchError
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.maintenance.merge import merge
from secondcast.storage_schemas.maintenance.repair import repair_cache
from secondcast.storage_schemas.maintenance.subset import subset
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.schema.json_files import with_digest
from secondcast.storage_schemas.schema.manifest import Manifest
from tests.storage_schemas.caches import data_files, some_manifest, some_prompts, write_cache, write_keyed_cache

FORMATS = pytest.mark.parametrize("form", ["zarr", "webdataset"])


@dataclass
class Written:
    folder: Path
    pooled: list[np.ndarray]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Written:
    folder = tmp_path_factory.mktemp("pooled") / "c"
    write_keyed_cache(folder, some_prompts(6), pooled="clip", compression="lossless")
    cache = Cache.open(folder)
    return Written(folder, [cache.conditioning(prompt)["pooled_projections"] for prompt in range(6)])


def same_pooled(cache: Cache, expected: list[np.ndarray]) -> bool:
    return all(
        same_bits(cache.conditioning(number)["pooled_projections"], array) for number, array in enumerate(expected)
    )


@pytest.mark.thorough
@FORMATS
@pytest.mark.parametrize("compression", ["none", "lossless", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_format_and_codec_gives_back_embedding_and_pooled_vector_bit_for_bit(tmp_path, form, compression, dtype):
    flags = {"format": form, "compression": compression, "dtype": dtype, "latents": "stored"}
    writer = write_keyed_cache(tmp_path / "c", some_prompts(6), pooled="clip", **flags)
    plain = write_keyed_cache(tmp_path / "none", some_prompts(6), pooled="clip", dtype=dtype)
    cache, other = Cache.open(writer.folder.path), Cache.open(plain.folder.path)
    for prompt in range(6):
        assert (
            same_bits(
                cache.conditioning(prompt)["pooled_projections"], other.conditioning(prompt)["pooled_projections"]
            )
            and cache.conditioning(prompt)["pooled_projections"].any()
        )
        assert same_bits(cache.embedding(prompt), other.embedding(prompt))
        assert set(cache.text_row(prompt)) == {"encoder_hidden_states", "pooled_projections"}
    assert not verify(tmp_path / "c", Silent()).problems


def test_where_pooled_is_zero_zeros_are_read_and_nothing_is_stored(tmp_path):
    write_cache(tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    assert (
        cache.conditioning(3)["pooled_projections"].tolist() == [0.0, 0.0]
        and cache.conditioning(3)["pooled_projections"].dtype == cache.embedding(3).dtype
    )
    assert not [path for path in data_files(tmp_path / "c") if "pooled" in path]


def test_converted_there_and_back_the_bytes_are_the_same(tmp_path, written):
    convert(Cache.open(written.folder), tmp_path / "tars", Silent(), format="webdataset", compression="none")
    assert same_pooled(Cache.open(tmp_path / "tars"), written.pooled)
    convert(Cache.open(tmp_path / "tars"), tmp_path / "back", Silent(), format="zarr", compression="lossless")
    assert data_files(tmp_path / "back") == data_files(written.folder)


def test_a_subset_and_a_merge_carry_them_along(tmp_path, written):
    cache = Cache.open(written.folder)
    some = [cache.prompts[number].id for number in (1, 4)]
    subset(cache, tmp_path / "two", Silent(), listed=some)
    assert same_pooled(Cache.open(tmp_path / "two"), [written.pooled[1], written.pooled[4]])
    merged = merge([Cache.open(tmp_path / "two"), cache], tmp_path / "all", Silent())
    assert merged.differing == {"trajectories": 0, "embeddings": 0}
    order = [1, 4, 0, 2, 3, 5]
    assert same_pooled(Cache.open(tmp_path / "all"), [written.pooled[number] for number in order])


def test_caches_of_zero_and_of_clip_are_not_merged(tmp_path, written):
    write_keyed_cache(tmp_path / "zero", some_prompts(6), compression="lossless")
    caches = [Cache.open(written.folder), Cache.open(tmp_path / "zero")]
    with pytest.raises(
        SettingsMismatchError, match=r'c has teacher\.pooled = "clip", .*zero has "zero": different teachers'
    ):
        merge(caches, tmp_path / "both", Silent())


def test_a_flipped_pooled_vector_is_found_and_taken_from_a_copy(tmp_path, written):
    for name in ("damaged", "copy"):
        write_keyed_cache(tmp_path / name, some_prompts(6), pooled="clip")
    file = tmp_path / "damaged/embeddings.zarr/pooled_projections/c/0/0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCacheError, match="pooled_projections/c/0/0"):
        Cache.open(tmp_path / "damaged").conditioning(0)
    assert [problem.shard for problem in verify(tmp_path / "damaged", Silent()).problems] == [("embeddings", 0)]
    assert repair_cache(tmp_path / "damaged", tmp_path / "copy", Silent()).shards == (("embeddings", 0),)
    assert data_files(tmp_path / "damaged") == data_files(tmp_path / "copy")


def test_leaving_out_embeddings_is_refused_where_they_hold_pooled_vectors(tmp_path, written):
    with pytest.raises(
        SettingsError, match="--no-store-embeddings: the source was built with --pooled clip, and replay need"
    ):
        convert(Cache.open(written.folder), tmp_path / "none", Silent(), embeddings="none")


def test_a_manifest_that_could_not_be_replayed_is_refused():
    prompts = some_prompts(2)
    with pytest.raises(ValueError, match="replay needs CLIP's pooled vectors"):
        some_manifest(prompts, pooled="clip", embeddings="none")
    whole = some_manifest(prompts, pooled="clip")
    body = json.loads(whole.encode())
    body["sampling"]["storage"]["embeddings"] = "none"
    del body["digest"]
    message = "m is not a valid manifest: settings: replay needs CLIP's pooled vectors"
    with pytest.raises(DamagedCacheError, match=message):
        Manifest.decode(with_digest(body), "m")
    assert Manifest.decode(whole.encode(), "m") == whole


def test_only_with_clip_its_configuration_is_part_of_the_teacher():
    zero, clip = (some_manifest(some_prompts(2), pooled=pooled).teacher.json_value() for pooled in ("zero", "clip"))
    assert clip.keys() - zero.keys() == {"pooled_encoder_config", "pooled_tokenizer"}
