"""The programs of a model card run as they are, with no more than the folder's name filled in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from safetensors.torch import load_file

from secondcast.models.families import flux
from secondcast.models.student.student import new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import find_teacher
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.trainer.run.config import RecordedWith
from secondcast.trainer.run.export import export
from secondcast.trainer.run.export_facts import FACTS_FILE, ExportFacts
from secondcast.trainer.run.usage_snippets import diffusers_text
from tests.models.student.encoders import make_encoder_folder
from tests.project.programs import programs, run_program

POCKET = RecordedWith(teacher="pocket", height=24, width=24, steps=2, schedule="diffusers", dtype="float32")
FACTS = ExportFacts(
    teacher="pocket", teacher_digest="a", sampling_digest="b", text_length=24, guidance=(2.0, 2.5), settings={},
    checkpoint="checkpoint-3", validation_loss=0.5, replay_error=None, created_by="u", recorded=POCKET,
)  # fmt: skip
FLUX = RecordedWith(
    teacher="black-forest-labs/FLUX.1-dev", height=512, width=768, steps=20, schedule="diffusers", dtype="bfloat16"
)
EMBED = """
from safetensors.torch import save_file
with torch.no_grad():
    embedding = pipeline.encode_prompt(["a red ring", "two squares"], None, max_sequence_length=LENGTH)[0]
save_file({"embedding": embedding}, "e.safetensors")
"""


def make_export(folder: Path, source: Path, facts: ExportFacts | None = FACTS) -> Path:
    teacher = find_teacher(str(TEACHER_FOLDER), ())
    identity = teacher.identity(text_length=teacher.text_length, hashed=False)
    student = new_student(str(source), identity, init="auto", dropout=0.0, seed=0)
    tokens = own_tokens(source, student)
    save_student(student, folder / "saved", tokenizer=tokens.files if tokens else teacher.tokenizer_files())
    if facts is not None:
        (folder / "saved" / FACTS_FILE).write_text(facts.model_dump_json())
    export(folder / "saved", folder / "student")
    return folder / "student"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "length"), [("t5", 24), ("bert", 20)])
def test_the_pockets_card_runs_and_a_saved_pipeline_loads_elsewhere_with_the_same_embedding(kind, length, tmp_path):
    embed = EMBED.replace("LENGTH", str(length))
    source = STUDENTS_FOLDER / "tiny" if kind == "t5" else make_encoder_folder(tmp_path / "bert")
    folder = make_export(tmp_path, source)
    alone, whole = programs((folder / "README.md").read_text())
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    save = 'pipeline.save_pretrained("../second/my-pipeline")\n' + embed
    run_program(alone.replace("PATH_OF_THIS_FOLDER", str(folder)) + save, tmp_path / "first")
    # Where the export is no longer, nor the modules that transformers keeps of it.
    folder.rename(tmp_path / "moved")
    run_program(whole + embed, tmp_path / "second", without_us=True)
    first, second = (load_file(tmp_path / name / "e.safetensors")["embedding"] for name in ("first", "second"))
    assert torch.equal(first, second) and first.shape == (2, length, 256)
    with Image.open(tmp_path / "second/a-red-circle.png") as picture:
        assert picture.size == (24, 24) and np.asarray(picture).std() > 1


@pytest.mark.slow
def test_the_card_of_a_flux_student_runs_where_secondcast_is_not_installed(tmp_path):
    facts = FACTS.model_copy(update={"teacher": FLUX.teacher, "recorded": FLUX})
    folder = make_export(tmp_path, STUDENTS_FOLDER / "tiny", facts)
    alone, _ = programs((folder / "README.md").read_text())
    in_place = {
        "PATH_OF_THIS_FOLDER": str(folder), "black-forest-labs/FLUX.1-dev": str(TEACHER_FOLDER),
        "height=512": "height=24", "width=768": "width=24", "num_inference_steps=20": "num_inference_steps=2",
    }  # fmt: skip
    for said, done in in_place.items():
        assert said in alone, said
        alone = alone.replace(said, done)
    (tmp_path / "elsewhere").mkdir()
    outside = 'import importlib.util\nassert importlib.util.find_spec("secondcast") is None\n'
    checked = outside + alone + "assert pipeline.text_encoder_2.dtype == torch.bfloat16\n"
    run_program(checked, tmp_path / "elsewhere", without_us=True)
    assert (tmp_path / "elsewhere/a-red-circle.png").is_file()


def call_of(text: str) -> str:
    return " ".join(programs(text)[0].partition("pipeline(\n")[2].split())


def test_a_program_states_size_steps_guidance_text_length_and_dtype_of_what_was_recorded():
    text = diffusers_text(FLUX.teacher, FLUX, guidance=(2.0, 3.0, 5.0), text_length=77, own_tokenizer=False, is_t5=True)
    assert call_of(text).startswith(
        'prompt="a red circle", height=512, width=768, num_inference_steps=20, guidance_scale=3.0, '
        "max_sequence_length=77, )"
    )
    assert text.count("dtype=torch.bfloat16") == 3 and "not recorded" not in text
    assert 'from_pretrained(\n    "black-forest-labs/FLUX.1-dev", text_encoder_2=student, torch_dtype' in text


def test_a_teacher_that_takes_no_guidance_is_given_none():
    text = diffusers_text("t", FLUX, guidance=None, text_length=77, own_tokenizer=False, is_t5=True)
    assert "guidance" not in text


def test_what_was_not_recorded_is_said_to_be_a_default():
    text = diffusers_text("TEACHER", None, guidance=None, text_length=77, own_tokenizer=False, is_t5=True)
    assert (
        "The image size and steps of its training were not recorded: these are the defaults of `secondcast build`."
        in text
    )
    assert call_of(text).startswith('prompt="a red circle", height=512, width=512, num_inference_steps=20, max_')


def test_a_student_of_the_reference_schedule_is_given_its_sigmas():
    reference = FLUX.model_copy(update={"schedule": "distillt5"})
    text = diffusers_text("t", reference, guidance=None, text_length=77, own_tokenizer=False, is_t5=True)
    assert "sigmas=torch.linspace(1, 0.001, 20).tolist()," in text and "sigmas" not in diffusers_text(
        "t", FLUX, guidance=None, text_length=77, own_tokenizer=False, is_t5=True
    )
    config = find_teacher(str(TEACHER_FOLDER), ()).config("scheduler")
    expected = flux.FLUX.schedule("distillt5", config, steps=20, image_tokens=36, dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift(36, *(config[name] for name in names))
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.001, 20).tolist(), mu=shift)
    assert np.allclose(scheduler.sigmas, expected.sigmas, atol=1e-5)
