"""A recipe is a run as a TOML file: what is wrong with it is one line that names file, stage and key."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.recipe import read_recipe
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))

RUN = 'student = "s"\n'
STAGE = "[[stage]]\nsteps = 5\n"


@pytest.fixture
def write(tmp_path):
    def written(text: str) -> Path:
        (tmp_path / "r.toml").write_text(text)
        return tmp_path / "r.toml"

    return written


def test_what_is_not_stated_is_the_papers(write):
    settings = read_recipe(write(RUN + STAGE)).settings
    assert settings == TrainSettings(student="s", stages=(Stage(name="1", steps=5),))
    assert (settings.dropout, settings.weight_decay, settings.stages[0].learning_rate) == (0.1, 1e-3, 1e-4)


def test_caches_of_a_stage_are_names_or_names_with_weights(write):
    text = RUN + '[[stage]]\nsteps = 1\ncaches = ["a", "b"]\n[[stage]]\nsteps = 1\ncaches = {a = 10, b = 1}\n'
    first, second = read_recipe(write(text)).settings.stages
    assert (first.caches, second.caches) == ({"a": 1.0, "b": 1.0}, {"a": 10.0, "b": 1.0})


def test_a_recipe_can_say_where_its_caches_lie(write):
    assert read_recipe(write(RUN + STAGE + '[caches]\na = "x/a"\nb = "s3://b/b"\n')).caches == {
        "a": "x/a",
        "b": "s3://b/b",
    }


def test_a_budget_is_a_time(write):
    text = RUN + 'time-budget = "3d"\n[[stage]]\nbudget-share = 0.5\n'
    assert read_recipe(write(text)).settings.time_budget_seconds == 259_200
    assert read_recipe(write(text), time_budget_seconds=60.0).settings.time_budget_seconds == 60


def test_what_is_given_beside_a_recipe_goes_before_it(write):
    found = read_recipe(write('student = "s"\nseed = 3\n' + STAGE), student="t", seed=0).settings
    assert (found.student, found.seed) == ("t", 0)


WRONG = [
    ("x = [", r"cannot be read as TOML \(.*\): expected a recipe, see those in recipes/"),
    (STAGE, "names no student: give --student, or a line such as student = 'google-t5/t5-base'"),
    (RUN, r"has no stage, expected at least one \[\[stage\]\], see the recipes in recipes/"),
    (RUN + "stage = 3", r"has stage = 3, expected a \[\[stage\]\] for each stage"),
    (RUN + "stage = [3]", r"has stage = \[3\], expected a \[\[stage\]\] for each stage"),
    (RUN + "stages = []\n" + STAGE, "has the unknown key 'stages', expected one of activation-checkpointing, .*"),
    (RUN + "budget-seconds = 5\n" + STAGE, "has the unknown key 'budget-seconds', expected one of .*budget, .*"),
    (RUN + "droput = 0.1\n" + STAGE, "has the unknown key 'droput', expected one of .*, dropout, .*, stage, .*"),
    (RUN + "batch-size = 8\n" + STAGE, "has the unknown key 'batch-size', expected one of .*"),
    (RUN + "weight-decay = 1\nweight_decay = 2\n" + STAGE,
     "has weight-decay twice, with - and with _: remove one of them"),
    (RUN + "keep-checkpoints = true\n" + STAGE, r": keep-checkpoints is True, expected an integer"),
    (RUN + 'dropout = "0.1"\n' + STAGE, r": dropout is '0.1', expected a number"),
    (RUN + "dropout = 1.0\n" + STAGE, r": dropout is 1.0, expected less than 1"),
    (RUN + "init = 3\n" + STAGE, r": init is 3, expected 'auto', 'pretrained' or 'random'"),
    ("student = 3\n" + STAGE, r": student is 3, expected text"),
    (RUN + "caches = 3\n" + STAGE, r'has caches = 3, expected lines such as signs = "signs-cache" under \[caches\]'),
    (RUN + STAGE + "[caches]\na = 3\n", r"has caches = \{'a': 3\}, expected lines such as .*"),
    (RUN + "time-budget = 72\n" + STAGE, r": time-budget is 72, expected a time such as '72h', '90m' or '3d'"),
    (RUN + "time-budget = '72'\n" + STAGE, r": time-budget is '72', expected a time such as 72h, 90m or 3d"),
    (RUN + STAGE + "lr = 1\n", ", stage 1 has the unknown key 'lr', expected one of batch-size, .*"),
    (RUN + STAGE + "student = 's'\n", ", stage 1 has the unknown key 'student', expected one of .*"),
    (RUN + STAGE + "budget-share = 0.5\n",
     ", stage 1: both steps and budget-share are given, expected one of them"),
    (RUN + "[[stage]]\nname = 'a'\n",
     ", stage a: stage a has neither steps nor budget-share, expected one of them"),
    (RUN + "[[stage]]\nsteps = '5'\n", r", stage 1: steps is '5', expected an integer"),
    (RUN + "[[stage]]\nsteps = 0\n", r", stage 1: steps is 0, expected at least 1"),
    (RUN + "[[stage]]\nname = 7\nsteps = 1\n", r", stage 7: name is 7, expected text"),
    (RUN + STAGE + "loss = 'naive'\n",
     r", stage 1: loss is 'naive', expected 'vision', 'depth', 'embedding' or 'context'"),
    (RUN + STAGE + "caches = 'a'\n", r", stage 1: caches is 'a', expected a table of names and values"),
    (RUN + STAGE + "caches = []\n", r", stage 1: caches: Dictionary should have at least 1 item .*"),
    (RUN + STAGE + "caches = [['a']]\n", r", stage 1 has caches = \[\['a'\]\], expected names, each once, or .*"),
    (RUN + STAGE + "caches = ['a', 'a']\n", r", stage 1 has caches = \['a', 'a'\], expected names, each once, or .*"),
    (RUN + STAGE + "caches = {a = 0}\n",
     ", stage 1: cache a has the weight 0, expected more than 0; remove it"),
    (RUN + STAGE + "batch-size = 6\ngrad-accum-steps = 4\n",
     r", stage 1: batch-size is 6, expected a multiple of grad-accum-steps x timesteps-per-sample = 4 x 1: .*; use 4"),
    (RUN + 2 * (STAGE + "name = 'a'\n"), ": two stages are named 'a', expected unique names"),
    (RUN + "[[stage]]\nbudget-share = 0.5\n",
     ": stage 1 has a budget-share, but no time budget is given: give --time-budget, such as 72h"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_with_a_recipe_is_one_line(write, text, message):
    file = write(text)
    with pytest.raises(SettingsError) as raised:
        read_recipe(file)
    said = str(raised.value)
    sign = "" if message[0] in ":," else " "
    assert re.fullmatch(f"{re.escape(str(file))}{sign}{message}", said), said


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path):
    with pytest.raises(SettingsError, match=r"^no recipe .*nix\.toml: expected a recipe, see those in recipes/$"):
        read_recipe(tmp_path / "nix.toml")
    (tmp_path / "b.toml").write_bytes(b"student = '\xff'")
    with pytest.raises(
        SettingsError, match=r"b\.toml cannot be read as TOML \(byte 11 is not UTF-8\): save it as UTF-8"
    ):
        read_recipe(tmp_path / "b.toml")


def test_a_byte_order_mark_before_a_recipe_means_nothing(tmp_path):
    (tmp_path / "plain.toml").write_bytes((RUN + STAGE).encode())
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf" + (RUN + STAGE).encode())
    assert read_recipe(tmp_path / "marked.toml") == read_recipe(tmp_path / "plain.toml")


def toml_of(settings: TrainSettings) -> str:
    """A recipe with every key of a run."""
    run = settings.json_value()
    stages, seconds = run.pop("stages"), run.pop("time_budget_seconds")
    lines = _lines(run) + ([] if seconds is None else [f'time-budget = "{seconds:g}s"'])
    for stage in stages:
        lines += ["[[stage]]", *_lines(stage)]
    return "\n".join(lines)


def _lines(values: dict[str, Any]) -> list[str]:
    return [f"{key.replace('_', '-')} = {_value(value)}" for key, value in values.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    return str(value).lower() if isinstance(value, bool) else repr(value)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
PARTS = st.floats(1e-9, 1e9)


@st.composite
def stages(draw: st.DrawFn, name: str) -> Stage:
    vision = draw(st.booleans())
    grad_accum_steps, share = draw(st.integers(1, 4)), draw(st.integers(1, 4)) if vision else 1
    length = draw(st.sampled_from([{"steps": 7}, {"budget_share": 0.25}]))
    return Stage(
        name=name,
        **length,
        caches=draw(st.none() | st.dictionaries(NAMES, PARTS, min_size=1, max_size=3)),
        weight=draw(st.sampled_from(["trajectory", "rows"])),
        loss="vision" if vision else draw(st.sampled_from(["embedding", "context"])),
        huber_delta=draw(st.none() | PARTS),
        timestep_weighting=draw(st.sampled_from(["uniform", "sigma", "interval"])) if vision else "uniform",
        embedding_loss_weight=draw(PARTS) if vision else 0.0,
        batch_size=grad_accum_steps * share * draw(st.integers(1, 9)),
        grad_accum_steps=grad_accum_steps,
        timesteps_per_sample=share,
        data_order=draw(st.sampled_from(["shuffled", "sequential"])) if share == 1 else "shuffled",
        learning_rate=draw(PARTS),
        lr_schedule=draw(st.sampled_from(["constant", "cosine", "linear"])),
        lr_warmup_steps=draw(st.none() | st.integers(0, 9)),
    )


@st.composite
def runs(draw: st.DrawFn) -> TrainSettings:
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    made = tuple(draw(stages(name)) for name in names)
    shared = any(stage.budget_share is not None for stage in made)
    return TrainSettings(
        # A home folder is expanded when it is read.
        student=draw(NAMES.filter(lambda name: not name.startswith("~"))),
        stages=made,
        time_budget_seconds=draw(st.integers(1, 10**5)) if shared else None,
        dropout=draw(st.floats(0, 0.99)),
        ema_decay=draw(st.none() | st.floats(0.01, 0.99)),
        seed=draw(st.integers(0, 2**63 - 1)),
        student_dtype=draw(st.sampled_from(["auto", "float32", "bfloat16-autocast"])),
        replay_check=draw(st.integers(0, 100)),
        compile=draw(st.booleans()),
    )


@pytest.mark.thorough
@given(settings=runs())
def test_a_run_that_is_written_as_a_recipe_reads_back_equal(tmp_path_factory, settings):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(toml_of(settings), encoding="utf-8")
    assert read_recipe(file).settings == settings


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_the_recipes_that_come_along_are_recipes(file):
    budget = {"time_budget_seconds": 3600.0} if "budget-share" in file.read_text() else {}
    assert read_recipe(file, **budget).settings.stages


# The recipe says why it is an exception.
WITHOUT_VISION = "ablation-naive.toml"


@pytest.mark.parametrize("file", [f for f in RECIPES if "FLUX.1-" in f.read_text()], ids=lambda file: file.name)
def test_every_recipe_of_flux_but_the_naive_ablation_ends_with_a_vision_stage(file):
    budget = {"time_budget_seconds": 3600.0} if "budget-share" in file.read_text() else {}
    last = read_recipe(file, **budget).settings.stages[-1]
    assert (last.loss, last.replays) == (("embedding", False) if file.name == WITHOUT_VISION else ("vision", True))


def test_the_recipes_of_the_ablation_differ_in_data_and_loss_alone():
    found = {file.stem: read_recipe(file) for file in RECIPES if file.stem.startswith("ablation-")}
    assert set(found) == {f"ablation-{name}" for name in ("commontext", "compbench", "laion", "naive", "vision")}
    assert len(found["ablation-vision"].caches) == 3
    assert found["ablation-naive"].caches == found["ablation-vision"].caches
    stages = [stage for recipe in found.values() for stage in recipe.settings.stages]
    varied = {"name", "caches", "loss", "data_order"}
    assert len({stage.model_dump_json(exclude=varied) for stage in stages}) == 1
    assert len({recipe.settings.model_dump_json(exclude={"stages"}) for recipe in found.values()}) == 1


def test_the_papers_recipe_has_the_papers_numbers():
    file = next(file for file in RECIPES if file.name == "paper.toml")
    settings = read_recipe(file).settings
    assert (settings.student, settings.init) == ("google-t5/t5-base", "random")
    assert (settings.dropout, settings.weight_decay, settings.max_grad_norm) == (0.1, 1e-3, 1.0)
    assert [stage.steps for stage in settings.stages] == [50_000, 70_000, 200_000] and settings.total_steps == 320_000
    assert [set(stage.caches or ()) for stage in settings.stages[:2]] == [{"compbench"}, {"commontext"}]
    assert settings.stages[2].caches == {"compbench": 10, "commontext": 1, "laion": 1}
    for stage in settings.stages:
        assert (stage.batch_size, stage.data_order, stage.learning_rate, stage.lr_schedule) == (
            32,
            "sequential",
            1e-4,
            "constant",
        )
        assert (stage.loss, stage.weight, stage.grad_accum_steps) == ("vision", "trajectory", 1)
