"""FLUX.1 Kontext without an image, from a folder that diffusers saved: the whole road is FluxKontextPipeline's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from secondcast.models.noise import draw_noise
from secondcast.models.student.student import load_student
from secondcast.models.teacher.folder import build_parts, find_teacher
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.schema.prompts import prompt_id
from secondcast.storage_schemas.tensors import from_torch
from tests.cache_builder.building import build_cache
from tests.commands.running import run_commands
from tests.models.families.random_teacher import make_teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = ["a red dog on the left", "two cats", "a blue car", "three dogs"]


@pytest.fixture(scope="module")
def kontext(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / "kontext", pipeline=FluxKontextPipeline)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def pipeline_of(folder: Path, dtype: torch.dtype, **parts: Any) -> FluxKontextPipeline:
    pipeline = FluxKontextPipeline.from_pretrained(folder, torch_dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(texts: list[str], *, seed: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    noise = [
        draw_noise(seed=seed, prompt_id=prompt_id(t), sample_index=0, image_tokens=tokens, channels=16) for t in texts
    ]
    return torch.from_numpy(np.stack(noise)).to(dtype)


def test_a_cache_names_the_family_and_another_family_is_another_teacher(kontext, dev_teacher):
    own, other = (
        find_teacher(str(folder), build_parts("zero")).identity(text_length=12, hashed=False)
        for folder in (kontext, dev_teacher)
    )
    assert (own.family, other.family) == ("flux-kontext", "flux")
    assert own.json_value() | {"family": "flux"} == other.json_value()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24)])
def test_from_prompts_the_recorded_latents_are_the_unmodified_pipelines(
    kontext, prompts, tmp_path, dtype, height, width
):
    build_cache(
        tmp_path / "c", kontext, prompts, dtype=dtype, height=height, width=width, guidance="2.5", pooled="clip",
        batch_size=4, shard_size=4, seed=5,
    )  # fmt: skip
    cache = Cache.open(tmp_path / "c")
    recorded = [cache.trajectory(index) for index in range(len(PROMPTS))]
    texts = [cache.prompts[trajectory.prompt].text for trajectory in recorded]
    latents_BSC = pipeline_of(kontext, DTYPES[dtype])(
        prompt=texts, latents=noise_of(texts, seed=5, tokens=height * width // 16, dtype=DTYPES[dtype]), height=height,
        width=width, max_area=height * width, num_inference_steps=4, guidance_scale=2.5, output_type="latent",
        max_sequence_length=12,
    ).images  # fmt: skip
    for trajectory, latent_SC in zip(recorded, latents_BSC, strict=True):
        assert same_bits(trajectory.final_latent_SC, from_torch(latent_SC))


@pytest.mark.thorough
def test_built_trained_exported_and_generated_by_the_commands_a_picture_is_the_pipelines(kontext, prompts, tmp_path):
    config = json.loads((kontext / "text_encoder_2/config.json").read_bytes())
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5/config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    cache, run, student, pictures = (str(tmp_path / name) for name in ("c", "r", "s", "p"))
    lines = [
        f"build {cache} --teacher {kontext} --prompts {prompts} --steps 3 --dtype float32 --pilot 4",
        f"train {run} --cache {cache} --student {tmp_path / 't5'} --pretrain-steps 2 --steps 2 --batch-size 2",
        f"export {run} {student}",
        f"generate {student} --out {pictures} --teacher {kontext} --prompts {prompts} --steps 2 --guidance 2.5 --seed 7"
        f" --dtype float32 --batch-size 4",
        f"inspect compare {cache} 0 1 --student {run} --out {tmp_path / 'compare.png'}",
        f"inspect show {cache} 0",
        f"inspect images {cache} 0 --out {tmp_path / 'strips.png'}",
        f"inspect verify {cache} --resample 2",
        f"plan build --teacher {kontext} --num-prompts 10",
    ]
    answers = run_commands([{"words": line.split(), "limit": None} for line in lines], home=tmp_path / "home")
    for line, answer in zip(lines, answers, strict=True):
        assert answer["code"] in (0, None), (line, answer["heard"])
    assert "final latents are FluxKontextPipeline's, bit for bit (" in answers[0]["said"]
    index = [json.loads(line) for line in (Path(pictures) / "index.jsonl").read_text().splitlines()]
    found = np.stack([np.asarray(Image.open(Path(pictures) / entry["file"])) for entry in index])
    texts = [entry["prompt"] for entry in index]
    pipeline = pipeline_of(kontext, torch.float32, text_encoder_2=load_student(Path(student)))
    embedding_BTD = pipeline._get_t5_prompt_embeds(texts, max_sequence_length=12)
    images = pipeline(
        prompt_embeds=embedding_BTD, pooled_prompt_embeds=torch.zeros(len(texts), 8), height=16, width=16, max_area=256,
        latents=noise_of(texts, seed=7, tokens=16, dtype=torch.float32), num_inference_steps=2, guidance_scale=2.5,
        output_type="np",
    ).images  # fmt: skip
    assert np.array_equal(found, (images * 255).round().astype("uint8"))
    card = (Path(student) / "README.md").read_text()
    assert "pipeline = FluxKontextPipeline.from_pretrained(" in card and "    max_area=256," in card
