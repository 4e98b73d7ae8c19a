"""`secondcast init-student` as a user meets it, on the pocket teacher."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from secondcast.models.student.student import load_student
from secondcast.pocket import TEACHER_FOLDER
from tests.commands.test_cli import secondcast
from tests.models.student.initial.test_initial_student import write_t5
from tests.models.teacher.small_hub import NAME, Repository, run_apart, serve


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def words(capsys):
    assert secondcast("prompts", "pocket", "p.txt", "--num-prompts", 70, capsys=capsys)[0] == 0
    return ["init-student", "out", "--teacher", "pocket", "--prompts", "p.txt"]


@pytest.mark.thorough
def test_a_student_is_made_trained_without_the_large_encoder_exported_and_sampled(words, capsys):
    code, said, heard = secondcast(*words, "--size", "pocket-tiny", capsys=capsys)
    assert code == 0 and said.startswith("cut (layers 0,") and said.endswith("out: cut; give it to train --student\n")
    assert "parameters, 438.4 KiB, context error " in said and "shallow: left out" in heard
    record = json.loads(Path("out/initial.json").read_text())
    assert record["kept"] == "cut" and record["made"][0]["parameters"] == 112_224
    assert record["made"][0]["bytes"] == 4 * 112_224 and record["asked"]["size"] == "pocket-tiny"
    assert load_student(Path("out")).config.text_length == 24 and Path("out/tokenizer.json").is_file()
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []
    assert secondcast(*words, "--size", "pocket-tiny", capsys=capsys)[:2] == (0, "out: exists already\n")
    code, _, heard = secondcast(*words, "--size", "pocket-small", capsys=capsys)
    assert code == 1 and "out is an initial student made with size = pocket-tiny, not pocket-small: give the" in heard

    build = ["build", "c", "--teacher", "pocket", "--prompts", "p.txt", "--steps", 1, "-q"]
    assert secondcast(*build, capsys=capsys)[0] == 0
    shutil.copytree(TEACHER_FOLDER, "t")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(Path("t") / part)
    train = ["train", "run", "--cache", "c", "--backbone", "t", "--student", "out", "--steps", 1, "--batch-size", 2]
    assert secondcast(*train, "--learning-rate", 1e-6, "-q", capsys=capsys)[0] == 0
    found, given = load_file("run/checkpoint-00000001/student/model.safetensors"), load_file("out/model.safetensors")
    assert found.keys() == given.keys()
    # One step of Adam moves a weight by its learning rate, and the position bias by 20 times that.
    assert all(float((found[name] - given[name]).abs().max()) < 1e-4 for name in found)
    assert secondcast("export", "out", "exported", capsys=capsys)[0] == 0
    sample = ["generate", "exported", "--teacher", "t", "--prompts", "p.txt", "--limit", 1, "--out", "g", "--steps", 1]
    assert secondcast(*sample, "-q", capsys=capsys)[0] == 0


@pytest.mark.thorough
def test_the_same_command_makes_the_same_bytes(words, capsys):
    flags = ["--size", "2x64", "--kind", "cut", "--dtype", "float32", "-q"]
    assert secondcast(*words, *flags, capsys=capsys)[0] == 0
    assert secondcast("init-student", "again", *words[2:], *flags, capsys=capsys)[0] == 0
    for name in ("model.safetensors", "config.json", "initial.json"):
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()


@pytest.mark.thorough
def test_a_rank_makes_it_smaller_and_is_part_of_what_was_asked(words, capsys):
    flags = ["--size", "2x64", "--kind", "cut", "--dtype", "float32", "-q"]
    code, _, _ = secondcast(*words, *flags, "--projection-rank", 16, capsys=capsys)
    assert code == 0 and load_student(Path("out")).config.projection_rank == 16
    (made,) = json.loads(Path("out/initial.json").read_text())["made"]
    assert secondcast("init-student", "full", *words[2:], *flags, capsys=capsys)[0] == 0
    (full,) = json.loads(Path("full/initial.json").read_text())["made"]
    assert full["parameters"] - made["parameters"] == 256**2 - 2 * 16 * 256
    assert full["context_error"] < made["context_error"]
    code, _, heard = secondcast(*words, *flags, capsys=capsys)
    assert code == 1 and "out is an initial student made with projection-rank = 16, not None" in heard


@pytest.mark.thorough
def test_a_pretrained_student_is_compared_with_a_cut(words, tmp_path, capsys):
    write_t5(tmp_path / "t5")
    code, said, _ = secondcast(*words, "--size", "pocket-tiny", "--from", "t5", "-q", capsys=capsys)
    assert code == 0 and [line.partition(" ")[0] for line in said.splitlines()] == ["cut", "pretrained", "out:"]
    assert "pretrained (t5): " in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "5x64"], "--size asks for 5 layers, expected from 1 to 4, the teacher's: an initial student"),
        (["--size", "2x512"], "--size asks for 8 heads, expected from 1 to 4, the teacher's"),
        (["--size", "base"], "--size asks for 12 layers, expected from 1 to 4"),
        (["--size", "tiny"], "--size is 'tiny', expected small, base, large, pocket-tiny, pocket-small, pocket-base,"),
        (["--size", "pocket-xl"], "'pocket-xl' is not an embedded student, expected one of pocket-base, pocket-small"),
        (["--size", "2x64", "--limit", "2"], "tokens, expected at least 64, the width of the student: give more or"),
        (["--size", "2x64", "--kind", "pretrained"], "--kind pretrained needs --from, a T5 v1.1 such as google/t5-v1"),
        (["--size", "2x64", "--kind", "cut", "--from", "t5"], "--from is t5, but --kind cut is made of the teacher's"),
        (["--size", "2x64", "--projection-rank", "0"], "--projection-rank is 0, expected at least 1"),
        (["--size", "2x64", "--projection-rank", "128"], "--projection-rank is 128, expected 1 to 127: the text width"),
        (["--size", "2x64", "--text-length", "600"], "--text-length is 600, expected at most 512"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line_and_leaves_nothing(words, flags, message, capsys):
    code, said, heard = secondcast(*words, *flags, capsys=capsys)
    assert (code, said) == (1, "") and message in heard and heard.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["p.txt"]


def test_a_folder_that_the_command_did_not_make_stays(words, capsys):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    code, _, heard = secondcast(*words, "--size", "pocket-tiny", capsys=capsys)
    assert code == 1 and "out exists and is not empty, but has no initial.json of this command: give a new" in heard
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]


def test_a_teacher_without_gates_is_refused(words, capsys):
    shutil.copytree(TEACHER_FOLDER, "t")
    write_t5(Path("t/text_encoder_2"), feed_forward_proj="relu", d_model=256)
    code, _, heard = secondcast("init-student", "out", "--teacher", "t", *words[4:], "--size", "2x64", capsys=capsys)
    assert code == 1 and "t/text_encoder_2 is a 't5' model with feed_forward_proj = 'relu', expected 't5'" in heard


@pytest.mark.thorough
def test_of_a_teacher_on_the_hub_one_tensor_of_the_transformer_is_fetched(words, tmp_path):
    repository = Repository(folder=TEACHER_FOLDER)
    with serve({NAME: repository}) as hub:
        flags = [
            "--teacher",
            NAME,
            "--prompts",
            str(tmp_path / "p.txt"),
            "--size",
            "pocket-tiny",
            "--device",
            "cpu",
            "-q",
        ]
        code = "from secondcast import cli; cli.main()"
        run_apart(code, "init-student", str(tmp_path / "out"), *flags, home=tmp_path / "hf", HF_ENDPOINT=hub)
    sent = Counter()
    for name, size in repository.sent:
        sent[name] += size
    whole = (TEACHER_FOLDER / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert 0 < sent["transformer/diffusion_pytorch_model.safetensors"] < whole / 4
    assert {name.split("/")[0] for name in sent} == {"model_index.json", "text_encoder_2", "tokenizer_2", "transformer"}
    assert json.loads((tmp_path / "out/initial.json").read_text())["kept"] == "cut"
