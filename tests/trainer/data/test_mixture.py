"""One student from several caches: who is mixed in a batch, who takes turns, what is held out, how a run goes on."""

import json
import re
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.storage_schemas.errors import RunError, SettingsError, TeacherError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.loop import Trainer
from tests.cache_builder.building import build_cache
from tests.commands.test_cli import secondcast
from tests.models.families.random_teacher import make_teacher
from tests.trainer.conftest import t5_config
from tests.trainer.data.mixing import mixed_trainer, run_settings, small_cache, texts_of, train_mixed
from tests.trainer.test_train import Listening, StopAfter, same_weights, weights

__all__ = ["t5_config"]


@pytest.fixture(scope="session")
def places(tmp_path_factory, dev_teacher) -> dict[str, Path]:
    """Two caches of one size, and one of another."""
    folder = tmp_path_factory.mktemp("mixed")
    return {
        "cats": small_cache(folder / "cats", dev_teacher, texts_of("cat", 9)),
        "signs": small_cache(folder / "signs", dev_teacher, texts_of("sign", 4)),
        "large": small_cache(folder / "large", dev_teacher, texts_of("dog", 5), resolution=24),
    }


def of(places: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: places[name] for name in names}


def cache_of(trainer: Trainer, position: int) -> int:
    return trainer.dataset.trajectory_of(position)[0]


def rows_of(trainer: Trainer, step: int) -> list[tuple[int, int]]:
    return [row for request in trainer.plan.requests(step) for row in request.rows]


@pytest.mark.thorough
def test_a_batch_holds_rows_of_both_caches_as_each_gives_them_alone(tmp_path, places, dev_teacher, t5_config):
    settings = run_settings({"batch_size": 12})
    both = mixed_trainer(tmp_path / "a", settings, of(places, "cats", "signs"), dev_teacher, t5_config)
    rows = rows_of(both, 0)
    assert Counter(cache_of(both, position) for position, _ in rows) == {0: 8, 1: 4}
    batch = both.dataset.replay_batch(rows)
    for number, name in enumerate(("cats", "signs")):
        alone = mixed_trainer(tmp_path / name, settings, of(places, name), dev_teacher, t5_config)
        mine = [row for row, (position, _) in enumerate(rows) if cache_of(both, position) == number]
        own = [(rows[row][0] - both.dataset.first_of(number), rows[row][1]) for row in mine]
        assert [both.dataset.name_of(rows[row][0]) for row in mine] == [alone.dataset.name_of(at) for at, _ in own]
        wanted = alone.dataset.replay_batch(own)
        for field in ("token_ids_BT", "hidden_states_BSC", "velocity_BSC", "timestep_B", "guidance_B", "step_B"):
            assert torch.equal(getattr(batch, field)[mine], getattr(wanted, field)), field


def test_caches_of_other_sizes_take_turns_on_one_transformer(tmp_path, places, dev_teacher, t5_config):
    settings = run_settings({"steps": 12, "batch_size": 4}, dropout=0.0)
    trainer = mixed_trainer(tmp_path / "run", settings, of(places, "cats", "large"), dev_teacher, t5_config)
    one, other = trainer.objective.backbones
    assert one.transformer is other.transformer
    turns = [{cache_of(trainer, position) for position, _ in rows_of(trainer, step)} for step in range(12)]
    assert all(len(caches) == 1 for caches in turns)
    # Nine trajectories beside five.
    assert abs(sum(caches == {0} for caches in turns) - Fraction(12 * 9, 14)) < 1

    for step in (turns.index({0}), turns.index({1})):
        batch = trainer.dataset.replay_batch(rows_of(trainer, step))
        student_BTD = trainer.student.eval()(batch.token_ids_BT)[0].detach()
        found = trainer.objective.training_loss(trainer.settings.at(step).stage, student_BTD, batch)
        manifest = trainer.dataset.sources[batch.source].cache.manifest
        own = Backbone.load(
            dev_teacher, recorded_geometry(manifest.sampling), text_length=manifest.teacher.text_length,
            dtype=torch.bfloat16, device=torch.device("cpu"),
        )  # fmt: skip
        predicted = own.predict(
            batch.hidden_states_BSC, student_BTD.bfloat16(), batch.conditioning, batch.timestep_B, batch.guidance_B
        )
        assert float(found) == float((predicted.float() - batch.velocity_BSC.float()).square().mean())
    shapes = [trainer.dataset.replay_batch(rows_of(trainer, turns.index({n}))).velocity_BSC.shape for n in (0, 1)]
    assert shapes == [(4, 16, 16), (4, 36, 16)]


