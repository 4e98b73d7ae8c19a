"""--text-length, --pooled, --schedule, --height, --width, --attention-backend: recorded, exact, refused in one line."""

import gc
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from transformers import CLIPTextModel, T5EncoderModel

from secondcast.cache_builder import sample_stage
from secondcast.cache_builder.repair.rebuild import rebuild
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import build_parts, find_teacher
from secondcast.storage_schemas.errors import DamagedCacheError, SettingsError, SettingsMismatchError
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.tensors import to_torch
from tests.cache_builder.building import build_cache, data_files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("a red dog\ntwo cats and a car on the left of a bench that says 'xyz'\na blue sign\na green dog\n")
    return file


@pytest.fixture(scope="module")
def clip_cache(tmp_path_factory, dev_teacher, prompts) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "c"
    flags = {"text_length": 20, "pooled": "clip", "schedule": "distillt5", "height": 16, "width": 24}
    build_cache(folder, dev_teacher, prompts, dtype="float32", **flags)
    return folder


def encoded_by_the_pipeline(folder: Path, dtype: str, texts: list[str], length: int) -> tuple[torch.Tensor, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype], local_files_only=True)
    with torch.no_grad():
        return pipeline.encode_prompt(texts, None, max_sequence_length=length)[:2]


@pytest.mark.thorough
@pytest.mark.parametrize("teacher", ["dev_teacher", "schnell_teacher"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_text_equals_encode_prompt_bit_for_bit_at_the_same_batch_size(
    tmp_path, prompts, teacher, dtype, request
):
    folder = request.getfixturevalue(teacher)
    build_cache(tmp_path / "c", folder, prompts, dtype=dtype, text_length=40, pooled="clip", steps=1, batch_size=2)
    cache = Cache.open(tmp_path / "c")
    assert cache.manifest.teacher.text_length == 40 and len(cache.prompts[1].token_ids) > 12
    for first in (0, 2):
        # A shard holds three: the fourth prompt is a batch of its own.
        rows = range(first, min(first + 2, 3))
        texts = [cache.prompts[number].text for number in rows]
        embedding_BTD, pooled_BP = encoded_by_the_pipeline(folder, dtype, texts, 40)
        assert torch.equal(torch.stack([to_torch(cache.embedding(number)) for number in rows]), embedding_BTD)
        assert torch.equal(
            torch.stack([to_torch(cache.conditioning(number)["pooled_projections"]) for number in rows]), pooled_BP
        )


def test_each_flag_lands_in_the_manifest(clip_cache, dev_teacher):
    manifest = Cache.open(clip_cache).manifest
    teacher, sampling = manifest.teacher, manifest.sampling
    assert (teacher.text_length, teacher.pooled, teacher.pooled_width) == (20, "clip", 8)
    assert teacher.pooled_encoder_config["hidden_size"] == 8
    assert {"tokenizer.json", "tokenizer_config.json"} <= teacher.pooled_tokenizer.keys()
    assert "text_encoder/model.safetensors" in teacher.weights
    assert (sampling.height, sampling.width, sampling.image_tokens) == (16, 24, 24)
    assert sampling.schedule == "distillt5" and sampling.timesteps[-1] < 0.005


@pytest.mark.thorough
def test_without_the_flags_the_manifest_is_as_it_always_was(tmp_path, dev_teacher, prompts):
    build_cache(tmp_path / "c", dev_teacher, prompts, steps=1)
    written = json.loads((tmp_path / "c/manifest.json").read_bytes())
    assert not {"pooled_encoder_config", "pooled_tokenizer"} & written["teacher"].keys()
    assert "text_encoder/model.safetensors" not in written["teacher"]["weights"]
    assert (written["teacher"]["pooled"], written["sampling"]["schedule"]) == ("zero", "diffusers")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"pooled": "zero"}, r'teacher\.pooled = "clip", requested "zero": every recorded number depends on it'),
        ({"text_length": 21}, r"teacher\.text_length = 20, requested 21"),
        ({"schedule": "diffusers"}, r'sampling\.schedule = "distillt5", requested "diffusers"'),
    ],
)
def test_other_flags_on_the_same_cache_are_refused(clip_cache, dev_teacher, prompts, flags, field):
    given = {"text_length": 20, "pooled": "clip", "schedule": "distillt5", "height": 16, "width": 24} | flags
    with pytest.raises(SettingsMismatchError, match=field):
        build_cache(clip_cache, dev_teacher, prompts, dtype="float32", **given)


@pytest.mark.thorough
def test_both_text_encoders_are_gone_before_flux_samples(tmp_path, dev_teacher, prompts, monkeypatch):
    seen = []
    real = sample_stage.sample

    def watching(*arguments):
        seen.append(sum(type(thing) in (T5EncoderModel, CLIPTextModel) for thing in gc.get_objects()))
        return real(*arguments)

    monkeypatch.setattr(sample_stage, "sample", watching)
    build_cache(tmp_path / "c", dev_teacher, prompts, pooled="clip", steps=1)
    assert seen == [0] * 3


