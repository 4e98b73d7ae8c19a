"""PixArt-Sigma from a folder that diffusers saved: masked text, a multistep scheduler, predictions of noise."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline

from secondcast.inspection.show import describe, trajectory_lines
from secondcast.models.backbone import Backbone
from secondcast.models.cost.counted import backbone_cost
from secondcast.models.cost.gpu_memory import modulation_rows
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.families import pixart
from secondcast.models.families.encoders.interface import text_mask
from secondcast.models.families.pixart import PIXART_SIGMA
from secondcast.models.families.text import recorded_text
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.schedule import DTYPES
from secondcast.models.student.student import check_fits, new_student, save_student
from secondcast.models.teacher.folder import REPLAY_PARTS, build_parts, find_teacher
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError, StudentError, TeacherError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch, to_torch
from secondcast.trainer.data.replay_dataset import ReplayDataset, Source
from secondcast.trainer.losses.depth import measure_variances
from tests.cache_builder.building import build_cache
from tests.models.families.random_pixart import make_pixart
from tests.models.student.encoders import make_encoder_folder

# Cleaned before they are tokenised: a link, capitals, a file name.
PROMPTS = ["A red DOG on the left https://example.com/a", "two cats", "a blue car.jpg", "three dogs"]
build = partial(build_cache, batch_size=4, shard_size=4, seed=5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_pixart(tmp_path_factory.mktemp("teachers") / "pixart")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="module")
def recorded(teacher, prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "c"
    build(folder, teacher, prompts, dtype="float32", height=16, width=24)
    return folder


def test_a_cache_states_mask_cleaning_and_scheduler_and_has_no_pooled_vector(recorded):
    cache = Cache.open(recorded)
    stated, sampling = cache.manifest.teacher, cache.manifest.sampling
    assert (stated.family, stated.text_mask, stated.text_cleaning) == ("pixart-sigma", "token-count", "clean-caption")
    assert (stated.pooled_width, sampling.latent_rule, sampling.storage.latents) == (0, "scheduler", "stored")
    assert sampling.scheduler is not None and sampling.scheduler["solver_order"] == 2
    rows = cache.conditioning(2)
    assert rows.keys() == {"encoder_attention_mask"}
    count = len(cache.prompts[2].token_ids)
    assert rows["encoder_attention_mask"].tolist() == [1] * count + [0] * (12 - count)
    # The text is kept as it was given, its token ids are of the cleaned one.
    assert cache.prompts[1].text == PROMPTS[0]
    assert PIXART_SIGMA.cleaned(PROMPTS[:1]) == ["a red dog on the left"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24)])
def test_the_recorded_latents_and_text_are_the_unmodified_pipelines(teacher, prompts, tmp_path, dtype, height, width):
    build(tmp_path / "c", teacher, prompts, dtype=dtype, height=height, width=width, guidance="3.5")
    cache = Cache.open(tmp_path / "c")
    trajectories = [cache.trajectory(index) for index in range(len(PROMPTS))]
    pipeline = PixArtSigmaPipeline.from_pretrained(teacher, torch_dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    texts = [cache.prompts[t.prompt].text for t in trajectories]
    encode = partial(
        pipeline.encode_prompt, do_classifier_free_guidance=False, clean_caption=True, max_sequence_length=12
    )
    with torch.no_grad():
        embedding_BTD, mask_BT, _, _ = encode(texts)
        # The negative prompt was encoded alone.
        negative_1TD, negative_mask_1T, _, _ = encode("")
    for row, trajectory in enumerate(trajectories):
        stored = cache.conditioning(trajectory.prompt)
        assert stored["encoder_attention_mask"].tolist() == mask_BT[row].tolist()
        # Padding, which nothing reads, is zero in a cache.
        assert same_bits(
            from_torch(embedding_BTD[row] * mask_BT[row, :, None].to(embedding_BTD.dtype)),
            cache.embedding(trajectory.prompt),
        )
    noise_BSC = torch.stack([to_torch(t.noise_SC) for t in trajectories])
    latents = pipeline(
        # As the pipeline has it, with what T5 gives for padding.
        prompt_embeds=embedding_BTD, prompt_attention_mask=mask_BT, negative_prompt=None,
        negative_prompt_embeds=negative_1TD.expand_as(embedding_BTD),
        negative_prompt_attention_mask=negative_mask_1T.expand_as(mask_BT),
        latents=PIXART_SIGMA.unpacked(noise_BSC, recorded_geometry(cache.manifest.sampling)), height=height,
        width=width, num_inference_steps=4, guidance_scale=3.5, use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    for trajectory, latent_SC in zip(trajectories, PIXART_SIGMA.packed(latents), strict=True):
        assert same_bits(trajectory.final_latent_SC, from_torch(latent_SC))


def test_a_trajectory_is_shown_with_the_norm_of_the_predicted_noise(recorded):
    facts = describe(Cache.open(recorded), 0)
    assert facts["prediction"] == "noise"
    said = "\n".join(trajectory_lines(facts, str(recorded)))
    assert "noise norm" in said and "not finite: latent + noise" in said and "velocity" not in said


def test_the_clean_latent_of_a_step_is_the_schedulers(teacher, recorded):
    cache = Cache.open(recorded)
    schedule = PIXART_SIGMA.schedule(
        "diffusers", find_teacher(str(teacher), ("scheduler",)).config("scheduler"), steps=4, image_tokens=1,
        dtype=torch.float32,
    )  # fmt: skip
    assert schedule.sigmas == cache.manifest.sampling.sigmas and schedule.timestep_dtype == torch.int64
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    x_SC, noise_SC = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    scheduler._init_step_index(scheduler.timesteps[0])
    for k in range(1, 4):
        scheduler._step_index = k
        wanted_SC = scheduler.convert_model_output(noise_SC, sample=x_SC)
        found_SC = PIXART_SIGMA.predicted_clean_latent(x_SC.numpy(), noise_SC.numpy(), schedule.sigmas[k])
        # Both in fp32; the division by alpha, above 0.05 here, enlarges a rounding.
        torch.testing.assert_close(torch.from_numpy(found_SC), wanted_SC, rtol=1e-4, atol=1e-4)


def test_the_mask_covers_the_text_up_to_its_end_token_whatever_is_in_it():
    ids_BT = torch.tensor([[5, 0, 1, 0, 0], [1, 0, 0, 0, 0], [3, 4, 5, 6, 1]])
    assert text_mask(ids_BT, 0).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_a_student_neither_reads_nor_gives_padding(teacher, recorded, tmp_path):
    config = json.loads((teacher / "text_encoder/config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    cache = Cache.open(recorded)
    student = new_student(str(tmp_path), cache.manifest.teacher, init="random", dropout=0.0, seed=0).eval()
    ids_T = torch.from_numpy(cache.padded_token_ids(2))
    count = len(cache.prompts[2].token_ids)
    with torch.no_grad():
        found_TD = student(ids_T[None])[0][0]
        by_pipeline_TD = student(ids_T[None], attention_mask=text_mask(ids_T[None], 0))[0][0]
        alone_TD = student(ids_T[None, :count])[0][0]
    assert torch.equal(found_TD, by_pipeline_TD) and not found_TD[count:].any()
    # Shorter rows may be summed in another order.
    torch.testing.assert_close(found_TD[:count], alone_TD, rtol=1e-4, atol=1e-5)


def test_a_student_with_its_own_tokenizer_is_refused(recorded, tmp_path):
    make_encoder_folder(tmp_path / "bert")
    with pytest.raises(StudentError) as error:
        new_student(str(tmp_path / "bert"), Cache.open(recorded).manifest.teacher, init="auto", dropout=0.0, seed=0)
    assert str(error.value) == (
        f"{tmp_path / 'bert'} has its own tokenizer, but this teacher reads a mask of T5's tokens: give a student that "
        f"reads T5's tokens, such as a T5"
    )


def test_without_the_packages_that_clean_captions_a_build_says_what_to_install(monkeypatch, teacher, prompts, tmp_path):
    monkeypatch.setattr(pixart, "find_spec", lambda name: None if name == "ftfy" else object())
    with pytest.raises(MissingExtraError) as error:
        build(tmp_path / "c", teacher, prompts)
    assert str(error.value) == (
        "PixArtSigmaPipeline cleans captions and ftfy is not installed: pip install 'secondcast[pixart]'"
    )
    assert not (tmp_path / "c").exists()


def test_settings_that_the_family_does_not_have_are_refused_in_one_line(teacher, prompts, tmp_path):
    cases = {
        "--pooled is clip, expected zero: PixArt-Sigma reads no pooled vector; remove it": {"pooled": "clip"},
        "--latents is derived, expected stored: the latents of PixArt-Sigma follow from guided predictions, and a "
        "cache has the conditional ones; remove it": {"latents": "derived"},
        "--text-length is 301, expected at most 300, the most that PixArtSigmaPipeline takes or its models were "
        "trained with: give a smaller one":
        {"text_length": 301},
    }  # fmt: skip
    for message, flags in cases.items():
        with pytest.raises(SettingsError) as error:
            build(tmp_path / "c", teacher, prompts, **flags)
        assert str(error.value) == message
    with pytest.raises(TeacherError) as error:
        build(tmp_path / "c", teacher, prompts, schedule="distillt5")
    assert str(error.value) == (
        "--schedule is distillt5, expected diffusers: PixArtSigmaPipeline has no other schedule; remove it"
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "transformer/config.json",
            {"use_additional_conditions": True},
            "has use_additional_conditions = True, expected false: it reads resolution and aspect ratio",
        ),
        ("transformer/config.json", {"patch_size": 1}, "has patch_size = 1, expected 2: it is none of PixArt-Sigma"),
        (
            "scheduler/scheduler_config.json",
            {"algorithm_type": "sde-dpmsolver++"},
            "the scheduler has algorithm_type = 'sde-dpmsolver++', expected 'dpmsolver++': its steps are not repeat",
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "v_prediction"},
            "the scheduler has prediction_type = 'v_prediction', expected 'epsilon': it is none of PixArt-Sigma's",
        ),
    ],
)
def test_another_transformer_or_scheduler_is_refused(teacher, prompts, tmp_path, part, change, message):
    folder = make_pixart(tmp_path / "teacher")
    config = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps(config | change))
    with pytest.raises(TeacherError, match=re.escape(message)):
        find_teacher(str(folder), build_parts(None))
        build(tmp_path / "c", folder, prompts)
    assert not (tmp_path / "c").exists()


def test_the_published_name_of_the_transformers_class_is_accepted(teacher, prompts, tmp_path):
    folder = make_pixart(tmp_path / "teacher")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    build(tmp_path / "c", folder, prompts, steps=2)
    build(tmp_path / "d", teacher, prompts, steps=2)
    renamed, plain = (Cache.open(tmp_path / name).trajectory(0) for name in ("c", "d"))
    assert same_bits(renamed.final_latent_SC, plain.final_latent_SC)


def test_a_folder_without_a_model_index_is_of_the_family_of_its_transformer(teacher, tmp_path):
    (tmp_path / "transformer").symlink_to(teacher / "transformer")
    assert find_teacher(str(tmp_path), REPLAY_PARTS).family is PIXART_SIGMA


def test_a_students_padding_must_be_that_of_the_teacher_it_is_used_with(teacher, recorded, tmp_path):
    config = json.loads((teacher / "text_encoder/config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    stated = Cache.open(recorded).manifest.teacher
    masked = new_student(str(tmp_path), stated, init="random", dropout=0.0, seed=0)
    read = new_student(
        str(tmp_path), stated.model_copy(update={"text_mask": None}), init="random", dropout=0.0, seed=0
    )  # fmt: skip
    with pytest.raises(StudentError) as error:
        check_fits(masked, 24, "s", masked=False)
    assert str(error.value) == (
        "s gives zeros for padding, which this teacher reads: it was trained for one with a mask, such as "
        "PixArt-Sigma; train it on a cache of this one"
    )
    check_fits(read, 24, "s", masked=True)
    check_fits(masked, 24, "s", masked=True)


def test_a_student_takes_the_padding_of_the_teacher_that_it_is_trained_on_next(teacher, recorded, tmp_path):
    config = json.loads((teacher / "text_encoder/config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    stated = Cache.open(recorded).manifest.teacher
    masked = new_student(str(tmp_path), stated, init="random", dropout=0.0, seed=0)
    masked.put_negative([1, *[0] * 11], torch.ones(12, 24))
    save_student(masked, tmp_path / "s", tokenizer=None)
    other = stated.model_copy(update={"text_mask": None})
    again = new_student(str(tmp_path / "s"), other, init="pretrained", dropout=0.0, seed=0)
    assert not hasattr(again.config, "masks_padding") and again.negative_TD is None
    back = new_student(str(tmp_path / "s"), stated, init="pretrained", dropout=0.0, seed=0)
    assert back.config.masks_padding and back.negative_TD is not None


def test_the_variance_between_prompts_reads_each_with_its_own_mask(teacher, recorded):
    cache = Cache.open(recorded)
    prompts = [cache.layout.place(index).prompt for index in range(len(cache))]
    backbone = Backbone.load(
        teacher, recorded_geometry(cache.manifest.sampling), text_length=12, dtype=torch.float32,
        device=torch.device("cpu"), options=MemoryOptions(),
    )  # fmt: skip
    source = Source(cache=cache, indices=np.arange(len(cache)))
    dataset = ReplayDataset([source], device=torch.device("cpu"))
    found = measure_variances([backbone], dataset, 1, batch_rows=2)
    expected = []
    for place, index in enumerate(range(len(cache))):
        k = place * 4 // len(cache)
        x_BSC = to_torch(cache.trajectory(index).hidden_states_KSC[k])[None].expand(len(prompts), -1, -1)
        timestep_B = torch.full((len(prompts),), int(cache.manifest.sampling.timesteps[k]))
        text = recorded_text(cache, prompts)
        with torch.no_grad():
            image_BSI, _ = backbone.streams(1, x_BSC, text.embedding_BTD, text.conditioning, timestep_B, None)
        expected.append(image_BSI.double().var(0).mean())
    assert found.hidden_states == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_a_plan_never_replaces_modulation_weights_that_are_not_there(recorded):
    cost = backbone_cost(CallShapes.of(Cache.open(recorded).manifest))
    assert cost.modulation_parameters == 0
    for modulation in ("auto", "precomputed"):
        assert modulation_rows(cost, MemoryOptions(modulation=modulation), 4) is None


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 20, "text_only": True}], ids=["samples", "text"])
def test_prompts_that_are_cleaned_to_nothing_are_counted(teacher, tmp_path, options):
    (tmp_path / "p.txt").write_text("two cats\ncat.png\n")
    said = list[str]()

    class Heard(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    build_cache(tmp_path / "c", teacher, tmp_path / "p.txt", **options, progress=Heard())
    assert (
        "1 prompt of which the pipeline's cleaning leaves nothing (links, file names): recorded like the empty one"
        in said
    )


@pytest.mark.parametrize(("key", "value"), [("beta_schedule", "foo"), ("solver_type", "xx")])
def test_a_scheduler_that_diffusers_refuses_is_one_line(teacher, key, value):
    config = find_teacher(str(teacher), ("scheduler",)).config("scheduler") | {key: value}
    with pytest.raises(TeacherError) as error:
        PIXART_SIGMA.schedule("diffusers", config, steps=2, image_tokens=1, dtype=torch.float32)
    assert str(error.value).startswith("the scheduler's configuration is refused by diffusers (")
    assert str(error.value).endswith("): download scheduler/ again") and value in str(error.value)
