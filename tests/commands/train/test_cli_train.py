"""`secondcast train` with its options: each is a flag, a key of a TOML file, and a line of config.json."""

import json

import pytest

from secondcast.trainer.run.folder import CONFIG_FILE
from tests.commands.test_cli import secondcast
from tests.trainer.conftest import cache_folder, t5_config

__all__ = ["cache_folder", "t5_config"]

OPTIONS = {
    "pretrain_loss": "context", "loss": "vision", "huber_delta": 0.5, "timestep_weighting": "interval",
    "embedding_loss_weight": 0.25,
    "grad_accum_steps": 2, "data_order": "shuffled", "timesteps_per_sample": 2, "lr_schedule": "linear",
    "lr_warmup_steps": 1,
    "ema_decay": 0.9, "student_dtype": "bfloat16-autocast", "modulation": "precomputed", "activation_checkpointing": 2,
    "keep_checkpoints": 3, "batch_size": 4, "steps": 2, "pretrain_steps": 1,
}  # fmt: skip


def flags_of(options: dict[str, object]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture
def words(tmp_path, cache_folder, dev_teacher, t5_config):
    return ["train", tmp_path / "run", "--cache", cache_folder, "--student", t5_config, "--backbone", dev_teacher]


@pytest.mark.thorough
def test_every_option_of_training_is_a_flag_and_a_key(tmp_path, words, capsys):
    code, said, heard = secondcast(*words, *flags_of(OPTIONS), capsys=capsys)
    assert code == 0 and "trained for 3 steps" in said and "in float32, bfloat16 autocast; " in heard
    settings = json.loads((tmp_path / "run" / CONFIG_FILE).read_bytes())["settings"]
    pretrain, main = settings["stages"]
    assert {key: settings.get(key, main.get(key)) for key in OPTIONS if not key.startswith("pretrain")} == {
        key: value for key, value in OPTIONS.items() if not key.startswith("pretrain")
    }
    assert (pretrain["loss"], pretrain["steps"], pretrain["batch_size"], pretrain["huber_delta"]) == (
        "context",
        1,
        4,
        None,
    )
    for told in (
        "stage pretrain (context), mean of 1 step: ", "stage main (vision), mean of 2 steps: ",
        " samples/s; data wait ",
        "backbone forward ", "validation, checkpoints and samples: ", "peak memory: ",
    ):  # fmt: skip
        assert told in heard
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == 2 and list(entries[-1]["summary"]["stages"]) == ["pretrain", "main"]
    kinds = [entry.get("kind") for entry in entries]
    assert [kind for kind in kinds if kind] == ["context", "vision", "vision"]
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in OPTIONS.items()]
    (tmp_path / "train.toml").write_text("\n".join(lines))
    code, said, heard = secondcast(*words, "--config", tmp_path / "train.toml", capsys=capsys)
    assert code == 0 and "resuming from step 3" in heard


def test_an_embedding_loss_alone_asks_for_no_transformer(tmp_path, words, capsys):
    code, said, heard = secondcast(
        *words[:-1], tmp_path / "nowhere", "--loss", "embedding", "--steps", 1, "--batch-size", 2, capsys=capsys
    )
    assert code == 0 and "trained for 1 step" in said and "replay error" not in heard
    code, _, heard = secondcast(
        *words[:1], tmp_path / "b", *words[2:-1], tmp_path / "nowhere", "--loss", "context", "--steps", 1, capsys=capsys
    )
    assert code == 1 and "nowhere" in heard


def test_options_that_do_not_go_together_are_one_line(words, capsys):
    code, _, heard = secondcast(*words, "--data-order", "sequential", "--timesteps-per-sample", 2, capsys=capsys)
    assert code == 1 and heard.count("\n") == 1
    assert "timesteps-per-sample is 2 with data-order sequential, expected 1: that order has one timestep" in heard


@pytest.mark.thorough
def test_metrics_are_shown_in_tensorboard_too(tmp_path, words, capsys):
    code, _, heard = secondcast(*words, "--steps", 1, "--batch-size", 2, "--report-to", "tensorbord", capsys=capsys)
    assert (code, heard) == (1, "secondcast: --report-to is 'tensorbord', expected tensorboard or wandb\n")
    code, _, _ = secondcast(*words, "--steps", 1, "--batch-size", 2, "--report-to", "tensorboard", capsys=capsys)
    assert code == 0 and list((tmp_path / "run/tensorboard").glob("events.*"))
    assert "report_to" not in json.loads((tmp_path / "run" / CONFIG_FILE).read_bytes())["settings"]


