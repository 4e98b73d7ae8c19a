"""Two formats, one behaviour: the same bits out as went in."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage_schemas.fields import same_bits
from storage_schemas.formats import format_of
from storage_schemas.layout import Layout
from storage_schemas.reader import Cache
from tests.storage_schemas.caches import some_arrays, some_manifest, some_prompts, write_cache

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("latents", ["derived", "stored"])
@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_a_cache_gives_back_the_bits_that_were_committed(tmp_path, form, dtype, latents, codec):
    writer = write_cache(tmp_path / "c", format=form, dtype=dtype, latents=latents, codec=codec, replicas=2)
    cache = Cache.open(tmp_path / "c")
    assert len(cache) == cache.planned == 12
    for shard in writer.layout.trajectories:
        arrays = some_arrays(cache.manifest, shard)
        for row in range(shard.rows):
            trajectory = cache.trajectory(shard.first + row)
            assert same_bits(trajectory.velocity_KSC, arrays["velocity"][row])
            assert same_bits(trajectory.final_latent_SC, arrays["final_latent"][row])
            assert trajectory.guidance == float(arrays["guidance"][row])
    for shard in writer.layout.embeddings:
        arrays = some_arrays(cache.manifest, shard, "embeddings")
        assert same_bits(cache.embedding(shard.first), arrays["encoder_hidden_states"][0])


@BOTH
@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=8, max_size=8), codec=st.sampled_from(["plain", "compact"]))
@example(bits=[0x8000] * 8, codec="compact")  # -0.0
@example(bits=[0x7FC0] * 8, codec="compact")  # the NaN that fills what is not there
@example(bits=[0xFFA5] * 8, codec="compact")  # a NaN with a payload
def test_every_bit_pattern_of_bfloat16_survives_encoding(form, bits, codec):
    prompts = some_prompts(1)
    manifest = some_manifest(prompts, format=form, codec=codec)
    shard = Layout(manifest.prompts.generations).trajectories[0]
    arrays = some_arrays(manifest, shard)
    # -0.0, infinities and NaNs with payloads among them: the format must not look at the values.
    arrays["noise"] = np.array(bits, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(1, 4, 2)
    arrays["velocity"] = np.tile(arrays["noise"], (1, 3, 1, 1))
    shards = format_of(manifest)
    files = shards.encode("trajectories", 0, arrays, [{"key": "k", "prompt": "p", "prompt_id": "i"}])
    decoded = shards.decode("trajectories", 0, files, 1)
    assert all(same_bits(decoded[name], array) for name, array in arrays.items())


@BOTH
@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_equal_input_gives_equal_bytes(form, codec):
    prompts = some_prompts(4)
    manifest = some_manifest(prompts, format=form, codec=codec)
    shard = Layout(manifest.prompts.generations).trajectories[0]
    labels = [{"key": p.id, "prompt": p.text, "prompt_id": p.id} for p in prompts]
    arrays = some_arrays(manifest, shard)
    assert format_of(manifest).encode("trajectories", 0, arrays, labels) == format_of(manifest).encode(
        "trajectories", 0, arrays, labels
    )


def test_both_formats_give_the_same_trajectories(tmp_path):
    write_cache(tmp_path / "z", format="zarr", codec="compact")
    write_cache(tmp_path / "w", format="webdataset")
    a, b = Cache.open(tmp_path / "z"), Cache.open(tmp_path / "w")
    for i in range(a.planned):
        one, other = a.trajectory(i), b.trajectory(i)
        assert one.key == other.key and one.guidance == other.guidance
        assert same_bits(one.hidden_states_KSC, other.hidden_states_KSC)
        assert same_bits(one.velocity_KSC, other.velocity_KSC)


def test_tensorstore_reads_the_arrays_as_bfloat16_without_us(tmp_path):
    writer = write_cache(tmp_path / "c", codec="plain")
    expected = some_arrays(writer.manifest, writer.layout.trajectories[0])["velocity"]
    np.save(tmp_path / "expected.npy", expected.view(np.uint16))
    store = {"driver": "file", "path": str(tmp_path / "c/trajectories.zarr/velocity")}
    code = f"""
import numpy as np, tensorstore as ts
array = ts.open({{"driver": "zarr3", "kvstore": {store!r}}}).result()
assert array.dtype.name == "bfloat16", array.dtype
assert (array[:4].read().result().view(np.uint16) == np.load({str(tmp_path / "expected.npy")!r})).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_tar_holds_one_plain_sample_per_trajectory(tmp_path):
    write_cache(tmp_path / "c", format="webdataset")
    with tarfile.open(tmp_path / "c/trajectories/000000.tar") as tar:
        names = tar.getnames()
        label = json.loads(tar.extractfile(names[0]).read())
    assert len(names) == 8 and names[:2] == [f"{label['key']}.json", f"{label['key']}.safetensors"]
    assert label["prompt"] == "prompt number 0" and label["replica"] == 0


def test_reading_needs_neither_torch_nor_webdataset(tmp_path):
    for form in ("zarr", "webdataset"):
        write_cache(tmp_path / form, format=form, codec="compact")
    root = Path(__file__).resolve().parents[2]
    code = f"""
import sys
sys.modules["torch"] = sys.modules["webdataset"] = None
sys.path.insert(0, {str(root)!r})
import cli
for form in ("zarr", "webdataset"):
    cache = {str(tmp_path)!r} + "/" + form
    for words in (["--help"], ["inspect", "summary", cache], ["inspect", "show", cache, "1"]):
        cli.app(words, standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "prompt number 1" in done.stdout and "6 of 6 committed" in done.stdout
