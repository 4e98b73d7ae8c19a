"""Offline steps equal online ones, bit for bit: a loop written from the description of the paper, and ours."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from transformers import T5EncoderModel

from secondcast.models.student.student import new_student
from secondcast.models.student.student_network import SecondcastStudent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.sampler import Part, Sampler, mix
from tests.cache_builder.building import build_cache
from tests.trainer.test_train import run_training, weights

BATCH, STEPS, UPDATES = 4, 10, 20
RATE, WEIGHT_DECAY, CLIP, DROPOUT, SEED = 1e-3, 1e-2, 1.0, 0.1, 5


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, dev_teacher: Path) -> Path:
    """One batch of trajectories in fp32, recorded at the batch size of training."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "p.txt").write_text("".join(f"a red {thing}\n" for thing in ("dog", "cat", "car", "bench")))
    flags = {"steps": STEPS, "shard_size": BATCH, "batch_size": BATCH, "dtype": "float32"}
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", **flags)
    return folder / "cache"


def online(teacher: Path, cache: Cache, student: SecondcastStudent, walks: list[list[int]]) -> None:
    """The paper's loop (section 3): teacher and student side by side on the teacher's trajectory, a step at each.

    Of the recording it takes what a seed would give: prompts, noise, guidance. walks: the trajectories of each.
    """
    transformer = FluxTransformer2DModel.from_pretrained(teacher, subfolder="transformer", torch_dtype=torch.float32)
    transformer.eval().requires_grad_(False)
    text_encoder = T5EncoderModel.from_pretrained(teacher, subfolder="text_encoder_2", torch_dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(
        [
            {"params": student.encoder.parameters(), "weight_decay": WEIGHT_DECAY},
            {"params": student.final_projection.parameters(), "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    update = 0
    for walk in walks:
        trajectories = [cache.trajectory(index) for index in walk]
        ids_BT = torch.stack([torch.from_numpy(cache.padded_token_ids(t.prompt)) for t in trajectories])
        x_BSC = torch.stack([torch.from_numpy(t.hidden_states_KSC[0]) for t in trajectories])
        guidance_B = torch.tensor([t.guidance for t in trajectories])
        with torch.no_grad():
            teacher_BTD = text_encoder(ids_BT)[0]
        scheduler = _scheduler(teacher, image_tokens=x_BSC.shape[1])
        for t in scheduler.timesteps:
            conditions = _conditions(transformer, cache, t, guidance_B)
            with torch.no_grad():
                target_BSC = transformer(x_BSC, teacher_BTD, **conditions)[0]
            torch.manual_seed(mix(SEED, update))
            student.train()
            found_BSC = transformer(x_BSC, student(ids_BT)[0], **conditions)[0]
            loss = torch.nn.functional.mse_loss(found_BSC.float(), target_BSC.float())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            optimizer.step()
            x_BSC = scheduler.step(target_BSC, t, x_BSC, return_dict=False)[0]
            update += 1
    assert update == UPDATES


def _scheduler(teacher: Path, *, image_tokens: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(teacher, subfolder="scheduler")
    sigmas = torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64).tolist()
    scheduler.set_timesteps(STEPS, sigmas=sigmas, mu=calculate_shift(image_tokens))
    scheduler.set_begin_index(0)
    return scheduler


def _conditions(
    transformer: FluxTransformer2DModel, cache: Cache, t: torch.Tensor, guidance_B: torch.Tensor
) -> dict[str, object]:
    rows = columns = 2 * int(cache.manifest.sampling.image_tokens**0.5)
    ids = FluxPipeline._prepare_latent_image_ids(BATCH, rows // 2, columns // 2, torch.device("cpu"), torch.float32)
    return {
        "timestep": t.expand(BATCH) / 1000,
        "guidance": guidance_B,
        "pooled_projections": torch.zeros(BATCH, transformer.config.pooled_projection_dim),
        "txt_ids": torch.zeros(cache.manifest.teacher.text_length, 3),
        "img_ids": ids,
        "return_dict": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_twenty_steps_offline_end_with_the_weights_of_twenty_online(
    tmp_path, recording, dev_teacher, t5_config, dropout
):
    cache = Cache.open(recording)
    assert len(cache) == BATCH and cache.manifest.prompts.held_out == 0
    order = Sampler(kind="sequential", parts=(Part(count=BATCH),), steps=STEPS, batch_size=BATCH, seed=SEED)
    walks = [[position for position, _ in order.batch(update)] for update in range(0, UPDATES, STEPS)]
    assert walks[0] != walks[1]
    student = new_student(str(t5_config), cache.manifest.teacher, init="random", dropout=dropout, seed=SEED)
    before = {name: value.clone() for name, value in student.named_parameters()}
    online(dev_teacher, cache, student, walks)
    run_training(
        tmp_path / "run", recording, dev_teacher, t5_config, data_order="sequential", steps=UPDATES, batch_size=BATCH,
        init="random", dropout=dropout, seed=SEED, learning_rate=RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP,
    )  # fmt: skip
    offline = weights(tmp_path / "run")
    for name, value in student.named_parameters():
        assert torch.equal(value, offline[name]), name
        assert not torch.equal(value, before[name]), name
