"""What does each codec save, and how fast is it? Prints markdown tables.

Example: taskset -c 0 python benchmarks/codecs.py

Synthetic trajectories at 512 px shapes: the exact velocity of a Gaussian process (spectrum 1/f plus a white replay
error)
along FLUX's sigmas, bf16 Euler, white noise of 0.5, 2 or 8 % of std(v) on each prediction. And the pocket teacher's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numcodecs.zstd import Zstd

from secondcast.storage_schemas.codecs.byte_planes import BITS, BytePlanes, compress, decompress, from_planes, planes_of
from secondcast.storage_schemas.codecs.step_delta import StepDelta, _ordered, _unzigzag, _zigzag
from secondcast.storage_schemas.codecs.step_int8 import StepInt8
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.derivation import derive_latents, euler_step, step_sizes
from secondcast.storage_schemas.schema.fields import DTYPES, Arrays, fields_of
from secondcast.storage_schemas.schema.manifest import Manifest, PromptSet, Segment, Teacher
from secondcast.storage_schemas.schema.prompts import Prompt, prompt_id
from secondcast.storage_schemas.schema.recording import Sampling, Storage
from secondcast.storage_schemas.writer import CacheWriter, prompt_set_fields

STEPS, SIDE, CHANNELS, MU, REPLAY_ERROR = 20, 32, 64, 0.63, 0.1
TEXT, WIDTH = 77, 4096
ROOT = Path(__file__).resolve().parents[1]
Coding = tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]


def flux_sigmas() -> np.ndarray:
    linear = np.linspace(1.0, 1 / STEPS, STEPS)
    return np.append(np.exp(MU) / (np.exp(MU) + 1 / linear - 1), 0).astype(np.float32)


def synthetic(rng: np.random.Generator, drift: float) -> Arrays:
    """One trajectory: noise and final_latent [S, C], velocity and hidden_states [K, S, C], bfloat16."""
    frequency = np.fft.fftfreq(SIDE) * SIDE
    radius = np.maximum(np.hypot(frequency[:, None], frequency[None, :]), 1)
    power = (1 - REPLAY_ERROR) / radius / np.mean(1 / radius) + REPLAY_ERROR
    sigmas = flux_sigmas()
    dtype = DTYPES["bfloat16"]
    x = rng.standard_normal((SIDE, SIDE, CHANNELS), dtype=np.float32).astype(dtype)
    latents, velocity = [x], []
    for sigma, dt in zip(sigmas[:-1].astype(float), step_sizes(sigmas, dtype), strict=True):
        gain = (sigma - (1 - sigma) * power) / ((1 - sigma) ** 2 * power + sigma**2)
        waves = np.fft.fft2(latents[-1].astype(np.float32), axes=(0, 1)) * gain[..., None]
        v = np.fft.ifft2(waves, axes=(0, 1)).real
        v = (v + drift * v.std() * rng.standard_normal(v.shape)).astype(np.float32).astype(dtype)
        velocity.append(v)
        latents.append(euler_step(latents[-1], v, dt))
    flat = np.stack(latents).reshape(STEPS + 1, -1, CHANNELS)
    walk = np.stack(velocity).reshape(STEPS, -1, CHANNELS)
    return {"noise": flat[0], "velocity": walk, "final_latent": flat[-1], "hidden_states": flat[:-1]}


def codings(shape: tuple[int, ...], dtype: str) -> dict[str, Coding]:
    """Encode and decode of a velocity [K, S, C] by the name in the table."""
    bits, zstd = BITS[dtype], Zstd(level=1, checksum=True)

    def as_bits(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).view(bits)

    def plain_zstd(data: bytes) -> np.ndarray:
        return np.frombuffer(zstd.decode(data), bits).reshape(shape)

    def one_frame(array: np.ndarray) -> bytes:
        return zstd.encode(np.concatenate(planes_of(as_bits(array).reshape(-1))))

    def one_frame_back(data: bytes) -> np.ndarray:
        planes = np.frombuffer(zstd.decode(data), np.uint8).reshape(bits.itemsize, -1)
        return from_planes(list(planes), bits).reshape(shape)

    def difference(order: int) -> Coding:
        def encode(array: np.ndarray) -> bytes:
            values = _ordered(as_bits(array))
            for _ in range(order):
                values[1:] -= values[:-1].copy()
            return compress(planes_of(_zigzag(values).reshape(-1)), 1)

        def decode(data: bytes) -> np.ndarray:
            count = int(np.prod(shape))
            values = _unzigzag(from_planes(decompress(memoryview(data), [count] * bits.itemsize), bits)).reshape(shape)
            for _ in range(order):
                np.cumsum(values, axis=0, out=values, dtype=bits)
            return _ordered(values)

        return encode, decode

    def xor(array: np.ndarray) -> bytes:
        values = as_bits(array).copy()
        values[1:] ^= as_bits(array)[:-1]
        return compress(planes_of(values.reshape(-1)), 1)

    def xor_back(data: bytes) -> np.ndarray:
        count = int(np.prod(shape))
        values = from_planes(decompress(memoryview(data), [count] * bits.itemsize), bits).reshape(shape)
        return np.bitwise_xor.accumulate(values, axis=0)

    planes = BytePlanes(shape=shape, dtype=dtype)
    delta, int8 = StepDelta(shape=shape, dtype=dtype), StepInt8(shape=shape, dtype=dtype)
    return {
        "none": (lambda a: as_bits(a).tobytes(), lambda d: np.frombuffer(d, bits).reshape(shape).copy()),
        "zstd": (lambda a: bytes(zstd.encode(as_bits(a))), plain_zstd),
        "byte planes, one frame": (one_frame, one_frame_back),
        "byte planes, a frame each": (planes.encode, planes.decode),
        "XOR of steps": (xor, xor_back),
        "first difference": difference(1),
        "second difference": difference(2),
        "compact: predicted difference": (delta.encode, delta.decode),
        "int8": (int8.encode, int8.decode),
    }


def others_bytes(name: str, arrays: Arrays, embedding: np.ndarray) -> tuple[int, int]:
    """Bytes of all but the velocity, and of one embedding, as this codec would keep them."""

    def kept(array: np.ndarray) -> int:
        if name == "none":
            return array.nbytes
        if name == "zstd":
            return len(Zstd(level=1, checksum=True).encode(array.view(BITS[array.dtype.name])))
        return len(BytePlanes(shape=array.shape, dtype=array.dtype.name).encode(array))

    start = kept(arrays["noise"])
    if name == "int8":  # latents cannot be derived then
        walk = arrays["hidden_states"]
        start = len(StepDelta(shape=walk.shape, dtype=walk.dtype.name).encode(walk))
    return start + kept(arrays["final_latent"]), kept(embedding)


def fastest(work: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest of several tries."""
    seconds = []
    for _ in range(tries):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def relative_error(read: np.ndarray, true: np.ndarray) -> float:
    difference = read.astype(np.float32) - true.astype(np.float32)
    return float(np.linalg.norm(difference) / np.linalg.norm(true.astype(np.float32)))


