"""Commands refuse a teacher whose weights are not whole before any work, and say that a missing path is missing."""

import shutil
from pathlib import Path

import pytest

from secondcast.pocket import TEACHER_FOLDER
from tests.cache_builder.building import build_cache
from tests.commands.test_cli import secondcast
from tests.models.student.encoders import rewrite_config
from tests.models.weights.damaged_weights import rewrite


@pytest.fixture
def copy(tmp_path) -> Path:
    """The pocket teacher, to be damaged."""
    return shutil.copytree(TEACHER_FOLDER, tmp_path / "copy")


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "p.txt").write_text("a red car\na blue dog\n")
    return tmp_path / "p.txt"


def lose(part: Path, names: str) -> None:
    rewrite(part, lambda tensors: {name: tensor for name, tensor in tensors.items() if names not in name})


def refused(*words, capsys, left: Path) -> str:
    before = sorted(left.iterdir())
    code, said, heard = secondcast(*words, capsys=capsys)
    assert (code, said, heard.count("\n")) == (1, "", 1), heard
    assert sorted(left.iterdir()) == before
    return heard.removeprefix("secondcast: ").rstrip()


@pytest.mark.thorough
def test_build_refuses_a_t5_without_a_block_and_writes_nothing(copy, prompts, tmp_path, capsys):
    lose(copy / "text_encoder_2", ".block.2.")
    words = ("build", tmp_path / "c", "--teacher", copy, "--prompts", prompts, "--limit", 8, "--steps", 4)
    assert refused(*words, capsys=capsys, left=tmp_path) == (
        f"{copy}/text_encoder_2 cannot be loaded: 9 of the 40 tensors of T5EncoderModel are missing "
        f"(encoder.block.2.layer.0.SelfAttention.q.weight and 8 more): of the 4 blocks in encoder.block the file lacks "
        f"number 2; download it again"
    )
    lose(copy / "vae", "decoder.mid_block")
    shutil.copytree(TEACHER_FOLDER / "text_encoder_2", copy / "text_encoder_2", dirs_exist_ok=True)
    assert refused(*words, capsys=capsys, left=tmp_path).startswith(
        f"{copy}/vae cannot be loaded: 16 of the 100 tensors of AutoencoderKL are missing (decoder.mid_block."
    )


@pytest.mark.thorough
def test_train_refuses_a_transformer_that_lacks_tensors_and_begins_no_run(copy, prompts, tmp_path, capsys):
    build_cache(tmp_path / "c", copy, prompts, steps=1)
    lose(copy / "transformer", "single_transformer_blocks.0.")
    words = ("train", tmp_path / "r", "--cache", tmp_path / "c", "--student", "pocket-tiny", "--steps", 1)
    said = refused(*words, capsys=capsys, left=tmp_path)
    assert said.startswith(f"{copy}/transformer cannot be loaded: ") and said.endswith("; download it again")
    assert "tensors of FluxTransformer2DModel are missing (single_transformer_blocks.0." in said
    assert "in single_transformer_blocks the file lacks number 0" in said


@pytest.mark.parametrize(
    ("part", "layers", "says"),
    [
        ("text_encoder_2", 3, "9 tensors are unexpected (encoder.block.3."),
        ("transformer", 9, " are missing (transformer_"),
    ],
)
def test_generate_refuses_weights_of_another_configuration_and_makes_no_picture(
    part, layers, says, copy, prompts, tmp_path, capsys
):
    rewrite_config(copy / part, num_layers=layers)
    words = ("generate", "teacher", "--teacher", copy, "--prompts", prompts, "--out", tmp_path / "o", "--steps", 1)
    heard = refused(*words, capsys=capsys, left=tmp_path)
    assert heard.startswith(f"{copy}/{part} cannot be loaded: ") and says in heard
    assert f"config.json has {layers} blocks " in heard
    assert heard.endswith("; give weights and a config.json of the same model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["build", "c", "--teacher", "./nix", "--prompts", "p.txt"],
            "no teacher './nix': there is no such folder; give",
        ),
        (
            ["generate", "nix", "--teacher", "pocket", "--prompts", "p.txt", "--out", "o"],
            "no student nix: there is no such folder; give a run",
        ),
        (
            ["export", "nix", "out"],
            "no student nix: there is no such folder; give a run folder, or what `secondcast export` ",
        ),
        (
            ["export", "empty", "out"],
            "empty has no student: it has no config.json; give a run folder, or what `second",
        ),
        (
            ["export", "run", "out"],
            "no student run/checkpoint-00000003/student: there is no such folder; give a run",
        ),
        (
            ["export", "broken", "out"],
            "broken/config.json cannot be read, expected the JSON of a student's configuration",
        ),
        (
            ["evaluate", "score", "nix", "--pocket"],
            "no student nix: there is no such folder; give a run folder, or what `secondcast export` ",
        ),
        (
            ["generate", "teacher", "--teacher", "t5.gguf", "--prompts", "p.txt", "--out", "o"],
            "t5.gguf is a file, expected a folder in the layout of a pipeline",
        ),
    ],
)
def test_a_path_that_is_missing_or_something_else_is_said_to_be(words, message, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "run/checkpoint-00000003", "broken"):
        Path(folder).mkdir(parents=True)
    Path("broken/config.json").write_text("[1]")
    Path("t5.gguf").write_bytes(b"GGUF")
    heard = refused(*words, capsys=capsys, left=tmp_path)
    assert heard.startswith(message) and "None" not in heard
