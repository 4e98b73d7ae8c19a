"""A student that is not T5 leads the sampling with its own tokenizer, in pictures and in scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from transformers import AutoTokenizer

from secondcast.evaluation.generate import generate
from secondcast.evaluation.pocket_scores import score_encoders
from secondcast.evaluation.sampling import Generator
from secondcast.evaluation.settings.generating import GenerateOptions
from secondcast.evaluation.text_encoder import open_text_encoder, teacher_and_students, teacher_parts
from secondcast.models.noise import draw_noise
from secondcast.models.student.student import load_student, new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.world import captions
from secondcast.storage_schemas.errors import SettingsError, StudentError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.schema.prompts import prompt_id
from tests.models.student.encoders import make_encoder_folder, rewrite_config

CPU = torch.device("cpu")
PROMPTS = ["a red dog on the left", "two cats"]
ASKED = GenerateOptions(steps=2, guidance=3.5, seed=7, dtype="float32")


def make_student(folder: Path, teacher: Path, family: str) -> Path:
    source = make_encoder_folder(folder / family, family)
    opened = find_teacher(str(teacher), ())
    identity = opened.identity(text_length=opened.text_length, hashed=False)
    student = new_student(str(source), identity, init="auto", dropout=0.0, seed=3)
    save_student(student, folder / f"{family}-student", tokenizer=own_tokens(source, student).files)
    return folder / f"{family}-student"


@pytest.fixture(scope="module", params=["bert", "roberta"])
def student(request, tmp_path_factory, dev_teacher):
    return make_student(tmp_path_factory.mktemp("students"), dev_teacher, request.param)


@pytest.mark.thorough
def test_pictures_are_flux_pipelines_with_the_students_tokenizer_as_tokenizer_2(student, dev_teacher, tmp_path):
    assert teacher_parts(str(student)) == ("transformer", "scheduler", "vae")
    opened = find_teacher(str(dev_teacher), teacher_parts(str(student)))
    made = generate(str(student), opened, PROMPTS, tmp_path / "out", ASKED, batch_size=2, device=CPU, progress=Silent())
    network = load_student(student)
    pipeline = FluxPipeline.from_pretrained(
        dev_teacher,
        text_encoder_2=network,
        tokenizer_2=AutoTokenizer.from_pretrained(student, trust_remote_code=True),
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    length = network.config.text_length
    embedding_BTD = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=length)[0]
    assert torch.equal(open_text_encoder(str(student), opened, text_length=None, dtype=torch.float32, device=CPU)
                       .embeddings(PROMPTS, CPU), embedding_BTD)  # fmt: skip
    noise = [draw_noise(seed=7, prompt_id=prompt_id(t), sample_index=0, image_tokens=16, channels=16) for t in PROMPTS]
    images = pipeline(
        prompt_embeds=embedding_BTD, pooled_prompt_embeds=torch.zeros(2, 8), height=16, width=16,
        num_inference_steps=2, guidance_scale=3.5, latents=torch.from_numpy(np.stack(noise)), output_type="np",
    ).images  # fmt: skip
    found = np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / "out").glob("*.png"))])
    assert made == 2 and np.array_equal(found, (images * 255).round().astype("uint8"))


def test_a_student_is_used_at_its_own_length(student, dev_teacher, tmp_path):
    trained = load_student(student).config.text_length
    opened = find_teacher(str(dev_teacher), teacher_parts(str(student)))
    with pytest.raises(SettingsError, match=rf"--text-length is 8, but .* was trained with {trained} text tokens"):
        generate(
            str(student), opened, PROMPTS, tmp_path / "o", ASKED.model_copy(update={"text_length": 8}),
            batch_size=2, device=CPU, progress=Silent(),
        )  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_scores_are_those_of_its_own_tokens_at_its_own_length(family, tmp_path):
    folder = make_student(tmp_path, TEACHER_FOLDER, family)
    teacher = find_teacher(str(TEACHER_FOLDER), BUILD_PARTS)
    studio = Generator.open(teacher, resolution=None, steps=1, guidance=3.5, seed=0, dtype=torch.float32, device=CPU)
    encoders = teacher_and_students(folder, teacher, dtype=torch.float32, device=CPU, seed=0)
    del encoders["teacher"]
    texts = captions(2, seed=1, split="heldout")
    results = score_encoders(studio, encoders, texts, batch_size=2, progress=Silent())
    network = load_student(folder)
    with torch.no_grad():
        expected = studio.pictures(network(own_tokens(folder, network).batch(texts))[0], texts)
    assert [result.name for result in results] == ["student", "untrained"]
    assert np.array_equal(results[0].images_NHWC, expected)
    assert not np.array_equal(results[1].images_NHWC, expected)


def test_a_student_trained_at_more_tokens_than_the_teacher_reads_is_refused(tmp_path):
    folder = make_student(tmp_path, TEACHER_FOLDER, "modernbert")
    taught = load_student(folder).config.text_length
    rewrite_config(folder, text_length=taught + 1)
    teacher = find_teacher(str(TEACHER_FOLDER), BUILD_PARTS)
    with pytest.raises(
        StudentError, match=rf"was trained with {taught + 1} text tokens, this teacher has {taught}: score"
    ):
        teacher_and_students(folder, teacher, dtype=torch.float32, device=CPU, seed=0)
