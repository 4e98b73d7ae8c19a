"""`understudy train` with its options: each is a flag, a key of a TOML file, and a line of config.json."""

import json

import pytest

from tests.test_cli import understudy
from tests.trainer.conftest import cache_folder, t5_config
from trainer.run_folder import CONFIG_FILE
from trainer.settings import TrainFlags

__all__ = ["cache_folder", "t5_config"]

OPTIONS = {
    "warmup_loss": "context", "loss": "vision", "huber": 0.5, "step_weights": "interval", "embedding_term": 0.25,
    "accumulate": 2, "order": "shuffled", "steps_per_trajectory": 2, "decay": "linear", "lr_warmup_steps": 1,
    "ema": 0.9, "student_dtype": "bfloat16-autocast", "modulation": "table", "checkpoint_blocks": 2,
    "keep": 3, "batch_size": 4, "steps": 2, "warmup_steps": 1,
}  # fmt: skip


def flags_of(options: dict[str, object]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture
def words(tmp_path, cache_folder, dev_teacher, t5_config):
    return ["train", tmp_path / "run", "--cache", cache_folder, "--student", t5_config, "--backbone", dev_teacher]


def test_every_option_of_training_is_a_flag_and_a_key(tmp_path, words, capsys):
    code, said, heard = understudy(*words, *flags_of(OPTIONS), capsys=capsys)
    assert code == 0 and "trained for 3 steps" in said and "in float32, bfloat16 autocast; " in heard
    settings = json.loads((tmp_path / "run" / CONFIG_FILE).read_bytes())["settings"]
    warm_up, main = settings["stages"]
    assert {key: settings.get(key, main.get(key)) for key in OPTIONS if not key.startswith("warmup")} == {
        key: value for key, value in OPTIONS.items() if not key.startswith("warmup")
    }
    assert (warm_up["loss"], warm_up["steps"], warm_up["batch_size"], warm_up["huber"]) == ("context", 1, 4, None)
    kinds = [json.loads(line).get("kind") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [kind for kind in kinds if kind] == ["context", "vision", "vision"]
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in OPTIONS.items()]
    (tmp_path / "train.toml").write_text("\n".join(lines))
    code, said, heard = understudy(*words, "--settings", tmp_path / "train.toml", capsys=capsys)
    assert code == 0 and "going on from step 3" in heard


def test_every_setting_has_its_flag_with_the_same_default(capsys):
    import inspect

    from commands.train import train

    given = inspect.signature(train).parameters
    for name, field in TrainFlags.model_fields.items():
        if name not in ("student", "validate_rows"):
            assert given[name].default == field.default, name


def test_an_embedding_loss_alone_asks_for_no_transformer(tmp_path, words, capsys):
    code, said, heard = understudy(
        *words[:-1], tmp_path / "nowhere", "--loss", "embedding", "--steps", 1, "--batch-size", 2, capsys=capsys
    )
    assert code == 0 and "trained for 1 steps" in said and "replay floor" not in heard
    code, _, heard = understudy(
        *words[:1], tmp_path / "b", *words[2:-1], tmp_path / "nowhere", "--loss", "context", "--steps", 1, capsys=capsys
    )
    assert code == 1 and "nowhere" in heard


def test_options_that_do_not_go_together_are_one_line(words, capsys):
    code, _, heard = understudy(*words, "--order", "following", "--steps-per-trajectory", 2, capsys=capsys)
    assert code == 1 and heard.count("\n") == 1
    assert "steps-per-trajectory is 2 with order following, expected 1: it walks each trajectory step by step" in heard
