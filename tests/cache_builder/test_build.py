"""Phase 1: N asked for are N in the cache; nothing committed is lost; bytes do not depend on interruption."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import T5EncoderModel

from secondcast.cache_builder import sample_stage
from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.schedule import DTYPES
from secondcast.storage_schemas.errors import NonFiniteError, SettingsError, SettingsMismatchError, TeacherError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch, to_torch
from tests.cache_builder.building import build_cache, data_files

ROOT = Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])


class StopAfter(Silent):
    """Ctrl-C while the n-th batch is shown."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def bar(self, title, **counts):
        return nullcontext(self if title == "sample" else Silent())

    def advance(self, count, note=""):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.thorough
def test_as_many_trajectories_as_distinct_prompts_times_samples(tmp_path, dev_teacher):
    file = tmp_path / "p.txt"
    file.write_text("a dog\na cat\n\na dog\na red car\n")
    result = build_cache(tmp_path / "c", dev_teacher, file, samples_per_prompt=3)
    cache = Cache.open(tmp_path / "c")
    assert result.trajectories == len(cache) == cache.planned == 9 and cache.finished
    keys = {cache.trajectory(i).key for i in range(9)}
    assert len(keys) == 9
    noises = {cache.trajectory(i).noise_SC.tobytes() for i in range(9)}
    assert len(noises) == 9


@pytest.mark.thorough
def test_both_formats_record_the_same(tmp_path, dev_teacher, prompt_file):
    for form in ("zarr", "webdataset"):
        build_cache(tmp_path / form, dev_teacher, prompt_file, format=form)
    a, b = Cache.open(tmp_path / "zarr"), Cache.open(tmp_path / "webdataset")
    for i in range(6):
        one, other = a.trajectory(i), b.trajectory(i)
        assert (one.key, one.guidance) == (other.key, other.guidance)
        assert same_bits(one.velocity_KSC, other.velocity_KSC) and same_bits(one.noise_SC, other.noise_SC)
        assert same_bits(a.embedding(i), b.embedding(i))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_latents_are_the_derived_ones(tmp_path, dev_teacher, prompt_file, dtype):
    for latents in ("stored", "derived"):
        build_cache(tmp_path / latents, dev_teacher, prompt_file, latents=latents, dtype=dtype)
    stored, derived = Cache.open(tmp_path / "stored"), Cache.open(tmp_path / "derived")
    for i in range(6):
        assert same_bits(stored.trajectory(i).hidden_states_KSC, derived.trajectory(i).hidden_states_KSC)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_replaying_the_cached_embedding_gives_the_cached_velocity_bit_for_bit(
    tmp_path, dev_teacher, prompt_file, dtype
):
    build_cache(tmp_path / "c", dev_teacher, prompt_file, dtype=dtype, batch_size=3)
    cache = Cache.open(tmp_path / "c")
    sampling = cache.manifest.sampling
    backbone = Backbone.load(
        dev_teacher, recorded_geometry(sampling), text_length=12, dtype=DTYPES[dtype], device=torch.device("cpu")
    )
    rows = [cache.trajectory(i) for i in range(3)]
    embedding_BTD = torch.stack([to_torch(cache.embedding(t.prompt)) for t in rows])
    for k, timestep in enumerate(sampling.timesteps):
        with torch.no_grad():
            velocity_BSC = backbone.predict(
                torch.stack([to_torch(t.hidden_states_KSC[k]) for t in rows]),
                embedding_BTD,
                backbone.zero_pooled(3),
                torch.full((3,), timestep, dtype=DTYPES[dtype]),
                torch.tensor([t.guidance for t in rows]),
            )
        for row, trajectory in enumerate(rows):
            assert same_bits(from_torch(velocity_BSC[row]), trajectory.velocity_KSC[k])


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_interrupted_and_resumed_it_is_byte_identical(tmp_path, dev_teacher, prompt_file, form, batches):
    build_cache(tmp_path / "whole", dev_teacher, prompt_file, format=form)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "cut", dev_teacher, prompt_file, format=form, progress=StopAfter(batches))
    assert not Cache.open(tmp_path / "cut").finished
    build_cache(tmp_path / "cut", dev_teacher, prompt_file, format=form)
    assert Cache.open(tmp_path / "cut").finished
    assert data_files(tmp_path / "cut") == data_files(tmp_path / "whole")


