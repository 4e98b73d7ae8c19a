"""Codecs: the same bits back, whatever they are; an error for bytes that `encode` did not give."""

import json
import tomllib
from importlib import import_module
from pathlib import Path

import ml_dtypes
import numcodecs
import numpy as np
import pytest
import safetensors
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs.zstd import Zstd

from secondcast.storage_schemas.codecs.byte_planes import BITS, BytePlanes
from secondcast.storage_schemas.codecs.step_delta import StepDelta
from secondcast.storage_schemas.codecs.step_int8 import StepInt8
from secondcast.storage_schemas.codecs.step_prediction import fit_weights
from secondcast.storage_schemas.errors import DamagedCacheError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import DTYPES, same_bits
from secondcast.storage_schemas.schema.recording import Storage
from tests.storage_schemas.caches import CHANNELS, STEPS, TOKENS, some_arrays, write_cache

ROOT = Path(__file__).resolve().parents[3]
LOSSLESS = pytest.mark.parametrize("make", [BytePlanes, StepDelta])
DTYPE = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])
# -0.0, infinities, NaNs with payloads and all bits set, the largest and the smallest numbers, one and its neighbour
STRANGE = [0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFA5, 0xFFFF, 0x7F7F, 0xFF7F, 0x0001, 0x8001, 0x3F80, 0x3F81]


def smooth(steps, tokens, channels, dtype, seed=0):
    """Values that move smoothly from step to step, [K, S, C]."""
    rng = np.random.default_rng(seed)
    first, last = rng.standard_normal((2, tokens, channels))
    walk = [first + (last - first) * (k / steps) ** 2 for k in range(steps)]
    return (np.stack(walk) + 0.01 * rng.standard_normal((steps, tokens, channels))).astype(DTYPES[dtype])


@LOSSLESS
@DTYPE
@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6))
def test_every_bit_pattern_of_any_shape_comes_back(make, dtype, data, shape):
    bits = data.draw(hnp.arrays(BITS[dtype], shape))
    compression = make(shape=shape, dtype=dtype)
    decoded = compression.decode(compression.encode(bits.view(DTYPES[dtype])))
    assert decoded.dtype == BITS[dtype] and (decoded == bits).all()
    assert (compression.decode(compression.encode(bits.tobytes())) == bits).all()


@LOSSLESS
@DTYPE
@settings(max_examples=60, deadline=None)
@given(order=st.lists(st.sampled_from(STRANGE), min_size=8, max_size=8))
@example(order=STRANGE[:8])
def test_zeros_of_both_signs_infinities_and_nans_come_back(make, dtype, order):
    bits = np.array(order, dtype=BITS[dtype]).reshape(4, 1, 2)
    bits = bits if dtype == "bfloat16" else bits << 16 | 0x0FFF
    compression = make(shape=bits.shape, dtype=dtype)
    assert (compression.decode(compression.encode(bits)) == bits).all()


@DTYPE
def test_one_step_of_no_tokens_and_constant_steps_are_no_special_case(dtype):
    for values in (smooth(1, 3, 2, dtype), np.zeros((3, 0, 4), DTYPES[dtype]), np.ones((5, 2, 2), DTYPES[dtype])):
        compression = StepDelta(shape=values.shape, dtype=dtype)
        assert same_bits(compression.decode(compression.encode(values)).view(values.dtype), values)


def test_steps_that_follow_from_the_ones_before_take_less_than_byte_planes_alone():
    values = smooth(20, 256, 16, "bfloat16")
    sizes = [len(make(shape=values.shape, dtype="bfloat16").encode(values)) for make in (StepDelta, BytePlanes)]
    assert sizes[0] < 0.8 * sizes[1] < 0.8 * values.nbytes