@pytest.mark.thorough
def test_a_run_on_caches_of_two_sizes_trains_and_validates_on_both(tmp_path, places, dev_teacher, t5_config):
    settings = run_settings({"steps": 4, "loss": "embedding"}, {"steps": 4, "data_order": "sequential"})
    run = train_mixed(tmp_path / "run", settings, of(places, "cats", "large"), dev_teacher, t5_config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["kind"]) for line in lines if "kind" in line] == 4 * [("0", "embedding")] + 4 * [
        ("1", "vision")
    ]
    config = json.loads((run / "config.json").read_bytes())
    assert list(config["caches"]) == ["cats", "large"]


@pytest.mark.parametrize(("weight", "shares"), [("trajectory", {0: 9 * 2, 1: 4 * 3}), ("rows", {0: 2, 1: 3})])
def test_weights_are_of_a_trajectory_or_of_rows(tmp_path, places, dev_teacher, t5_config, weight, shares):
    caches = {"cats": 2, "signs": 3}
    settings = run_settings({"batch_size": sum(shares.values()), "weight": weight, "caches": caches})
    trainer = mixed_trainer(tmp_path / "run", settings, of(places, "cats", "signs"), dev_teacher, t5_config)
    for step in range(2):
        assert Counter(cache_of(trainer, position) for position, _ in rows_of(trainer, step)) == shares


def test_a_stage_sees_its_caches_alone_and_each_stage_in_another_order(tmp_path, places, dev_teacher, t5_config):
    stage = {"steps": 4, "batch_size": 4, "caches": {"signs": 1}}
    settings = run_settings({"steps": 13, "batch_size": 4}, stage, stage | {"name": "again"})
    trainer = mixed_trainer(tmp_path / "run", settings, of(places, "cats", "signs"), dev_teacher, t5_config)
    first = [position for step in range(13) for position, _ in rows_of(trainer, step) if position >= 9]
    second, third = (
        [position for step in range(start, start + 4) for position, _ in rows_of(trainer, step)] for start in (13, 17)
    )
    assert {cache_of(trainer, position) for position in second + third} == {1}
    assert len(first) == len(second) == len(third) == 16
    assert first != second and second != third and first != third


def test_held_out_prompts_of_all_caches_are_never_trained_on(tmp_path, places, dev_teacher, t5_config):
    trainer = mixed_trainer(tmp_path / "run", run_settings({"steps": 30}), places, dev_teacher, t5_config)
    seen = {position for step in range(30) for position, _ in rows_of(trainer, step)}
    assert seen == set(range(len(trainer.dataset))) == set(range(9 + 4 + 5))
    for dataset, held_out in ((trainer.dataset, False), (trainer.held_out, True)):
        for position in range(len(dataset)):
            source, prompt = dataset.prompt_of(position)
            assert dataset.sources[source].cache.prompts[prompt].held_out is held_out
    assert [len(source.indices) for source in trainer.held_out.sources] == [1, 1, 1]


SHARED = {"steps": 2, "batch_size": 8, "grad_accum_steps": 2, "timesteps_per_sample": 2, "embedding_loss_weight": 0.1}


