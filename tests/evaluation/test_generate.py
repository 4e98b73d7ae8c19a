"""Generated pictures: FluxPipeline's for the same noise, without T5-XXL, resumable, of one kind in a folder."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from secondcast.evaluation import text_encoder as encoder_module
from secondcast.evaluation.generate import generate
from secondcast.evaluation.pictures.folder import picture_name
from secondcast.evaluation.settings.generating import GenerateOptions
from secondcast.evaluation.text_encoder import teacher_parts
from secondcast.models.memory.options import SamplingMemory
from secondcast.models.noise import draw_noise
from secondcast.models.student.student import load_student, new_student, save_student
from secondcast.models.teacher.folder import find_teacher
from secondcast.storage_schemas.errors import (
    NonFiniteError,
    SettingsError,
    SettingsMismatchError,
    StudentError,
    TeacherError,
)
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.schema.prompts import prompt_id

CPU = torch.device("cpu")
PROMPTS = ["a red dog on the left", "two cats", "a blue car", "a sign that says no", "three dogs"]
ASKED = GenerateOptions(steps=2, guidance=3.5, seed=7, dtype="float32")


def make_student(
    folder: Path, teacher: Path, t5: Path, *, text_length: int = 10, seed: int = 3, tokenizer: bool = True
) -> Path:
    opened = find_teacher(str(teacher), ())
    student = new_student(
        str(t5), opened.identity(text_length=text_length, hashed=False), init="random", dropout=0.0, seed=seed
    )
    student.config.trained_guidance = [2.0, 5.0]
    save_student(student, folder, tokenizer=opened.tokenizer_files() if tokenizer else None)
    return folder


@pytest.fixture(scope="module")
def t5_config(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("t5")
    config = json.loads((dev_teacher / "text_encoder_2/config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 16, "num_layers": 1, "num_heads": 2}))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, dev_teacher, t5_config):
    return make_student(tmp_path_factory.mktemp("students") / "s", dev_teacher, t5_config)


def run(
    student, teacher, out, prompts=PROMPTS, *, batch_size=2, progress=None, memory=None, memory_bytes=None, **changes
) -> int:
    return generate(
        str(student),
        find_teacher(str(teacher), teacher_parts(str(student), changes.get("pooled", "zero"))),
        prompts,
        out,
        ASKED.model_copy(update=changes),
        batch_size=batch_size,
        device=CPU,
        progress=progress or Silent(),
        memory=memory or SamplingMemory(),
        memory_bytes=memory_bytes,
    )


def index_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


class StopAfter(Silent):
    def __init__(self, bars: int) -> None:
        self.left = bars

    def bar(self, title, **counts):
        return nullcontext(self)

    def advance(self, count, note=""):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message):
        self.lines.append(message)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, student, dev_teacher):
    folder = tmp_path_factory.mktemp("pictures") / "whole"
    assert run(student, dev_teacher, folder) == 5
    return folder


def test_the_index_names_prompt_file_seed_and_guidance_of_every_picture(whole):
    entries = index_of(whole)
    assert [entry["prompt"] for entry in entries] == PROMPTS
    assert entries[3] == {
        "number": 3,
        "prompt": "a sign that says no",
        "file": "000003-a-sign-that-says-no.png",
        "seed": 7,
        "guidance": 3.5,
    }
    assert pictures(whole).keys() == {entry["file"] for entry in entries}
    assert all(Image.open(whole / entry["file"]).size == (16, 16) for entry in entries)


def test_a_picture_is_flux_pipelines_for_the_same_noise_at_the_students_text_length(whole, student, dev_teacher):
    part = PROMPTS[2:4]
    pipeline = pipeline_with(student, dev_teacher)
    embedding, _, _ = pipeline.encode_prompt(part, None, max_sequence_length=10)
    expected = pipeline_images(pipeline, part, prompt_embeds=embedding, pooled_prompt_embeds=torch.zeros(2, 8))
    assert np.array_equal(read_pictures(whole, (2, 3)), expected)


def test_with_pooled_clip_it_is_the_whole_pipeline_called_with_the_prompts(student, dev_teacher, tmp_path):
    run(student, dev_teacher, tmp_path / "out", PROMPTS[:2], pooled="clip")
    expected = pipeline_images(
        pipeline_with(student, dev_teacher), PROMPTS[:2], prompt=PROMPTS[:2], max_sequence_length=10
    )
    assert np.array_equal(read_pictures(tmp_path / "out", (0, 1)), expected)


def pipeline_with(student: Path | None, teacher: Path) -> FluxPipeline:
    encoder = None if student is None else load_student(student)
    pipeline = FluxPipeline.from_pretrained(teacher, text_encoder_2=encoder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_pictures(folder: Path, numbers: tuple[int, ...]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / picture_name(n, PROMPTS[n]))) for n in numbers])


def pipeline_images(pipeline: FluxPipeline, texts: list[str], **text) -> np.ndarray:
    noise = [draw_noise(seed=7, prompt_id=prompt_id(t), sample_index=0, image_tokens=16, channels=16) for t in texts]
    images = pipeline(
        **text,
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=3.5,
        latents=torch.from_numpy(np.stack(noise)),
        output_type="np",
    ).images
    return (images * 255).round().astype("uint8")


def test_no_text_encoder_and_no_tokenizer_of_the_teacher_is_needed(whole, student, dev_teacher, tmp_path):
    shutil.copytree(dev_teacher, tmp_path / "t")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(tmp_path / "t" / part)
    run(student, tmp_path / "t", tmp_path / "out")
    assert pictures(tmp_path / "out") == pictures(whole)
    with pytest.raises(TeacherError, match=r"t has no text_encoder_2/, expected a folder in the FluxPipeline layout"):
        run("teacher", tmp_path / "t", tmp_path / "other")


def test_a_student_without_tokenizer_takes_the_teachers(whole, student, dev_teacher, t5_config, tmp_path):
    bare = make_student(tmp_path / "bare", dev_teacher, t5_config, tokenizer=False)
    run(bare, dev_teacher, tmp_path / "out")
    assert pictures(tmp_path / "out") == pictures(whole)


@pytest.mark.thorough
def test_t5_xxl_is_not_loaded_for_a_student(student, dev_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module.TeacherTextEncoder, "load", None)
    assert run(student, dev_teacher, tmp_path / "out", PROMPTS[:1]) == 1
    with pytest.raises(TypeError):
        run("teacher", dev_teacher, tmp_path / "other", PROMPTS[:1])


@pytest.mark.thorough
def test_the_teacher_starts_from_the_same_noise_and_ends_elsewhere(whole, dev_teacher, tmp_path, monkeypatch):
    drawn = []

    def watching(**what):
        drawn.append(what)
        return draw_noise(**what)

    monkeypatch.setattr("secondcast.evaluation.sampling.draw_noise", watching)
    run("teacher", dev_teacher, tmp_path / "out", PROMPTS[:2])
    assert [(what["seed"], what["prompt_id"]) for what in drawn] == [(7, prompt_id(text)) for text in PROMPTS[:2]]
    theirs, ours = pictures(tmp_path / "out"), pictures(whole)
    assert all(ours[name] != theirs[name] for name in theirs)
    assert json.loads((tmp_path / "out/generate.json").read_text())["text_length"] == 12
    run("teacher", dev_teacher, tmp_path / "shorter", PROMPTS[:2], text_length=10)
    assert json.loads((tmp_path / "shorter/generate.json").read_text())["text_length"] == 10


@pytest.mark.thorough
@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_and_given_again_the_pictures_are_those_of_an_unbroken_run(
    whole, student, dev_teacher, tmp_path, stop
):
    with pytest.raises(KeyboardInterrupt):
        run(student, dev_teacher, tmp_path / "out", progress=StopAfter(stop))
    assert len(index_of(tmp_path / "out")) == 2 * stop == len(pictures(tmp_path / "out"))
    with (tmp_path / "out/index.jsonl").open("a") as file:
        file.write('{"number": 4, "prom')
    (tmp_path / "out" / picture_name(1, PROMPTS[1])).unlink()
    kept = (tmp_path / "out" / picture_name(0, PROMPTS[0])).stat().st_mtime_ns
    assert run(student, dev_teacher, tmp_path / "out") == 5 - 2 * stop + 1
    assert (tmp_path / "out" / picture_name(0, PROMPTS[0])).stat().st_mtime_ns == kept
    assert pictures(tmp_path / "out") == pictures(whole)
    assert (tmp_path / "out/index.jsonl").read_bytes() == (whole / "index.jsonl").read_bytes()


@pytest.mark.thorough
def test_given_again_nothing_is_made_and_more_prompts_are_added(student, dev_teacher, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(student, dev_teacher, out, PROMPTS[:2]) == 2
    assert run(student, dev_teacher, out, PROMPTS[:3]) == 1
    monkeypatch.setattr("secondcast.evaluation.generate.Generator", None)
    assert run(student, dev_teacher, out, PROMPTS[:3]) == 0
    assert run(student, dev_teacher, out, PROMPTS[:1]) == 0
    assert [entry["number"] for entry in index_of(out)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": 3},
            "made with steps = 2, requested 3: images of both must not be mixed",
        ),
        ({"guidance": 4.0}, "made with guidance = 3.5, requested 4.0"),
        ({"seed": 8}, "made with seed = 7, requested 8"),
        ({"pooled": "clip"}, r"made with teacher = \w+, requested \w+"),
        ({"dtype": "bfloat16"}, "made with dtype = float32, requested bfloat16"),
        ({"height": 16, "width": 24}, "made with width = 16, requested 24"),
    ],
)
def test_other_settings_in_one_folder_are_refused_by_the_field(whole, student, dev_teacher, changes, message):
    with pytest.raises(SettingsMismatchError, match=rf"whole has images {message}.*; give another --out$"):
        run(student, dev_teacher, whole, **changes)


def test_another_student_teacher_or_prompt_in_one_folder_is_refused(
    whole, student, dev_teacher, schnell_teacher, t5_config, tmp_path
):
    other = make_student(tmp_path / "other", dev_teacher, t5_config, text_length=9)
    with pytest.raises(
        SettingsMismatchError, match=r"made with text-length = 10, requested 9|made with student = \w+, requested \w+"
    ):
        run(other, dev_teacher, whole)
    with pytest.raises(SettingsMismatchError, match=r"made with teacher = \w{32}, requested \w{32}: "):
        run(student, schnell_teacher, whole)
    with pytest.raises(SettingsMismatchError, match="has prompt 1 = 'two cats', requested 'two dogs': images are "):
        run(student, dev_teacher, whole, [PROMPTS[0], "two dogs"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").write_text("")
    with pytest.raises(SettingsError, match=r"mine has other files and no generate.json: give a new folder with --out"):
        run(student, dev_teacher, tmp_path / "mine")
    shutil.copytree(whole, tmp_path / "damaged")
    (tmp_path / "damaged/generate.json").write_text("[")
    with pytest.raises(
        SettingsError, match=r"generate.json cannot be read: it was not written by this version; give another"
    ):
        run(student, dev_teacher, tmp_path / "damaged")


def test_a_student_that_does_not_fit_is_refused_before_a_folder_is_made(student, dev_teacher, tmp_path):
    with pytest.raises(
        SettingsError, match=r"--text-length is 12, but .*s was trained with 10 text tokens: a student "
    ):
        run(student, dev_teacher, tmp_path / "out", text_length=12)
    with pytest.raises(SettingsError, match="^--guidance is nan, expected a finite number"):
        run(student, dev_teacher, tmp_path / "out", guidance=float("nan"))
    with pytest.raises(SettingsError, match="height is 17, expected a multiple of 4"):
        run(student, dev_teacher, tmp_path / "out", height=17, width=16)
    with pytest.raises(StudentError, match="no student nix: there is no such folder; give a run folder"):
        run("nix", dev_teacher, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_whose_latent_is_not_finite_is_refused_with_its_prompt(student, dev_teacher, tmp_path):
    shutil.copytree(student, tmp_path / "s")
    weights = load_file(tmp_path / "s/model.safetensors")
    weights["final_projection.3.weight"] *= 3e38
    save_file(weights, tmp_path / "s/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=f"^the final latent of the image of {PROMPTS[0]!r} is not finite: .*"):
        run(tmp_path / "s", dev_teacher, tmp_path / "out", PROMPTS[:2])
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.thorough
def test_guidance_beyond_what_it_was_trained_for_is_remarked_and_schnell_takes_none(
    student, dev_teacher, schnell_teacher, tmp_path
):
    heard = Heard()
    run(student, dev_teacher, tmp_path / "out", PROMPTS[:1], guidance=7.0, progress=heard)
    assert heard.lines == ["guidance 7 is outside the student's training range, 2 to 5"]
    run(student, schnell_teacher, tmp_path / "s", PROMPTS[:1], guidance=7.0, progress=heard)
    assert len(heard.lines) == 1 and index_of(tmp_path / "s")[0]["guidance"] is None


@pytest.mark.thorough
def test_a_full_disk_leaves_no_torn_picture(student, dev_teacher, tmp_path, monkeypatch):
    from secondcast.storage_schemas.io import durable

    real = durable.replace

    def full(path, data):
        if path.name.startswith("000003"):
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(durable, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run(student, dev_teacher, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(pictures(tmp_path / "out"))[-1] == "000002-a-blue-car.png"
    assert run(student, dev_teacher, tmp_path / "out") == 3