def test_the_weights_of_steps_on_a_parabola_predict_the_next_one():
    a, b, c = np.random.default_rng(0).standard_normal((3, 700)).astype(np.float32)
    steps = [a + b * k + c * k * k for k in range(6)]
    weights = fit_weights(steps)
    assert weights.shape == (6, 3) and (weights[0] == 0).all() and (weights[1, 1:] == 0).all()
    predicted = sum(weights[5, j] * steps[4 - j] for j in range(3))
    assert np.abs(predicted - steps[5]).max() < 0.05 * np.abs(steps[5]).max()


@pytest.mark.parametrize("make", [BytePlanes, StepDelta, StepInt8])
@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_or_a_cut_is_an_error_or_changes_nothing(make, place, bit, cut):
    values = smooth(3, 8, 4, "bfloat16")
    compression = make(shape=values.shape, dtype="bfloat16")
    encoded = bytearray(compression.encode(values))
    true = compression.decode(encoded)
    place %= len(encoded)
    if cut:
        changed = bytes(encoded[:place])
    else:
        encoded[place] ^= 1 << bit
        changed = bytes(encoded)
    try:
        decoded = compression.decode(changed)
    except ValueError:
        return
    assert not cut and same_bits(decoded, true)


@pytest.mark.parametrize("make", [BytePlanes, StepDelta, StepInt8])
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_foreign_bytes_are_an_error(make, data):
    with pytest.raises(ValueError, match=r"lengths|ends at|zstd frame|Zstd"):
        make(shape=(3, 8, 4), dtype="bfloat16").decode(data)


def test_a_frame_that_states_a_gigabyte_is_refused_before_memory_is_taken():
    bomb = Zstd(level=1).encode(np.zeros(2**24, np.uint8))
    assert len(bomb) < 2000
    frames = np.array([len(bomb)] * 2, "<u4").tobytes() + bytes(bomb) * 2
    with pytest.raises(ValueError, match=r"a zstd frame states 16777216 bytes, expected 96"):
        BytePlanes(shape=(3, 8, 4), dtype="bfloat16").decode(frames)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (StepDelta, {"shape": (0, 2), "dtype": "bfloat16"}, r"shape is \(0, 2\), expected at least one step"),
        (StepDelta, {"shape": (2, 2), "dtype": "int8"}, r"dtype is 'int8', expected bfloat16 or float32"),
        (StepInt8, {"shape": (2, 2), "dtype": "float32"}, r"shape is \(2, 2\), expected \[K, S, C\]"),
        (BytePlanes, {"shape": (2, -1), "dtype": "float32"}, r"shape is \(2, -1\), expected integers of at least 0"),
    ],
)
def test_a_codec_for_what_it_cannot_keep_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@DTYPE
def test_eight_bits_read_as_the_codec_rounds_within_a_254th_of_each_rows_largest(dtype):
    values = smooth(6, 32, 16, dtype)
    values[2, 3] = 0
    compression = StepInt8(shape=values.shape, dtype=dtype)
    decoded = compression.decode(compression.encode(values)).view(values.dtype)
    assert same_bits(decoded, compression.rounded(values)) and (decoded[2, 3] == 0).all()
    error = np.abs(decoded.astype(np.float32) - values.astype(np.float32))
    largest = np.abs(values.astype(np.float32)).max(axis=-1, keepdims=True)
    # Half a unit, the scale's own rounding to bfloat16 at the ends of the range, and that of the result.
    assert (error <= largest * (1 / 254 + 2**-8 + 2**-8)).all()
    with pytest.raises(ValueError, match="an element is not finite: int8 represents finite numbers only"):
        compression.encode(np.where(values == 0, np.nan, values).astype(values.dtype))