def table(label: str, samples: list[Arrays], embedding: np.ndarray, tries: int) -> list[str]:
    """A row per codec over these trajectories."""
    first = samples[0]["velocity"]
    rows = []
    for name, (encode, decode) in codings(first.shape, first.dtype.name).items():
        velocity = rest = raw = 0
        exact, errors = True, []
        for arrays in samples:
            data = encode(arrays["velocity"])
            read = decode(data).view(first.dtype)
            exact &= read.tobytes() == arrays["velocity"].tobytes()
            errors.append(relative_error(read, arrays["velocity"]))
            other, text = others_bytes(name, arrays, embedding)
            velocity, rest = velocity + len(data), rest + other
            raw += (2 * len(first) + 1) * arrays["noise"].nbytes
        encode_mb = first.nbytes / fastest(lambda e=encode: e(first), tries) / 1e6
        encoded = encode(first)
        decode_mb = first.nbytes / fastest(lambda d=decode, e=encoded: d(e), tries) / 1e6
        count = len(samples)
        bits = "yes" if exact else f"no, error of v {100 * np.mean(errors):.2f} %"
        with_text = (velocity + rest + count * text) / (raw + count * embedding.nbytes)
        rows.append(
            f"| {name} | {label} | {velocity / (count * first.nbytes):.3f} | {(velocity + rest) / raw:.3f} | "
            f"{with_text:.3f} | {bits} | {encode_mb:.0f} | {decode_mb:.0f} |"
        )
    return rows


def derived_final(samples: list[Arrays]) -> str:
    """What keeping the final latent as its XOR with the derived one would save."""
    saved = raw = 0
    for arrays in samples:
        derived = derive_latents(arrays["noise"], arrays["velocity"], flux_sigmas())[-1]
        codec = BytePlanes(shape=derived.shape, dtype="bfloat16")
        difference = derived.view("<u2") ^ arrays["final_latent"].view("<u2")
        saved += len(codec.encode(arrays["final_latent"])) - len(codec.encode(difference))
        raw += (2 * STEPS + 1) * derived.nbytes
    return f"The final latent as its XOR with the derived one would save {saved / raw:.3f} more."


