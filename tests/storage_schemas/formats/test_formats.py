"""Two formats, one behaviour: the same bits out as went in."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secondcast.storage_schemas.codecs import zarr_bfloat16
from secondcast.storage_schemas.formats.by_manifest import format_of
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.schema.layout import Layout
from tests.storage_schemas.caches import some_arrays, some_manifest, some_prompts, write_cache

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("latents", ["derived", "stored"])
@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_a_cache_gives_back_the_bits_that_were_committed(tmp_path, form, dtype, latents, compression):
    writer = write_cache(
        tmp_path / "c", format=form, dtype=dtype, latents=latents, compression=compression, samples_per_prompt=2
    )
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


@pytest.mark.thorough
@BOTH
@settings(max_examples=40, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=8, max_size=8), compression=st.sampled_from(["none", "lossless"])
)
@example(bits=[0x8000] * 8, compression="lossless")  # -0.0
@example(bits=[0x7FC0] * 8, compression="lossless")  # the NaN that fills what is not there
@example(bits=[0xFFA5] * 8, compression="lossless")  # a NaN with a payload
def test_every_bit_pattern_of_bfloat16_survives_encoding(form, bits, compression):
    prompts = some_prompts(1)
    manifest = some_manifest(prompts, format=form, compression=compression)
    shard = Layout(manifest.prompts.segments).trajectories[0]
    arrays = some_arrays(manifest, shard)
    # -0.0, infinities and NaNs with payloads among them: the format must not look at the values.
    arrays["noise"] = np.array(bits, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(1, 4, 2)
    arrays["velocity"] = np.tile(arrays["noise"], (1, 3, 1, 1))
    shards = format_of(manifest)
    files = shards.encode("trajectories", 0, arrays, [{"key": "k", "prompt": "p", "prompt_id": "i"}])
    decoded = shards.decode("trajectories", 0, files, 1)
    assert all(same_bits(decoded[name], array) for name, array in arrays.items())


@BOTH
@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_equal_input_gives_equal_bytes(form, compression):
    prompts = some_prompts(4)
    manifest = some_manifest(prompts, format=form, compression=compression)
    shard = Layout(manifest.prompts.segments).trajectories[0]
    labels = [{"key": p.id, "prompt": p.text, "prompt_id": p.id} for p in prompts]
    arrays = some_arrays(manifest, shard)
    assert format_of(manifest).encode("trajectories", 0, arrays, labels) == format_of(manifest).encode(
        "trajectories", 0, arrays, labels
    )


def test_both_formats_give_the_same_trajectories(tmp_path):
    write_cache(tmp_path / "z", format="zarr", compression="lossless")
    write_cache(tmp_path / "w", format="webdataset")
    a, b = Cache.open(tmp_path / "z"), Cache.open(tmp_path / "w")
    for i in range(a.planned):
        one, other = a.trajectory(i), b.trajectory(i)
        assert one.key == other.key and one.guidance == other.guidance
        assert same_bits(one.hidden_states_KSC, other.hidden_states_KSC)
        assert same_bits(one.velocity_KSC, other.velocity_KSC)


# What stands for the rooms in a reader's own program: importing any of them there is an error.
SINGLE_PROCESS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("storage_schemas", "models", "cache_builder", "trainer", "pocket", "inspection"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuse())
sys.path = [entry for entry in sys.path if entry]
"""