@pytest.mark.slow
def test_killed_by_the_system_in_mid_build_it_goes_on_and_is_byte_identical(tmp_path, dev_teacher):
    file = tmp_path / "p.txt"
    file.write_text("".join(f"a red dog and {i} cats\n" for i in range(30)))
    words = ["build", str(tmp_path / "cut"), "--teacher", str(dev_teacher), "--prompts", str(file)]
    words += ["--shard-size", "2", "--batch-size", "2", "--steps", "8", "--device", "cpu"]
    command = [sys.executable, "-c", "from secondcast import cli; cli.main()", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    commits = tmp_path / "cut/commits"
    while len(list(commits.glob("trajectories-*.json"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.read_bytes() for p in commits.glob("*.json")}
    assert 0 < len(Cache.open(tmp_path / "cut")) < 30
    build_cache(tmp_path / "cut", dev_teacher, file, shard_size=2, batch_size=2, steps=8)
    build_cache(tmp_path / "whole", dev_teacher, file, shard_size=2, batch_size=2, steps=8)
    assert {name: (commits / name).read_bytes() for name in kept} == kept
    assert data_files(tmp_path / "cut") == data_files(tmp_path / "whole")


def test_a_finished_build_given_again_does_nothing(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")}
    assert build_cache(tmp_path / "c", dev_teacher, prompt_file).trajectories == 6
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")} == before


def test_no_text_encoder_is_alive_while_sampling(tmp_path, dev_teacher, prompt_file, monkeypatch):
    seen = []
    real = sample_stage.sample

    def watching(*arguments):
        seen.append(sum(isinstance(thing, T5EncoderModel) for thing in gc.get_objects()))
        return real(*arguments)

    monkeypatch.setattr(sample_stage, "sample", watching)
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    assert seen == [0] * 4


def test_other_settings_on_the_same_cache_are_refused(tmp_path, dev_teacher, schnell_teacher, prompt_file):
    build_cache(tmp_path / "c", dev_teacher, prompt_file)
    before = data_files(tmp_path / "c")
    with pytest.raises(SettingsMismatchError, match="was built with sampling.seed = 0, requested 9"):
        build_cache(tmp_path / "c", dev_teacher, prompt_file, seed=9)
    with pytest.raises(SettingsMismatchError, match=r"was built with teacher\.\S+ = "):
        build_cache(tmp_path / "c", schnell_teacher, prompt_file)
    prompt_file.write_text("another prompt\n")
    with pytest.raises(SettingsMismatchError, match=r"prompts\.\S+ = .*: the order of all trajectories depends on it"):
        build_cache(tmp_path / "c", dev_teacher, prompt_file)
    assert data_files(tmp_path / "c") == before


def test_the_batch_size_may_change_on_resume(tmp_path, dev_teacher, prompt_file):
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", dev_teacher, prompt_file, progress=StopAfter(3))
    build_cache(tmp_path / "c", dev_teacher, prompt_file, batch_size=1)
    sizes = [
        json.loads(p.read_bytes())["provenance"]["batch_size"] for p in sorted((tmp_path / "c/commits").glob("traj*"))
    ]
    assert sizes == [2, 1]


def test_a_commit_says_what_dtype_the_weights_were_cast_from(tmp_path, dev_teacher, prompt_file):
    for dtype, expected in (("bfloat16", {None}), ("float32", {"bfloat16"})):
        build_cache(tmp_path / dtype, dev_teacher, prompt_file, limit=2, steps=1, dtype=dtype)
        records = Cache.open(tmp_path / dtype).records.values()
        assert {record.provenance.get("cast_from") for record in records} == expected
        assert {record.kind for record in records} == {"embeddings", "trajectories"}


def test_schnell_takes_no_guidance_and_none_is_stored(tmp_path, schnell_teacher, prompt_file):
    build_cache(tmp_path / "c", schnell_teacher, prompt_file)
    cache = Cache.open(tmp_path / "c")
    assert cache.manifest.sampling.guidance is None and cache.trajectory(0).guidance is None


@pytest.mark.thorough
def test_an_overflowing_teacher_stops_the_build_and_names_the_prompt(tmp_path, dev_teacher, prompt_file):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(dev_teacher, broken)
    file = broken / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] = torch.full_like(weights["proj_out.bias"], float("nan"))
    save_file(weights, file)
    with pytest.raises(NonFiniteError, match=r"\('a red dog on the left'\) is not finite"):
        build_cache(tmp_path / "c", broken, prompt_file)
    assert len(Cache.open(tmp_path / "c")) == 0


def test_a_build_without_a_device_is_refused_before_anything_is_written(tmp_path, dev_teacher, prompt_file):
    with pytest.raises(SettingsError, match=r"^build has device None, expected a torch.device: OneProcess computes on"):
        build_cache(tmp_path / "c", dev_teacher, prompt_file, device=None)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resolution": 30}, "height is 30, expected a multiple of 4: .*; use 28 or 32"),
        ({"steps": 0}, r"--steps is 0, expected at least 1"),
        ({"shard_size": 0}, "--shard-size is 0, expected at least 1"),
        ({"colour": "red"}, "--colour is an unknown key .its value is .red.."),
    ],
)
def test_settings_out_of_range_are_refused_by_name(tmp_path, dev_teacher, prompt_file, flags, message):
    with pytest.raises(SettingsError, match=message):
        build_cache(tmp_path / "c", dev_teacher, prompt_file, **flags)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "tokenizer_2", "scheduler", "vae"])
def test_a_teacher_without_a_part_is_refused_by_its_name(tmp_path, dev_teacher, prompt_file, part):
    shutil.copytree(dev_teacher, tmp_path / "t")
    shutil.rmtree(tmp_path / "t" / part)
    with pytest.raises(TeacherError, match=f"has no {part}/, expected a folder in the FluxPipeline layout"):
        build_cache(tmp_path / "c", tmp_path / "t", prompt_file)


def test_an_unknown_teacher_is_refused(tmp_path, prompt_file):
    with pytest.raises(
        TeacherError,
        match="no teacher 'nobody': there is no such folder; give 'pocket', an existing folder, or a hub name",
    ):
        build_cache(tmp_path / "c", "nobody", prompt_file)