@pytest.mark.thorough
def test_a_lost_shard_with_pooled_vectors_is_rebuilt_to_the_same_bytes(tmp_path, clip_cache, dev_teacher):
    cache = shutil.copytree(clip_cache, tmp_path / "c")
    for name in ("embeddings.zarr/pooled_projections/c/0/0", "trajectories.zarr/velocity/c/0/0/0/0"):
        (cache / name).unlink()
    teacher = find_teacher(str(dev_teacher), build_parts("clip"))
    rebuilt = rebuild(cache, teacher, CPU, Silent(), batch_size=None, allow_mismatch=False)
    assert rebuilt == [("embeddings", 0), ("trajectories", 0)]
    assert data_files(cache) == data_files(clip_cache) and not verify(cache, Silent()).problems


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"text_length": 513},
            "^--text-length is 513, expected at most 512, the most that FluxPipeline takes or "
            "its models were trained with: give a smaller one$",
        ),
        ({"text_length": 0}, r"--text-length is 0, expected at least 1"),
        (
            {"pooled": "clip", "store_embeddings": False},
            "^--pooled clip is incompatible with --no-store-embeddings: replay needs",
        ),
        ({"height": 16}, "^--height is given without --width: give both, or --resolution for a square$"),
        ({"width": 16}, "^--width is given without --height: give both"),
        (
            {"height": 16, "width": 16, "resolution": 16},
            "^--resolution is given together with --height and --width: give one",
        ),
        ({"height": 18, "width": 16}, "height is 18, expected a multiple of 4: .*; use 16 or 20"),
        ({"height": 16, "width": 3}, "width is 3, expected a multiple of 4: .*; use 4 or 8"),
        ({"schedule": "linear"}, r"--schedule is 'linear', expected 'diffusers' or 'distillt5'"),
        (
            {"attention_backend": "flush"},
            "^--attention-backend 'flush' is unknown to diffusers, expected one of .*, flash, ",
        ),
        (
            {"attention_backend": "flash"},
            r"^--attention-backend 'flash' does not work on cpu in bfloat16 \(.*`flash-attn.*: install its package",
        ),
        ({"attention_backend": "_native_cudnn"}, "^--attention-backend '_native_cudnn' does not work on cpu"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path, dev_teacher, prompts, flags, message):
    with pytest.raises(SettingsError, match=message) as caught:
        build_cache(tmp_path / "c", dev_teacher, prompts, **flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.thorough
def test_another_attention_backend_is_recorded_goes_on_and_is_said(tmp_path, dev_teacher, prompts):
    default = _AttentionBackendRegistry._active_backend
    build_cache(tmp_path / "c", dev_teacher, prompts, attention_backend="_native_math", dtype="float32")
    assert _AttentionBackendRegistry._active_backend is default
    made = [json.loads(p.read_bytes())["provenance"] for p in sorted((tmp_path / "c/commits").glob("*-0*.json"))]
    assert [one["attention"] for one in made] == ["sdpa"] * 2 + ["_native_math"] * 2
    (tmp_path / "c/commits/index.json").unlink()
    (tmp_path / "c/commits/trajectories-000001.json").unlink()
    heard = Heard()
    build_cache(tmp_path / "c", dev_teacher, prompts, progress=heard, batch_size=1, dtype="float32")
    (line,) = [line for line in heard.lines if "settings other than" in line]
    assert line == (
        f"{tmp_path / 'c'}: the remaining trajectories are made with settings other than the committed ones "
        f"(attention _native_math "
        f"-> sdpa, batch_size 2 -> 1): the build resumes, but identical bytes are guaranteed only where these agree"
    )
    again = Heard()
    build_cache(tmp_path / "c", dev_teacher, prompts, progress=again, batch_size=1, dtype="float32")
    assert not [line for line in again.lines if "settings other than" in line] and Cache.open(tmp_path / "c").finished


@pytest.mark.thorough
def test_the_same_command_given_again_warns_of_nothing(tmp_path, dev_teacher, prompts):
    build_cache(tmp_path / "c", dev_teacher, prompts, steps=1, attention_backend="native")
    (tmp_path / "c/commits/index.json").unlink()
    (tmp_path / "c/commits/trajectories-000001.json").unlink()
    heard = Heard()
    build_cache(tmp_path / "c", dev_teacher, prompts, steps=1, progress=heard)
    assert not [line for line in heard.lines if "settings other than" in line]


@pytest.mark.thorough
def test_a_rebuild_takes_the_attention_backend_of_the_record(tmp_path, dev_teacher, prompts):
    cache = tmp_path / "c"
    build_cache(cache, dev_teacher, prompts, attention_backend="_native_math", dtype="float32", resolution=16)
    before = data_files(cache)
    (cache / "trajectories.zarr/velocity/c/1/0/0/0").unlink()
    teacher = find_teacher(str(dev_teacher), build_parts("zero"))
    rebuild(cache, teacher, CPU, Silent(), batch_size=None, allow_mismatch=False)
    assert data_files(cache) == before
    record = json.loads((cache / "commits/trajectories-000001.json").read_bytes())
    assert record["provenance"]["attention"] == "_native_math"


@pytest.mark.thorough
def test_a_rebuild_where_the_recorded_backend_does_not_run_says_so(tmp_path, dev_teacher, prompts, monkeypatch):
    cache = tmp_path / "c"
    build_cache(cache, dev_teacher, prompts, steps=1, attention_backend="_native_math")
    (cache / "trajectories.zarr/velocity/c/1/0/0/0").unlink()
    monkeypatch.setattr("secondcast.cache_builder.teacher_models.backend_of_record", lambda name: "flash")
    teacher = find_teacher(str(dev_teacher), build_parts("zero"))
    with pytest.raises(
        DamagedCacheError, match="attention _native_math, which does not work here: rebuild on the mach"
    ):
        rebuild(cache, teacher, CPU, Silent(), batch_size=None, allow_mismatch=False)
    rebuild(cache, teacher, CPU, Silent(), batch_size=None, allow_mismatch=True)
    record = json.loads((cache / "commits/trajectories-000001.json").read_bytes())
    assert record["provenance"]["attention"] == "sdpa" and not verify(cache, Silent()).problems