@pytest.mark.slow
def test_a_resumed_run_on_several_caches_ends_with_the_same_bits(tmp_path, places, dev_teacher, t5_config):
    stages = (
        {"steps": 2, "loss": "context", "caches": {"cats": 10, "signs": 1}},
        {"steps": 4, "data_order": "sequential", "caches": {"cats": 1, "large": 1}},
        SHARED,
    )
    settings = run_settings(*stages, ema_decay=0.9, checkpoint_every=3, replay_check=4, validate_rows=4)
    train_mixed(tmp_path / "whole", settings, places, dev_teacher, t5_config)
    for stop in (4, 7):
        cut = tmp_path / f"cut-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train_mixed(cut, settings, places, dev_teacher, t5_config, StopAfter(stop))
        train_mixed(cut, settings, places, dev_teacher, t5_config)
        assert same_weights(cut, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_the_trajectories_with_which_it_began(tmp_path, places, dev_teacher, t5_config):
    texts = texts_of("car", 5)
    grown = {"cats": places["cats"], "cars": small_cache(tmp_path / "cars", dev_teacher, texts)}
    settings = run_settings({"steps": 4, "batch_size": 6}, replay_check=4, validate_rows=4)
    train_mixed(tmp_path / "whole", settings, grown, dev_teacher, t5_config)
    with pytest.raises(KeyboardInterrupt):
        train_mixed(tmp_path / "cut", settings, grown, dev_teacher, t5_config, StopAfter(3))
    more = tmp_path / "more.txt"
    more.write_text("".join(f"{text}\n" for text in [*texts, "two dogs on the left"]))
    build_cache(grown["cars"], dev_teacher, more, shard_size=4, batch_size=8, extend=True)
    assert len(Cache.open(grown["cars"])) == 7
    listening = Listening()
    train_mixed(tmp_path / "cut", settings, grown, dev_teacher, t5_config, listening)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert listening.heard[1] == (
        f"{tmp_path}/cut keeps training on the 6 trajectories it started with, of 7 that {tmp_path}/cars has now: a "
        f"new run folder uses all of them"
    )


@pytest.mark.thorough
def test_caches_of_different_teachers_are_refused_by_the_field(tmp_path, places, t5_config):
    other = make_teacher(tmp_path / "other-teacher", seed=5)
    cache = small_cache(tmp_path / "others", other, texts_of("cat", 2))
    one, two = (Cache.open(place).manifest.teacher.json_value()["weights"] for place in (places["cats"], cache))
    name = next(name for name in one if one[name] != two[name])
    with pytest.raises(TeacherError) as raised:
        train_mixed(tmp_path / "run", run_settings({}), {"cats": places["cats"], "others": cache}, other, t5_config)
    assert str(raised.value) == (
        f'caches cats and others have different teachers: weights.{name} is "{one[name]}" in {places["cats"]} and '
        f'"{two[name]}" in {cache}; a student has one teacher: train on one of the caches, or '
        "build both with the same teacher"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [{"caches": {"cat": 1}}],
            "stage 0 uses the cache 'cat', but this run has cats, signs: give --cache cat=FOLDER",
        ),
        (
            [{"caches": {"cats": 1}}, {"caches": {"cats": 2}}],
            "cache 'signs' is given, but no stage uses it: add it to a stage, or remove it",
        ),
    ],
)
def test_caches_and_stages_name_each_other(tmp_path, places, dev_teacher, t5_config, stages, message):
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        train_mixed(tmp_path / "run", run_settings(*stages), of(places, "cats", "signs"), dev_teacher, t5_config)


@pytest.mark.thorough
def test_a_cache_of_another_name_is_told_the_name_it_had(tmp_path, places, dev_teacher, t5_config):
    train_mixed(tmp_path / "run", run_settings({}), of(places, "cats", "signs"), dev_teacher, t5_config)
    moved = shutil.copytree(places["cats"], tmp_path / "moved")
    message = (
        f"{tmp_path / 'run'} was started with a cache named 'cats', found 'moved' with the same sampling: the data "
        f"order depends on the names; give --cache cats={moved}"
    )
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        again = {"moved": moved, "signs": places["signs"]}
        train_mixed(tmp_path / "run", run_settings({}), again, dev_teacher, t5_config)
    again = {"cats": moved, "signs": places["signs"]}
    train_mixed(tmp_path / "run", run_settings({}), again, dev_teacher, t5_config)


@pytest.mark.thorough
def test_caches_of_two_dtypes_are_replayed_in_the_one_that_is_named(tmp_path, places, dev_teacher, t5_config):
    exact = small_cache(tmp_path / "exact", dev_teacher, texts_of("car", 3), dtype="float32")
    both = {"cats": places["cats"], "exact": exact}
    message = (
        "cache cats was recorded in bfloat16 and exact in float32, but the transformer replays both in one dtype: give "
        "--backbone-dtype bfloat16 or float32"
    )
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        train_mixed(tmp_path / "run", run_settings({}), both, dev_teacher, t5_config)
    assert not (tmp_path / "run").exists()
    settings = run_settings({}, backbone_dtype="bfloat16", replay_check=0)
    train_mixed(tmp_path / "run", settings, both, dev_teacher, t5_config)