def read_alone(code, folder):
    done = subprocess.run(
        [sys.executable, "-I", "-c", SINGLE_PROCESS + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tensorstore_reads_plain_arrays_without_us(tmp_path, dtype):
    write_cache(tmp_path / "c", format="zarr", compression="none", dtype=dtype)
    velocity = np.stack([Cache.open(tmp_path / "c").trajectory(i).velocity_KSC for i in range(6)])
    np.save(tmp_path / "bits.npy", np.frombuffer(velocity.tobytes(), dtype=np.uint8))
    code = f"""
import numpy, tensorstore
store = {{"driver": "file", "path": "c/trajectories.zarr/velocity"}}
found = tensorstore.open({{"driver": "zarr3", "kvstore": store}}).result()
assert found.dtype.name == {dtype!r}, found.dtype
bits = numpy.asarray(found[:6].read().result()).tobytes()
assert bits == numpy.load("bits.npy").tobytes()
"""
    read_alone(code, tmp_path)


@pytest.mark.thorough
def test_zarr_python_reads_plain_arrays_with_the_data_type_plug_in_alone(tmp_path):
    write_cache(tmp_path / "c", format="zarr", compression="none")
    velocity = np.stack([Cache.open(tmp_path / "c").trajectory(i).velocity_KSC for i in range(6)])
    np.save(tmp_path / "bits.npy", np.frombuffer(velocity.tobytes(), dtype=np.uint8))
    shutil.copy(Path(zarr_bfloat16.__file__), tmp_path / "bfloat16_for_zarr.py")
    code = """
sys.path.append(".")
import numpy, zarr, bfloat16_for_zarr
found = zarr.open_array("c/trajectories.zarr/velocity", mode="r")
assert str(found.dtype) == "bfloat16"
assert found[:6].tobytes() == numpy.load("bits.npy").tobytes()
"""
    read_alone(code, tmp_path)


README = Path(__file__).resolve().parents[3] / "storage_schemas/README.md"
ZARR_BLOCK = next(
    block
    for block in re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    if "import zarr\n" in block
)


def run_beside(code, folder):
    """Run a program of a user's, with this package installed, in the folder that holds the cache."""
    return subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.mark.thorough
@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_what_the_readme_says_of_zarr_python_reads_a_cache(tmp_path, compression):
    write_cache(tmp_path / "CACHE", format="zarr", compression=compression)
    velocity = np.stack([Cache.open(tmp_path / "CACHE").trajectory(i).velocity_KSC for i in range(6)])
    np.save(tmp_path / "bits.npy", np.frombuffer(velocity.tobytes(), dtype=np.uint8))
    code = f"""{ZARR_BLOCK}
import sys
import numpy
assert velocity.dtype.name == "bfloat16"
assert velocity[:6].tobytes() == numpy.load("bits.npy").tobytes()
assert "torch" not in sys.modules
"""
    done = run_beside(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_zarr_python_alone_reads_float32_and_names_bfloat16_as_what_it_lacks(tmp_path, compression):
    code = """
import zarr
print(zarr.open_array("c/trajectories.zarr/velocity", mode="r")[:6].dtype)
"""
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        write_cache(folder / "c", format="zarr", compression=compression, dtype=dtype)
        done = run_beside(code, folder)
        if dtype == "float32" or not done.returncode:
            # A later zarr-python may load the entry point: then the README's import is no longer needed.
            assert done.stdout.strip() == dtype, done.stderr
        else:
            assert "No Zarr data type found that matches 'bfloat16'" in done.stderr
            assert "No Zarr data type found that matches 'bfloat16'" in " ".join(README.read_text().split())


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tarfile_and_safetensors_read_plain_tars_without_us(tmp_path, dtype):
    write_cache(tmp_path / "c", format="webdataset", compression="none", dtype=dtype)
    velocity = np.stack([Cache.open(tmp_path / "c").trajectory(i).velocity_KSC for i in range(4)])
    np.save(tmp_path / "bits.npy", np.frombuffer(velocity.tobytes(), dtype=np.uint8))
    code = f"""
import json, tarfile, numpy, torch
from safetensors.torch import load
with tarfile.open("c/trajectories/000000.tar") as tar:
    names = [name for name in tar.getnames() if name.endswith(".safetensors")]
    samples = [load(tar.extractfile(name).read()) for name in names]
    labels = [json.loads(tar.extractfile(name.replace(".safetensors", ".json")).read()) for name in names]
assert [label["prompt"] for label in labels] == [f"prompt number {{i}}" for i in range(4)]
velocity = torch.stack([sample["velocity"] for sample in samples])
assert velocity.dtype == torch.{dtype}
assert velocity.view(torch.uint8).numpy().tobytes() == numpy.load("bits.npy").tobytes()
"""
    read_alone(code, tmp_path)


def test_a_tar_holds_one_plain_sample_per_trajectory(tmp_path):
    write_cache(tmp_path / "c", format="webdataset")
    with tarfile.open(tmp_path / "c/trajectories/000000.tar") as tar:
        names = tar.getnames()
        label = json.loads(tar.extractfile(names[0]).read())
    assert len(names) == 8 and names[:2] == [f"{label['key']}.json", f"{label['key']}.safetensors"]
    assert label["prompt"] == "prompt number 0" and label["sample_index"] == 0


@pytest.mark.thorough
def test_reading_needs_neither_torch_nor_webdataset(tmp_path):
    for form in ("zarr", "webdataset"):
        write_cache(tmp_path / form, format=form, compression="lossless")
    root = Path(__file__).resolve().parents[3]
    code = f"""
import sys
sys.modules["torch"] = sys.modules["webdataset"] = None
sys.path.insert(0, {str(root)!r})
from secondcast import cli
for form in ("zarr", "webdataset"):
    cache = {str(tmp_path)!r} + "/" + form
    for words in (["--help"], ["inspect", "summary", cache], ["inspect", "show", cache, "1"]):
        cli.app(words, standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "prompt number 1" in done.stdout and "6 of 6 committed" in done.stdout
