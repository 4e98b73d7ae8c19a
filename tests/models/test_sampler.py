"""Laws 1 and 2: our trajectories are FluxPipeline's, and latents derive from noise and velocity, bit for bit."""

import json
import warnings
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from secondcast.models.backbone import Backbone
from secondcast.models.families.flux import FLUX, shift_of
from secondcast.models.families.text import Text
from secondcast.models.noise import draw_guidance, draw_noise
from secondcast.models.sampler import Trajectories, bound, sample
from secondcast.models.schedule import DTYPES, Schedule
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.models.teacher.text_encoder import load_conditioning_encoder
from secondcast.pocket import TEACHER_FOLDER
from secondcast.storage_schemas.schema.derivation import derive_latents
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.tensors import from_torch

BATCH = 3
TEACHERS = pytest.mark.parametrize("teacher", ["pocket", "dev_teacher", "schnell_teacher"])
PRECISIONS = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
POOLED = ("zero", "clip")
TEXTS = ["a red car", "two dogs and a cat", "a sign that says 'q'"]
FLUX_DEV_SCHEDULER = Path(__file__).parents[1] / "cache_builder/flux_dev/scheduler/scheduler_config.json"


@cache
def loaded_pipeline(folder: Path, dtype: torch.dtype) -> FluxPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True, scope="module")
def _forget_pipelines():
    # Other tests count the text encoders that are alive.
    yield
    loaded_pipeline.cache_clear()


