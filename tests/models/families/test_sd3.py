"""Stable Diffusion 3 from a folder that diffusers saved: the whole road is StableDiffusion3Pipeline's."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from secondcast.models.families.sd3 import SD3
from secondcast.models.geometry import recorded_geometry
from secondcast.models.teacher.folder import DECODE_PARTS, REPLAY_PARTS, build_parts, find_teacher
from secondcast.storage_schemas.errors import SettingsError, TeacherError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch, to_torch
from tests.cache_builder.building import build_cache
from tests.models.families.random_sd3 import CLIP_WIDTHS, make_sd3

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = ["a red dog on the left", "two cats", "a blue car", "three dogs"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    return make_sd3(tmp_path_factory.mktemp("teachers") / "sd3")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


build = partial(build_cache, batch_size=4, shard_size=4, seed=5)


@pytest.fixture(scope="module")
def recorded(sd3, prompts, tmp_path_factory) -> Path:
    """Not square, in fp32, at several guidance scales."""
    folder = tmp_path_factory.mktemp("caches") / "c"
    build(folder, sd3, prompts, dtype="float32", height=16, width=24)
    return folder


def test_a_cache_has_the_rows_of_both_clips_and_the_negative_prompt_first(recorded):
    cache = Cache.open(recorded)
    manifest = cache.manifest
    assert (manifest.teacher.family, manifest.teacher.pooled, cache.negative) == ("sd3", "clip", 0)
    assert (len(cache.prompts), len(cache), manifest.sampling.negative_prompt) == (len(PROMPTS) + 1, len(PROMPTS), "")
    assert cache.prompts[0].text == "" and manifest.prompts.sources == {"negative": 1, "p": len(PROMPTS)}
    rows = cache.conditioning(1)
    assert {name: row.shape for name, row in rows.items()} == {
        "pooled_projections": (sum(CLIP_WIDTHS) // 2,),
        "clip_hidden_states": (16, sum(CLIP_WIDTHS)),
    }
    assert manifest.sampling.storage.latents == "stored"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24)])
def test_the_recorded_latents_and_text_are_the_unmodified_pipelines(sd3, prompts, tmp_path, dtype, height, width):
    build(tmp_path / "c", sd3, prompts, dtype=dtype, height=height, width=width, guidance="3.5")
    cache = Cache.open(tmp_path / "c")
    trajectories = [cache.trajectory(index) for index in range(len(PROMPTS))]
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, torch_dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    texts = [cache.prompts[t.prompt].text for t in trajectories]
    with torch.no_grad():
        encode = partial(pipeline.encode_prompt, do_classifier_free_guidance=False, max_sequence_length=12)
        # The negative prompt was encoded alone.
        conditional, negative = (encode(prompt, None, None) for prompt in (texts, ""))
    for row, trajectory in enumerate(trajectories):
        stored = cache.conditioning(trajectory.prompt)
        rows, width_of_clip = stored["clip_hidden_states"].shape
        assert same_bits(from_torch(conditional[0][row, :rows, :width_of_clip]), stored["clip_hidden_states"])
        assert same_bits(from_torch(conditional[0][row, rows:]), cache.embedding(trajectory.prompt))
        assert same_bits(from_torch(conditional[2][row]), stored["pooled_projections"])
    geometry = recorded_geometry(cache.manifest.sampling)
    noise_BSC = torch.stack([to_torch(t.noise_SC) for t in trajectories])
    latents = pipeline(
        prompt_embeds=conditional[0], pooled_prompt_embeds=conditional[2],
        negative_prompt_embeds=negative[0].expand_as(conditional[0]),
        negative_pooled_prompt_embeds=negative[2].expand_as(conditional[2]),
        latents=SD3.unpacked(noise_BSC, geometry), height=height, width=width, num_inference_steps=4,
        guidance_scale=3.5, output_type="latent",
    ).images  # fmt: skip
    for trajectory, latent_SC in zip(trajectories, SD3.packed(latents), strict=True):
        assert same_bits(trajectory.final_latent_SC, from_torch(latent_SC))


def test_packing_is_undone_by_unpacking(recorded):
    geometry = recorded_geometry(Cache.open(recorded).manifest.sampling)
    latents = torch.randn(2, 4, 2 * geometry.rows, 2 * geometry.columns)
    packed_BSC = SD3.packed(latents)
    assert packed_BSC.shape == (2, geometry.image_tokens, geometry.channels)
    assert torch.equal(SD3.unpacked(packed_BSC, geometry), latents)
    # A token is a patch: its values are those of 2 x 2 latents.
    assert torch.equal(packed_BSC[0, 1], latents[0, :, :2, 2:4].flatten())


def test_settings_that_the_family_does_not_have_are_refused_in_one_line(sd3, prompts, tmp_path):
    cases = {
        "--pooled is zero, expected clip: Stable Diffusion 3 reads CLIP's pooled vectors; remove it": {
            "pooled": "zero"
        },
        "--latents is derived, expected stored: the latents of Stable Diffusion 3 follow from guided predictions, and "
        "a cache has the conditional ones; remove it": {"latents": "derived"},
        "--guidance has 1, expected scales above 1: Stable Diffusion 3 is sampled with classifier-free guidance, which "
        "StableDiffusion3Pipeline switches off at 1; give larger ones": {"guidance": "3,1"},
        "--no-store-embeddings cannot be used with Stable Diffusion 3: replay needs CLIP's pooled vectors, which are "
        "stored with the embeddings; use --store-embeddings": {"store_embeddings": False},
        "--attention-backend is 'flash', expected none: the transformer of Stable Diffusion 3 always uses torch's own "
        "attention; remove it": {"attention_backend": "flash"},
    }
    for message, flags in cases.items():
        with pytest.raises(SettingsError) as error:
            build(tmp_path / "c", sd3, prompts, **flags)
        assert str(error.value) == message
    with pytest.raises(SettingsError) as error:
        build(tmp_path / "c", sd3, prompts, height=16, width=128)
    assert str(error.value) == (
        f"the image is 128 x 16 px, expected at most 64 px per side: the transformer in {sd3} has embeddings of 16 "
        f"positions per side; give a smaller size"
    )
    with pytest.raises(TeacherError) as error:
        build(tmp_path / "c", sd3, prompts, schedule="distillt5")
    assert str(error.value) == (
        "--schedule is distillt5, expected diffusers: StableDiffusion3Pipeline has no other schedule; remove it"
    )
    assert not (tmp_path / "c").exists()


def test_prompts_longer_than_the_pipelines_limit_are_refused_and_longer_texts_are_cut(sd3, prompts, tmp_path):
    with pytest.raises(SettingsError) as error:
        build(tmp_path / "c", sd3, prompts, text_length=513)
    assert str(error.value) == (
        "--text-length is 513, expected at most 512, the most that StableDiffusion3Pipeline takes or its models were "
        "trained with: give a smaller one"
    )
    build(tmp_path / "c", sd3, prompts, text_length=3, steps=1)
    cache = Cache.open(tmp_path / "c")
    assert cache.embedding(1).shape == (3, 24) and max(len(prompt.token_ids) for prompt in cache.prompts) == 3


def test_predictions_in_8_bits_need_no_flag_because_latents_are_stored(sd3, prompts, tmp_path):
    build(tmp_path / "c", sd3, prompts, compression="int8", steps=2)
    plain = Cache.open(tmp_path / "c")
    assert (plain.manifest.sampling.storage.latents, len(plain)) == ("stored", len(PROMPTS))


def test_clips_are_needed_where_trajectories_begin_and_nowhere_else(sd3, tmp_path):
    for part in sd3.iterdir():
        if part.name not in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            (tmp_path / part.name).symlink_to(part)
    for parts in ((*REPLAY_PARTS, *DECODE_PARTS), ("large_text_encoder", "large_tokenizer")):
        assert find_teacher(str(tmp_path), parts).family is SD3
    for parts in (build_parts(None), ("transformer", "scheduler", "vae")):
        with pytest.raises(TeacherError) as error:
            find_teacher(str(tmp_path), parts)
        assert str(error.value).startswith(f"{tmp_path} has no text_encoder/, expected a folder in the Stable")


def test_another_transformer_or_clip_is_refused_by_its_file(sd3, tmp_path):
    for change, message in (
        ({"out_channels": 8}, "has in_channels = 4 and out_channels = 8, expected equal numbers"),
        ({"patch_size": 1}, "has patch_size = 1, expected 2: it is none of stable-diffusion-3-medium-diffusers, "),
        ({"_class_name": "FluxTransformer2DModel"}, "has _class_name = 'FluxTransformer2DModel', expected "),
    ):
        folder = tmp_path / next(iter(change))
        folder.mkdir()
        for part in sd3.iterdir():
            (folder / part.name).symlink_to(part)
        (folder / "transformer").unlink()
        (folder / "transformer").mkdir()
        config = json.loads((sd3 / "transformer/config.json").read_text())
        (folder / "transformer/config.json").write_text(json.dumps(config | change))
        with pytest.raises(TeacherError, match=message):
            find_teacher(str(folder), build_parts("clip"))
