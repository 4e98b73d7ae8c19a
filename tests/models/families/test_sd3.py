"""Stable Diffusion 3 from a folder that diffusers saved: the whole road is StableDiffusion3Pipeline's."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from secondcast.cache_builder.checks.equivalence import check_equivalence
from secondcast.cache_builder.teacher_models import load_backbone
from secondcast.models.backbone import Backbone
from secondcast.models.families.sd3 import SD3
from secondcast.models.families.text import Text, recorded_text
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.student.student import load_student
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


def backbone_of(cache: Cache, teacher: Path, **options: Any) -> Backbone:
    sampling = cache.manifest.sampling
    return Backbone.load(
        teacher,
        recorded_geometry(sampling),
        text_length=cache.manifest.teacher.text_length,
        dtype=DTYPES[sampling.dtype],
        device=CPU,
        options=MemoryOptions(**options),
        pooled_varies=True,
    )


def first_calls(cache: Cache, k: int) -> tuple[torch.Tensor, Text, torch.Tensor]:
    """Latents, text and timesteps of all trajectories at step k."""
    trajectories = [cache.trajectory(index) for index in range(len(cache))]
    x_BSC = torch.stack([to_torch(t.hidden_states_KSC[k]) for t in trajectories])
    timestep_B = torch.full((len(x_BSC),), cache.manifest.sampling.timesteps[k])
    return x_BSC, recorded_text(cache, [t.prompt for t in trajectories]), timestep_B


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


def test_the_checks_of_a_pilot_hold_in_both_halves_of_a_call(sd3, recorded):
    cache = Cache.open(recorded)
    teacher = find_teacher(str(sd3), build_parts("clip"))
    checks = check_equivalence(cache, load_backbone(cache.manifest, teacher, CPU), teacher, range(len(cache)))
    assert [check.holds for check in checks] == [True, None, True]


@pytest.mark.parametrize("k", [0, 3])
def test_the_conditional_half_alone_replays_within_rounding(sd3, recorded, k):
    cache = Cache.open(recorded)
    x_BSC, text, timestep_B = first_calls(cache, k)
    with torch.no_grad():
        found_BSC = backbone_of(cache, sd3).predict(x_BSC, text.embedding_BTD, text.conditioning, timestep_B, None)
    wanted_BSC = torch.stack([to_torch(cache.trajectory(i).velocity_KSC[k]) for i in range(len(cache))])
    # Half of the rows may be summed in another order: 2e-7 to 6e-7 here, some of fp32's roundings of 6e-8 each. Text of
    # another prompt gives more than 1e-3.
    assert float((found_BSC - wanted_BSC).norm() / wanted_BSC.norm()) < 1e-5


def gradient_of(backbone: Backbone, x_BSC: torch.Tensor, text: Text, timestep_B: torch.Tensor) -> torch.Tensor:
    embedding_BTD = text.embedding_BTD.clone().requires_grad_()
    backbone.predict(x_BSC, embedding_BTD, text.conditioning, timestep_B, None).square().sum().backward()
    assert embedding_BTD.grad is not None
    return embedding_BTD.grad


@pytest.mark.parametrize("options", [{"activation_checkpointing": 1}, {"gpu_blocks": 1}, {"gpu_blocks": 0}])
def test_checkpointed_and_streamed_blocks_give_the_same_gradient_of_the_text(sd3, recorded, options):
    cache = Cache.open(recorded)
    calls, plain = first_calls(cache, 1), backbone_of(cache, sd3)
    wanted_BTD = gradient_of(plain, *calls)
    assert bool(wanted_BTD.abs().sum(-1).gt(0).all())
    assert all(parameter.grad is None for parameter in plain.transformer.parameters())
    assert torch.equal(gradient_of(backbone_of(cache, sd3, **options), *calls), wanted_BTD)


def test_modulation_vectors_computed_on_the_host_replace_their_weights(sd3, recorded):
    cache = Cache.open(recorded)
    calls = first_calls(cache, 1)
    kept = backbone_of(cache, sd3, modulation="cpu")
    assert kept.modulation == "cpu"
    found_BTD, wanted_BTD = gradient_of(kept, *calls), gradient_of(backbone_of(cache, sd3), *calls)
    # All vectors are computed in one call, whose sums may differ in their last bits.
    assert float((found_BTD - wanted_BTD).norm() / wanted_BTD.norm()) < 1e-5


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_streams_after_the_first_blocks_are_those_of_the_whole_transformer(sd3, recorded, blocks):
    cache = Cache.open(recorded)
    x_BSC, text, timestep_B = first_calls(cache, 1)
    given = (x_BSC, text.embedding_BTD, text.conditioning, timestep_B, None)
    backbone, found = backbone_of(cache, sd3), dict[int, Any]()
    for number, block in enumerate(backbone.transformer.transformer_blocks, 1):
        block.register_forward_hook(lambda _, __, output, number=number: found.__setitem__(number, output))
    backbone.predict(*given)
    part = Backbone.load(
        sd3, recorded_geometry(cache.manifest.sampling), text_length=12, dtype=torch.float32, device=CPU,
        options=MemoryOptions(), blocks=blocks,
    )  # fmt: skip
    image_BSI, text_BTI = part.streams(blocks, *given)
    assert torch.equal(image_BSI, found[blocks][1])
    # The last block gives no text: it is that before it.
    assert torch.equal(text_BTI, found[min(blocks, 2)][0])


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
        "--text-length is 513, expected at most 512: StableDiffusion3Pipeline does not accept a larger "
        "max_sequence_length"
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


def test_training_reads_the_transformer_alone_and_moves_the_student_alone(sd3, recorded, tmp_path):
    from tests.trainer.test_train import run_training

    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "transformer").symlink_to(sd3 / "transformer")
    (alone / "model_index.json").symlink_to(sd3 / "model_index.json")
    before = SD3Transformer2DModel.from_pretrained(alone, subfolder="transformer").state_dict()
    student = write_t5(sd3, tmp_path / "t5")
    run_training(tmp_path / "r", recorded, alone, student, steps=2, batch_size=2)
    assert find_teacher(str(alone), REPLAY_PARTS).family is SD3
    made = load_student(next((tmp_path / "r").glob("checkpoint-*")) / "student")
    cache = Cache.open(recorded)
    ids_1T = torch.from_numpy(cache.padded_token_ids(0))[None]
    assert same_bits(from_torch(made(ids_1T)[0][0]), cache.embedding(0))
    after = SD3Transformer2DModel.from_pretrained(alone, subfolder="transformer").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def write_t5(teacher: Path, folder: Path) -> Path:
    """The configuration of a smaller T5."""
    folder.mkdir()
    config = json.loads((teacher / "text_encoder_3/config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    return folder