class Setting:
    """One teacher, one size, one dtype: the same embedding, noise and guidance for us and for FluxPipeline."""

    def __init__(
        self, folder: Path, dtype: str, height: int, width: int, steps: int = 20, pooled: str = "zero"
    ) -> None:
        self.folder, self.dtype, self.steps = folder, DTYPES[dtype], steps
        self.teacher = teacher = TeacherFolder(path=folder, source=str(folder))
        config = teacher.config("transformer")
        self.geometry = teacher.geometry(ImageSize(height=height, width=width))
        self.text_length = teacher.text_length
        self.schedule = FLUX.schedule(
            "diffusers",
            teacher.config("scheduler"),
            steps=steps,
            image_tokens=self.geometry.image_tokens,
            dtype=self.dtype,
        )
        self.pooled, self.pooled_width = pooled, config["pooled_projection_dim"]
        generator = torch.Generator().manual_seed(0)
        tokens, channels = self.geometry.image_tokens, self.geometry.channels
        self.noise_BSC = torch.randn(BATCH, tokens, channels, generator=generator).to(self.dtype)
        shape = (BATCH, self.text_length, config["joint_attention_dim"])
        self.embedding_BTD = torch.randn(shape, generator=generator).to(self.dtype)

    def ours(self, guidance: list[float]) -> Trajectories:
        backbone = Backbone.load(
            self.folder, self.geometry, text_length=self.text_length, dtype=self.dtype, device=torch.device("cpu")
        )

        conditioning = backbone.zero_pooled(BATCH)
        if self.pooled == "clip":
            clip = load_conditioning_encoder(self.teacher, dtype=self.dtype, device=torch.device("cpu"))
            conditioning = clip.encode(TEXTS)

        text = Text(embedding_BTD=self.embedding_BTD, conditioning=conditioning)
        return sample(bound(backbone, text, torch.tensor(guidance)), self.noise_BSC, self.schedule)

    def pipelines(self, guidance: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        pipeline = loaded_pipeline(self.folder, self.dtype)
        pooled_BP = torch.zeros(BATCH, self.pooled_width, dtype=self.dtype)
        if self.pooled == "clip":
            with torch.no_grad():
                pooled_BP = pipeline.encode_prompt(TEXTS, None, max_sequence_length=self.text_length)[1]
        latents = []

        def watch(pipe, step, timestep, values):
            latents.append(values["latents"].clone())
            return {}

        final = pipeline(
            prompt_embeds=self.embedding_BTD,
            pooled_prompt_embeds=pooled_BP,
            latents=self.noise_BSC.clone(),
            guidance_scale=guidance,
            num_inference_steps=self.steps,
            height=self.geometry.height,
            width=self.geometry.width,
            output_type="latent",
            callback_on_step_end=watch,
        ).images
        return final, latents


def folder_of(name: str, request: pytest.FixtureRequest) -> Path:
    return TEACHER_FOLDER if name == "pocket" else request.getfixturevalue(name)


@pytest.mark.thorough
@PRECISIONS
@pytest.mark.parametrize(
    ("teacher", "pooled", "height", "width"),
    [("pocket", "zero", 24, 24)]
    + [
        (teacher, pooled, *size)
        for teacher in ("dev_teacher", "schnell_teacher")
        for pooled in POOLED
        for size in ((24, 24), (16, 32))
    ],
)
def test_sampling_equals_flux_pipeline_in_every_latent_bit_for_bit(teacher, dtype, pooled, height, width, request):
    setting = Setting(folder_of(teacher, request), dtype, height, width, pooled=pooled)
    walk = setting.ours([3.5] * BATCH)
    final, latents = setting.pipelines(3.5)
    assert torch.equal(walk.final_latent_BSC, final)
    for k in range(setting.steps - 1):
        assert torch.equal(walk.hidden_states_BKSC[:, k + 1], latents[k])


@pytest.mark.parametrize("teacher", ["dev_teacher", "schnell_teacher"])
def test_pooled_vectors_of_clip_lead_elsewhere_than_zeros(teacher, request):
    folder = folder_of(teacher, request)
    ends = [Setting(folder, "float32", 16, 16, 2, pooled=p).ours([3.5] * BATCH).final_latent_BSC for p in POOLED]
    assert not torch.equal(*ends)


@pytest.mark.parametrize("teacher", ["dev_teacher", "schnell_teacher"])
@PRECISIONS
def test_the_reference_schedule_walks_as_the_scheduler_does_without_sigmas(teacher, dtype, request):
    setting = Setting(folder_of(teacher, request), dtype, 16, 24, pooled="clip")
    config, tokens = setting.teacher.config("scheduler"), setting.geometry.image_tokens
    setting.schedule = FLUX.schedule("distillt5", config, steps=20, image_tokens=tokens, dtype=setting.dtype)
    walk = setting.ours([3.5] * BATCH)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(20, mu=calculate_shift(tokens))
    x_BSC = setting.noise_BSC
    for k, t in enumerate(scheduler.timesteps):
        passed_B = t.expand(BATCH).to(setting.dtype) / 1000
        assert passed_B.tolist() == [setting.schedule.timesteps[k]] * BATCH
        assert torch.equal(walk.hidden_states_BKSC[:, k], x_BSC)
        x_BSC = scheduler.step(walk.velocity_BKSC[:, k], t, x_BSC, return_dict=False)[0]
    assert torch.equal(walk.final_latent_BSC, x_BSC)
    derived = derive_latents(from_torch(setting.noise_BSC), from_torch(walk.velocity_BKSC), setting.schedule.sigmas)
    assert same_bits(derived[:, -1], from_torch(walk.final_latent_BSC))


@pytest.mark.parametrize(("height", "width", "steps"), [(8, 40, 4), (32, 16, 7)])
def test_sampling_equals_flux_pipeline_for_other_shapes_and_steps(height, width, steps, dev_teacher):
    setting = Setting(dev_teacher, "float32", height, width, steps)
    assert torch.equal(setting.ours([2.0] * BATCH).final_latent_BSC, setting.pipelines(2.0)[0])


@pytest.mark.thorough
@PRECISIONS
def test_each_row_of_mixed_guidance_equals_the_pipeline_at_its_own(dtype, dev_teacher):
    setting = Setting(dev_teacher, dtype, 16, 16)
    guidance = [2.0, 3.5, 5.0]
    ours = setting.ours(guidance).final_latent_BSC
    rows = [setting.pipelines(value)[0][row] for row, value in enumerate(guidance)]
    assert torch.equal(ours, torch.stack(rows))
    assert not torch.equal(ours, setting.pipelines(2.0)[0])


@pytest.mark.thorough
@TEACHERS
@PRECISIONS
def test_latents_derived_in_numpy_equal_the_sampled_ones_bit_for_bit(teacher, dtype, request):
    setting = Setting(folder_of(teacher, request), dtype, 16, 16)
    walk = setting.ours([2.0, 3.5, 5.0])
    derived = derive_latents(from_torch(setting.noise_BSC), from_torch(walk.velocity_BKSC), setting.schedule.sigmas)
    assert same_bits(derived[:, :-1], from_torch(walk.hidden_states_BKSC))
    assert same_bits(derived[:, -1], from_torch(walk.final_latent_BSC))


def test_a_broadcast_fp32_dt_would_not_derive(dev_teacher):
    setting = Setting(dev_teacher, "bfloat16", 16, 16)
    walk = setting.ours([3.5] * BATCH)
    sigmas = np.float32(setting.schedule.sigmas)
    x = from_torch(setting.noise_BSC)
    for k in range(setting.steps):
        velocity = from_torch(walk.velocity_BKSC[:, k])
        x = (x.astype(np.float32) + (sigmas[k + 1] - sigmas[k]) * velocity.astype(np.float32)).astype(x.dtype)
    assert not same_bits(x, from_torch(walk.final_latent_BSC))


def test_the_timesteps_of_flux_at_512_pixels_in_bf16_are_as_the_pipeline_passes_them():
    config = {
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
        "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
    }  # fmt: skip
    schedule = FLUX.schedule("diffusers", config, steps=20, image_tokens=1024, dtype=torch.bfloat16)
    inside = [float(torch.tensor(t, dtype=torch.bfloat16) * 1000) for t in schedule.timesteps]
    assert inside == [
        1000,
        972,
        944,
        916,
        884,
        848,
        816,
        776,
        736,
        696,
        652,
        604,
        556,
        504,
        446,
        384,
        320,
        249,
        173,
        90,
    ]
    assert schedule.sigmas[0] == 1.0 and schedule.sigmas[-1] == 0.0 and len(schedule.sigmas) == 21
    assert isinstance(schedule, Schedule)


def test_at_512_pixels_the_reference_schedule_ends_at_1_point_9_and_the_pipelines_at_89_point_9():
    config = json.loads(FLUX_DEV_SCHEDULER.read_bytes())
    found = {}
    for name in ("distillt5", "diffusers"):
        schedule = FLUX.schedule(name, config, steps=20, image_tokens=1024, dtype=torch.float32)
        found[name] = [round(1000 * t, 1) for t in schedule.timesteps]
        assert schedule.sigmas[-1] == 0.0 and schedule.steps == 20
    assert found["distillt5"] == [
        1000.0, 971.3, 941.1, 909.3, 875.8, 840.4, 802.9, 763.2, 721.2, 676.4,
        628.7, 577.8, 523.4, 465.1, 402.3, 334.7, 261.6, 182.3, 96.1, 1.9,
    ]  # fmt: skip
    assert found["diffusers"][1] == 972.7 and found["diffusers"][-1] == 89.9


def test_noise_is_a_function_of_seed_prompt_and_replica_and_pinned():
    draw = partial(draw_noise, image_tokens=2, channels=2)
    noise = draw(seed=0, prompt_id="0" * 32, sample_index=0)
    # Every cache ever built depends on these values: do not edit.
    assert noise.dtype == np.float32 and noise.tolist() == [
        [-1.1376022100448608, -1.954184889793396],
        [1.7362372875213623, -1.4660800695419312],
    ]
    for other in ({"seed": 1}, {"prompt_id": "1" * 32}, {"sample_index": 1}):
        assert not np.array_equal(draw(**{"seed": 0, "prompt_id": "0" * 32, "sample_index": 0} | other), noise)


def test_guidance_is_drawn_from_the_given_values_and_pinned():
    values = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    drawn = [draw_guidance(values, seed=0, prompt_id=f"{i:032x}", sample_index=0) for i in range(700)]
    assert set(drawn) == set(values)
    assert max(drawn.count(v) for v in values) < 150
    # Every cache ever built depends on these values: do not edit.
    assert drawn[:8] == [2.5, 3.0, 3.0, 4.5, 3.0, 3.0, 2.0, 3.5]


@pytest.mark.parametrize("tokens", [1, 36, 256, 1024, 4096, 4107, 16384])
@pytest.mark.parametrize("config", [{}, {"base_shift": 0.25, "max_shift": 3.7, "max_image_seq_len": 1024}])
def test_the_shift_is_the_pipelines_bit_for_bit(tokens, config):
    keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15} | config
    assert shift_of(config, tokens) == calculate_shift(tokens, *keys.values())