@BOTH
@DTYPE
def test_an_int8_cache_gives_rounded_velocities_and_exact_latents(tmp_path, form, dtype):
    writer = write_cache(tmp_path / "c", format=form, compression="int8", latents="stored", dtype=dtype)
    cache = Cache.open(tmp_path / "c")
    arrays = some_arrays(cache.manifest, writer.layout.trajectories[0])
    compression = StepInt8(shape=(STEPS, TOKENS, CHANNELS), dtype=dtype)
    assert not same_bits(compression.rounded(arrays["velocity"]), arrays["velocity"])
    for row in range(4):
        trajectory = cache.trajectory(row)
        assert same_bits(trajectory.velocity_KSC, compression.rounded(arrays["velocity"][row]))
        assert same_bits(trajectory.hidden_states_KSC, arrays["hidden_states"][row])


def test_int8_without_stored_latents_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="compression int8 rounds the velocity, .* use --latents stored"):
        Storage(format="zarr", compression="int8", latents="derived")


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("latents", ["derived", "stored"])
def test_wrong_bytes_of_a_compact_shard_are_a_damaged_cache_even_unverified(tmp_path, form, latents):
    write_cache(tmp_path / "c", format=form, compression="lossless", latents=latents)
    name = {"zarr": "trajectories.zarr/velocity/c/0/0/0/0", "webdataset": "trajectories/000000.tar"}[form]
    data = (tmp_path / "c" / name).read_bytes()
    true = [Cache.open(tmp_path / "c").trajectory(row) for row in range(4)]
    refused = 0
    for place in range(0, len(data), 1 + len(data) // 30):
        changed = bytearray(data)
        changed[place] ^= 0x10
        (tmp_path / "c" / name).write_bytes(changed)
        cache = Cache.open(tmp_path / "c", verify="off")
        for row in range(4):
            try:
                trajectory = cache.trajectory(row)
            except DamagedCacheError as error:
                refused += 1
                assert "trajectories shard 0: row" in str(error)
                assert "`secondcast repair CACHE --from COPY`" in str(error)
                continue
            assert same_bits(trajectory.velocity_KSC, true[row].velocity_KSC)
    assert refused > 3


def test_zarr_python_opens_a_compact_cache_by_the_name_in_its_metadata(tmp_path):
    writer = write_cache(tmp_path / "c", compression="lossless")
    array = zarr.open_array(tmp_path / "c/trajectories.zarr/velocity", mode="r")
    expected = some_arrays(writer.manifest, writer.layout.trajectories[0])["velocity"]
    assert same_bits(np.asarray(array[:4]), expected)
    metadata = json.loads((tmp_path / "c/trajectories.zarr/velocity/zarr.json").read_bytes())
    (sharding,) = metadata["codecs"]
    assert [compression["name"] for compression in sharding["configuration"]["codecs"]] == [
        "secondcast.step_delta",
        "crc32c",
    ]


def test_numcodecs_decodes_a_tensor_of_a_tar_by_its_metadata(tmp_path):
    writer = write_cache(tmp_path / "c", compression="lossless", format="webdataset")
    index = json.loads((tmp_path / "c/trajectories/000000.index.json").read_bytes())
    begin, size = index["safetensors"][0]
    file = tmp_path / "one.safetensors"
    file.write_bytes((tmp_path / "c/trajectories/000000.tar").read_bytes()[begin : begin + size])
    arrays = some_arrays(writer.manifest, writer.layout.trajectories[0])
    with safetensors.safe_open(file, "numpy") as sample:
        configs = json.loads(sample.metadata()["secondcast.codecs"])
        assert set(configs) == {"velocity", "noise", "final_latent"}
        for name, config in configs.items():
            decoded = numcodecs.get_codec(config).decode(sample.get_tensor(name))
            assert same_bits(decoded.view(ml_dtypes.bfloat16), arrays[name][0])


def test_the_entry_points_name_the_codecs():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for group in ("zarr.codecs", "numcodecs.codecs"):
        assert len(groups[group]) == 3
        for name, place in groups[group].items():
            module, attribute = place.split(":")
            compression = getattr(import_module(module), attribute)
            assert getattr(compression, "row_codec", compression).codec_id == name
