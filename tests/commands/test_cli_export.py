"""`secondcast export` and `secondcast generate` as a user meets them, on the pocket teacher."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secondcast.evaluation.pocket_scores import score_images
from secondcast.models.student.student import new_student, save_student
from secondcast.models.teacher.folder import find_teacher
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.pocket.world import IMAGE_SIZE, captions
from tests.commands.test_cli import secondcast


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "s"
    teacher = find_teacher(str(TEACHER_FOLDER), ())
    identity = teacher.identity(text_length=teacher.text_length, hashed=False)
    made = new_student(str(STUDENTS_FOLDER / "tiny"), identity, init="random", dropout=0.0, seed=0)
    save_student(made, folder, tokenizer=teacher.tokenizer_files())
    return folder


def prompt_file(count: int) -> Path:
    Path("prompts.txt").write_text("".join(f"{text}\n" for text in captions(count, seed=1, split="heldout")))
    return Path("prompts.txt")


@pytest.mark.thorough
def test_the_teachers_pictures_score_when_read_through_the_index(capsys):
    words = ["generate", "teacher", "--teacher", "pocket", "--prompts", prompt_file(16), "--out", "p", "--steps", 8]
    words += ["--batch-size", 16, "--dtype", "float32"]
    code, said, heard = secondcast(*words, capsys=capsys)
    assert (code, said) == (0, "p: 16 pictures\n") and "generate: 16 of 16 images" in heard
    entries = [json.loads(line) for line in Path("p/index.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(Path("p") / entry["file"])) for entry in entries])
    assert images.shape == (16, IMAGE_SIZE, IMAGE_SIZE, 3)
    scores = score_images(images, [entry["prompt"] for entry in entries])
    assert scores["colour"].mean > 0.8 and scores["binding"].mean > 0.6
    shuffled = score_images(images[::-1], [entry["prompt"] for entry in entries])
    assert shuffled["binding"].mean < 0.4
    code, said, heard = secondcast(*words, "--quiet", capsys=capsys)
    assert (code, said, heard) == (0, "p: 0 pictures, 16 existed before\n", "")


@pytest.mark.thorough
def test_every_folder_form_of_a_student_makes_the_same_pictures_without_the_teachers_text_encoders(student, capsys):
    shutil.copytree(TEACHER_FOLDER, "t")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(Path("t") / part)
    code, said, _ = secondcast("export", student, "diffusers", capsys=capsys)
    assert code == 0 and re.match(r"diffusers: float32 weights, \S+ KiB; pass it to the teacher's pi", said)
    code, said, heard = secondcast("export", student, "distillt5", "--to", "distillt5", capsys=capsys)
    assert code == 0 and "KiB; in the format of the published DistillT5 checkpoint" in said and not heard
    code, said, heard = secondcast("export", "distillt5", "s.safetensors", "--to", "comfyui", capsys=capsys)
    assert code == 0 and said.endswith(" KiB; copy it to ComfyUI/models/clip for the DistillT5 node\n")
    assert "cannot load this student, which has d_model = " in heard and "pads prompts to 256 tokens" in heard
    code, said, _ = secondcast("export", student, "q", "--quantize", "nf4", capsys=capsys)
    assert code == 0 and re.match(r"q: nf4 weights, \S+ KiB; pass it to the teacher's pipeline", said)
    made = {}
    for form in (str(student), "diffusers", "distillt5", "q"):
        words = ["--teacher", "t", "--prompts", prompt_file(2), "--out", f"p-{Path(form).name}", "--steps", 1]
        assert secondcast("generate", form, *words, "--dtype", "float32", capsys=capsys)[0] == 0
        made[form] = [file.read_bytes() for file in sorted(Path(f"p-{Path(form).name}").glob("*.png"))]
    assert (
        len(made["q"]) == len(made["diffusers"]) == 2 and made["diffusers"] == made["distillt5"] == made[str(student)]
    )
    assert made["q"] != made["diffusers"]


GENERATE = ["generate", "teacher", "--teacher", "pocket", "--prompts", "p.txt", "--out", "o"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["generate", "nix", *GENERATE[2:]],
            1,
            r"no student nix: there is no such folder; give a run folder, or what `secondcast export`",
        ),
        (["generate", "taken", *GENERATE[2:]], 1, r"taken has no student: it has no config.json; give"),
        (["generate", "p.txt", *GENERATE[2:]], 1, r"p.txt is a single file without configuration and tok"),
        ([*GENERATE[:3], "nix", *GENERATE[4:]], 1, r"no teacher 'nix': there is no such folder; give 'pocket', an ex"),
        ([*GENERATE[:-1], "taken"], 1, r"taken has other files and no generate.json: give a new folder with --out"),
        ([*GENERATE[:-1], "p.txt"], 1, r"--out is p.txt, which is named like a file, expected a folder: give p"),
        ([*GENERATE[:-1], "p.txt/x"], 1, r"p.txt/x.*: Not a directory: committed work is kept"),
        ([*GENERATE, "--height", "24"], 1, r"--height is given without --width: give both, or --resolution for a sq"),
        (
            [*GENERATE, "--height", "24", "--width", "24", "--resolution", "24"],
            1,
            r"--resolution is given together with",
        ),
        ([*GENERATE, "--resolution", "25"], 1, r"height is 25, expected a multiple of 4"),
        ([*GENERATE, "--guidance", "inf"], 1, r"--guidance is inf, expected a finite number"),
        ([*GENERATE, "--steps", "0"], 1, r"--steps is 0, expected at least 1"),
        ([*GENERATE, "--seed", "9" * 20], 1, "--seed is 9{20}, expected less than 9223372036854775808"),
        ([*GENERATE, "--prompts", "nix.txt"], 1, r"no prompt file nix.txt"),
        (GENERATE[:-2], 2, r"Missing option '--out'"),
        (["export", "taken", "o"], 1, r"taken has no student: it has no config.json"),
        (["export", "taken", "o", "--to", "onnx"], 2, r"'onnx' is not one of 'diffusers', 'distillt5', 'comfyui'"),
        (["export", "taken", "taken"], 1, r"taken exists and is not empty: give a new folder for the export"),
        (["export", "taken", "o", "--to", "comfyui"], 1, r"o has the suffix '', expected '.safetensors': --to com"),
    ],
)
def test_bad_input_is_one_clear_line(words, code, message, capsys):
    Path("taken").mkdir()
    Path("taken/x").write_text("")
    Path("p.txt").write_text("a red circle\n")
    found, _, heard = secondcast(*words, capsys=capsys)
    last = heard.strip().splitlines()[-1]
    assert (found, last.startswith("secondcast: ")) == (code, True)
    assert re.search(message, last), last
    assert "Traceback" not in heard and not Path("o").exists()


@pytest.mark.parametrize("command", ["export", "generate"])
def test_the_help_text_has_an_example(command, capsys):
    code, said, _ = secondcast(command, "--help", capsys=capsys)
    assert code == 0 and f"Example: secondcast {command} my-" in " ".join(said.split())


@pytest.mark.thorough
def test_flags_of_generate_may_stand_in_a_toml_file(student, capsys):
    prompt_file(3)
    Path("g.toml").write_text('teacher = "pocket"\nprompts = ["prompts.txt"]\nout = "o"\nsteps = 1\nlimit = 2\n')
    code, said, _ = secondcast("generate", student, "--config", "g.toml", capsys=capsys)
    assert (code, said) == (0, "o: 2 pictures\n")
    code, _, heard = secondcast("generate", student, "--config", "g.toml", "--seed", 1, capsys=capsys)
    assert code == 1 and "o has images made with seed = 0, requested 1" in heard