def test_a_training_without_cache_or_student_is_one_line(words, capsys):
    code, _, heard = secondcast("train", words[1], "--student", "x", capsys=capsys)
    assert (code, heard) == (
        1,
        "secondcast: no cache is given: give --cache, the folder that `secondcast build` made\n",
    )
    code, _, heard = secondcast("train", words[1], "--cache", words[3], capsys=capsys)
    assert code == 1 and heard.startswith("secondcast: no student is given: give --student, such as google-t5/t5-base")


RECIPE = """
student = "nobody"
seed = 3
replay-check = 2
[[stage]]
steps = 1
batch-size = 2
"""


@pytest.fixture
def recipe_words(tmp_path, cache_folder, dev_teacher):
    (tmp_path / "r.toml").write_text(RECIPE)
    words = ["train", tmp_path / "run", "--config", tmp_path / "r.toml"]
    return [*words, "--cache", cache_folder, "--backbone", dev_teacher]


def test_a_flag_beside_a_recipe_counts_even_where_it_is_the_default(tmp_path, recipe_words, t5_config, capsys):
    code, said, _ = secondcast(*recipe_words, "--student", t5_config, "--seed", 0, capsys=capsys)
    assert code == 0 and "trained for 1 step" in said
    settings = json.loads((tmp_path / "run" / CONFIG_FILE).read_bytes())["settings"]
    assert (settings["student"], settings["seed"], settings["replay_check"]) == (str(t5_config), 0, 2)


@pytest.mark.parametrize(("flag", "value"), [("--steps", 1000), ("--loss", "vision"), ("--pretrain-lr", 1)])
def test_what_a_stage_says_is_no_flag_beside_a_recipe(tmp_path, recipe_words, flag, value, capsys):
    code, _, heard = secondcast(*recipe_words, flag, value, capsys=capsys)
    assert code == 1 and heard == (
        f"secondcast: {flag} is given beside --config {tmp_path}/r.toml: it is an option of a stage; change the "
        f"recipe, "
        f"or leave one of them out\n"
    )


def test_places_that_a_recipe_states_are_below_the_current_directory(
    tmp_path, recipe_words, cache_folder, t5_config, monkeypatch, capsys
):
    (tmp_path / "r.toml").write_text(f'{RECIPE}[caches]\nc = "{cache_folder.name}"\n')
    monkeypatch.chdir(cache_folder.parent)
    code, said, _ = secondcast(*recipe_words[:4], *recipe_words[6:], "--student", t5_config, capsys=capsys)
    assert code == 0 and "trained for 1 step" in said
    assert list(json.loads((tmp_path / "run" / CONFIG_FILE).read_bytes())["caches"]) == ["c"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["x/a", "b=x/c"], {"a": "x/a", "b": "x/c"}),
        (["s3://bucket/some/a/", "n=s3://bucket/a=b"], {"a": "s3://bucket/some/a/", "n": "s3://bucket/a=b"}),
        (["x=1/a=2"], {"x": "1/a=2"}),
        (["./x=1/a=2"], {"a=2": "./x=1/a=2"}),
        (["there=now"], {"there=now": "there=now"}),
        (["=x"], {"=x": "=x"}),
    ],
)
def test_a_cache_is_named_as_asked_or_as_its_folder(given, named, tmp_path, monkeypatch):
    from secondcast.api.runs import named_places

    (tmp_path / "there=now").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_places(given) == named


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cache", "x/cache"], "two caches are named 'cache', {cache} and x/cache: name them, as in --cache "
         "cache-2=x/cache"),
        (["--cache", "a="], "--cache 'a=' names no place, expected [NAME=]CACHE, as in --cache a=FOLDER"),
        (["--cache", "b=nowhere"], "nowhere is not a folder"),
    ],
)  # fmt: skip
def test_caches_that_cannot_be_told_apart_or_found_are_one_line(words, cache_folder, more, message, capsys):
    code, _, heard = secondcast(*words, *more, capsys=capsys)
    assert (
        code == 1 and heard.startswith(f"secondcast: {message.format(cache=cache_folder)}") and heard.count("\n") == 1
    )


def test_neither_cache_nor_student_is_guessed(tmp_path, words, recipe_words, capsys):
    code, _, heard = secondcast(*words[:2], *words[4:], capsys=capsys)
    assert code == 1 and heard == (
        "secondcast: no cache is given: give --cache, the folder that `secondcast build` made\n"
    )
    code, _, heard = secondcast(*words[:4], *words[6:], capsys=capsys)
    assert code == 1 and heard == (
        "secondcast: no student is given: give --student, such as google-t5/t5-base or pocket-small, "
        "or for FLUX.2-klein Qwen/Qwen3-0.6B\n"
    )