@pytest.mark.slow
def test_the_replay_error_is_that_of_the_caches_that_keep_embeddings(tmp_path, places, dev_teacher, t5_config):
    bare = small_cache(tmp_path / "bare", dev_teacher, texts_of("car", 3), store_embeddings=False)
    listening = Listening()
    run = train_mixed(
        tmp_path / "run", run_settings({}), {"bare": bare, "cats": places["cats"]}, dev_teacher, t5_config, listening
    )
    assert [line for line in listening.heard if line.startswith("no replay error")] == [
        f"no replay error: {bare} was built with --no-store-embeddings; a cache with --store-embeddings has one"
    ]
    alone = train_mixed(tmp_path / "alone", run_settings({}), of(places, "cats"), dev_teacher, t5_config)
    measured, wanted = (
        next(line for line in map(json.loads, (folder / "metrics.jsonl").open()) if "replay_error" in line)
        for folder in (run, alone)
    )
    assert measured == wanted


@pytest.mark.thorough
def test_walks_of_other_lengths_are_refused_before_a_step(tmp_path, places, dev_teacher, t5_config):
    short = small_cache(tmp_path / "short", dev_teacher, texts_of("car", 3), steps=3)
    settings = run_settings({"data_order": "sequential"})
    with pytest.raises(
        SettingsError,
        match="data-order is sequential on caches whose trajectories have 3 and 4 steps, expected one number",
    ):
        train_mixed(tmp_path / "run", settings, {"cats": places["cats"], "short": short}, dev_teacher, t5_config)
    train_mixed(
        tmp_path / "shuffled", run_settings({}), {"cats": places["cats"], "short": short}, dev_teacher, t5_config
    )


@pytest.mark.thorough
def test_the_order_of_the_flags_changes_nothing(tmp_path, places, dev_teacher, t5_config, capsys):
    runs = []
    for names in (("cats", "signs"), ("signs", "cats")):
        run = tmp_path / "-".join(names)
        caches = [word for name in names for word in ("--cache", places[name])]
        words = ["train", run, *caches, "--student", t5_config, "--backbone", dev_teacher, "--steps", 2]
        code, _, heard = secondcast(*words, "--batch-size", 4, "--replay-check", 1, capsys=capsys)
        assert code == 0 and "; 13 trajectories of 2 caches to train on, 2 held out" in heard
        runs.append(weights(run))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


RECIPE = """
dropout = 0.0
[[stage]]
caches = ["cats"]
steps = 2
batch-size = 2
[[stage]]
caches = {cats = 10, signs = 1}
steps = 2
batch-size = 4
"""


@pytest.mark.thorough
def test_a_recipe_trains_on_the_caches_it_names(tmp_path, places, dev_teacher, t5_config, capsys):
    (tmp_path / "r.toml").write_text(RECIPE + f'[caches]\ncats = "nowhere"\nsigns = "{places["signs"]}"\n')
    words = ["train", tmp_path / "run", "--config", tmp_path / "r.toml", "--student", t5_config]
    words += ["--backbone", dev_teacher, "--cache", f"cats={places['cats']}", "--seed", 4, "--keep-checkpoints", 1]
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and said.startswith(f"{tmp_path}/run: student trained for 4 steps\nNext:\n")
    settings = json.loads((tmp_path / "run/config.json").read_bytes())["settings"]
    assert (settings["seed"], settings["keep_checkpoints"], settings["student"]) == (4, 1, str(t5_config))


@pytest.mark.thorough
def test_the_structure_of_the_pockets_recipe_trains(tmp_path, places, dev_teacher, t5_config, capsys):
    text = (Path(__file__).resolve().parents[3] / "recipes/pocket.toml").read_text()
    text, counts = re.subn(r"(?m)^steps = \d+$", "steps = 2", text)
    text = text.replace("batch-size = 64", "batch-size = 4").replace("pretrain-steps = 10", "pretrain-steps = 1")
    (tmp_path / "r.toml").write_text(text)
    names = {"scenes": "cats", "compositions": "signs", "signs": "large"}
    caches = [word for name, place in names.items() for word in ("--cache", f"{name}={places[place]}")]
    words = ["train", tmp_path / "run", "--config", tmp_path / "r.toml", *caches, "--student", t5_config]
    code, said, _ = secondcast(*words, "--backbone", dev_teacher, "--replay-check", 1, capsys=capsys)
    assert counts == 4 and code == 0 and "trained for 8 steps" in said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines if "kind" in line]
    assert stages == [name for name in ("pretrain", "attributes", "text-rendering", "mixed") for _ in range(2)]
