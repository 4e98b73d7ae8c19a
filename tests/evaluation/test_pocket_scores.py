"""Scores of encoders: the teacher's own embedding gives the pipeline's image; a broken one gives nothing."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from secondcast.evaluation.pictures.picture import enlarged, side_by_side
from secondcast.evaluation.pocket_scores import score_encoders, score_images, table_rows
from secondcast.evaluation.sampling import Generator
from secondcast.evaluation.text_encoder import teacher_and_students
from secondcast.models.student.student import new_student, save_student
from secondcast.models.teacher.folder import BUILD_PARTS, TeacherFolder, find_teacher
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.pocket.lexicon import PAPER
from secondcast.pocket.world import IMAGE_SIZE, captions
from secondcast.storage_schemas.errors import PromptsError, StudentError
from secondcast.storage_schemas.progress import Silent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher() -> TeacherFolder:
    return find_teacher(str(TEACHER_FOLDER), BUILD_PARTS)


@pytest.fixture(scope="module")
def studio(teacher) -> Generator:
    return Generator.open(teacher, resolution=None, steps=8, guidance=3.5, seed=0, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def student_of_the_pocket(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "s"
    identity = teacher.identity(text_length=teacher.text_length)
    student = new_student(str(STUDENTS_FOLDER / "tiny"), identity, init="auto", dropout=0.0, seed=0)
    save_student(student, folder, tokenizer=None)
    return folder


@pytest.mark.thorough
def test_the_images_are_flux_pipelines_for_the_same_noise(studio, teacher):
    texts = captions(3, seed=5, split="heldout")
    encoder = TeacherTextEncoder.load(teacher, dtype=torch.float32, device=CPU)
    ours = studio.images(encoder.encode, texts, batch_size=3, bar=Silent())
    from secondcast.models.noise import draw_noise
    from secondcast.storage_schemas.schema.prompts import prompt_id

    size = {"image_tokens": studio.geometry.image_tokens, "channels": studio.geometry.channels}
    noise = [draw_noise(seed=0, prompt_id=prompt_id(t), sample_index=0, **size) for t in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = FluxPipeline.from_pretrained(teacher.path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        texts,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=8,
        guidance_scale=3.5,
        latents=torch.from_numpy(np.stack(noise)),
        max_sequence_length=teacher.text_length,
        output_type="np",
    ).images
    assert np.array_equal(ours, (images * 255).round().astype("uint8"))


@pytest.mark.slow
def test_the_teacher_scores_and_a_random_student_does_not(studio, teacher, student_of_the_pocket):
    texts = captions(24, seed=1, split="heldout")
    encoders = teacher_and_students(student_of_the_pocket, teacher, dtype=torch.float32, device=CPU, seed=1)
    results = score_encoders(studio, encoders, texts, batch_size=24, progress=Silent())
    assert [result.name for result in results] == ["teacher", "student", "untrained"]
    best, random = results[0].scores, results[2].scores
    assert best["colour"].mean > 0.8 and best["binding"].mean > 0.6
    assert random["binding"].mean < 0.2
    rows = table_rows(results)
    assert rows[0]["dimension"] == "colour" and rows[0]["teacher"]["low"] < rows[0]["teacher"]["mean"] <= 1


def test_empty_paper_scores_nothing():
    texts = captions(60, seed=0, split="heldout")
    blank = np.broadcast_to(np.array(PAPER, dtype=np.uint8), (60, IMAGE_SIZE, IMAGE_SIZE, 3))
    assert all(score.mean == 0 for score in score_images(blank, texts).values())


def test_a_caption_of_another_world_is_refused():
    with pytest.raises(PromptsError, match="'an oil painting of Rome' cannot be scored"):
        score_images(np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8), ["an oil painting of Rome"])


def test_a_student_of_another_text_length_is_refused(teacher, tmp_path):
    identity = teacher.identity(text_length=teacher.text_length + 1)
    save_student(
        new_student(str(STUDENTS_FOLDER / "tiny"), identity, init="auto", dropout=0.0, seed=0),
        tmp_path / "s",
        tokenizer=None,
    )
    with pytest.raises(StudentError, match=f"was trained with {teacher.text_length + 1} text tokens, this teacher has"):
        teacher_and_students(tmp_path / "s", teacher, dtype=torch.float32, device=CPU, seed=0)


def test_the_picture_has_every_image_where_its_caption_is():
    red, blue = np.full((2, 8, 8, 3), (255, 0, 0), np.uint8), np.full((2, 8, 8, 3), (0, 0, 255), np.uint8)
    sheet = side_by_side(["teacher", "student"], [red, blue], ["one", "two"])
    pixels = np.asarray(sheet)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == colour).all(axis=-1).sum() == 2 * 96 * 96
    assert enlarged(red[0], 96).size == (96, 96)