def some_manifest(prompts: list[Prompt], form: str, codec: str) -> Manifest:
    sigmas = tuple(flux_sigmas().astype(float).tolist())
    latents = "stored" if codec == "int8" else "derived"
    return Manifest(
        source="benchmark", created_by="benchmark",
        teacher=Teacher(
            family="flux", weights={}, backbone_config={}, text_encoder_config={}, tokenizer={}, text_length=TEXT,
            text_width=WIDTH, pad_token_id=0, pooled="zero", pooled_width=768,
        ),
        sampling=Sampling(
            height=512, width=512, image_tokens=SIDE * SIDE, channels=CHANNELS, steps=STEPS, schedule="diffusers",
            sigmas=sigmas, timesteps=sigmas[:-1], guidance=None, seed=0, noise="philox-float32", dtype="bfloat16",
            latent_rule="flow-match-euler", storage=Storage(format=form, compression=codec, latents=latents),
        ),
        prompts=PromptSet(
            segments=(
                Segment(
                    first_prompt=0, prompts=len(prompts), first_sample=0, samples_per_prompt=1, shard_size=len(prompts),
                ),
            ),
            **prompt_set_fields(prompts),
        ),
        metadata={},
    )  # fmt: skip


def read_speed(folder: Path, samples: list[Arrays], form: str, codec: str, tries: int) -> str:
    """MB/s of decoded velocity and noise through Cache, in sequence and at random."""
    texts = [f"prompt {i}" for i in range(len(samples))]
    prompts = [Prompt(id=prompt_id(t), text=t, sources=("b",), token_ids=(1,)) for t in texts]
    path = folder / f"{form}-{codec}"
    writer = CacheWriter.create_or_resume(path, some_manifest(prompts, form, codec), prompts, {})
    (shard,) = writer.missing("trajectories")
    names = [field.name for field in fields_of(writer.manifest, "trajectories")]
    arrays = {name: np.stack([sample[name] for sample in samples]) for name in names}
    writer.commit("trajectories", shard, arrays, seconds=0, provenance={})
    cache = Cache.open(path)
    cache.trajectory(0)  # the checksum of the files, once
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    raw = arrays["velocity"].nbytes + arrays["noise" if "noise" in arrays else "hidden_states"].nbytes
    raw += arrays["final_latent"].nbytes
    in_order = raw / fastest(lambda: [cache.trajectory(i) for i in range(len(samples))], tries) / 1e6
    at_random = raw / fastest(lambda: [cache.trajectory(i) for i in order], tries) / 1e6
    return f"| {form} | {codec} | {in_order:.0f} | {at_random:.0f} | {1e3 * raw / len(samples) / at_random / 1e6:.1f} |"


def pocket(folder: Path, dtype: str, count: int) -> tuple[list[Arrays], np.ndarray]:
    """Predictions of the embedded pocket teacher, recorded by `secondcast build`, and one embedding."""
    command = [sys.executable, str(ROOT / "cli.py")]
    prompts, path = folder / f"{dtype}.txt", folder / dtype
    flags = ["--teacher", "pocket", "--prompts", prompts, "--dtype", dtype, "--compression", "none", "--device", "cpu"]
    flags += ["--latents", "stored", "--quiet"]
    for words in (["prompts", "pocket", prompts, "--num-prompts", count], ["build", path, *flags]):
        subprocess.run([*command, *map(str, words)], check=True, stdout=sys.stderr, cwd=ROOT)
    cache = Cache.open(path)
    samples = []
    for index in range(count):
        t = cache.trajectory(index)
        samples.append(
            {
                "noise": t.noise_SC,
                "velocity": t.velocity_KSC,
                "final_latent": t.final_latent_SC,
                "hidden_states": t.hidden_states_KSC,
            }
        )
    return samples, cache.embedding(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-prompts", type=int, default=4, help="synthetic trajectories per drift")
    parser.add_argument("--read", type=int, default=24, help="synthetic trajectories to read")
    parser.add_argument("--tries", type=int, default=7, help="the fastest of so many is told")
    given = parser.parse_args()
    embedding = np.random.default_rng(9).standard_normal((TEXT, WIDTH), dtype=np.float32).astype(DTYPES["bfloat16"])
    print("| codec | signal | velocity | trajectory | with an embedding | bits exact | encode MB/s | decode MB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for drift in (0.005, 0.02, 0.08):
        rng = np.random.default_rng(1)
        samples = [synthetic(rng, drift) for _ in range(given.num_prompts)]
        print("\n".join(table(f"drift {100 * drift:g} %", samples, embedding, given.tries)), flush=True)
        saving = derived_final(samples)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in ("bfloat16", "float32"):
            print("\n".join(table(f"pocket, {dtype}", *pocket(folder, dtype, 48), given.tries)), flush=True)
        print(f"\n{saving}\n\n| format | codec | in sequence MB/s | at random MB/s | ms per trajectory |")
        print("|---|---|---|---|---|")
        rng = np.random.default_rng(2)
        samples = [synthetic(rng, 0.02) for _ in range(given.read)]
        for form in ("zarr", "webdataset"):
            for codec in ("none", "lossless", "int8"):
                print(read_speed(folder, samples, form, codec, given.tries), flush=True)


if __name__ == "__main__":
    main()
