"""Functions of the Python API: the settings of the commands, errors in one line, and nothing printed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import secondcast
from secondcast.storage_schemas.errors import NotACacheError, NoTrajectoriesError, RunError, SettingsError, StudentError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.settings import TrainFlags
from tests.commands.test_cli import secondcast as command

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FLAGS = {"steps": 2, "batch_size": 4, "replay_check": 4, "checkpoint_every": 1}


@pytest.fixture
def options(dev_teacher, t5_config):
    return {"student": t5_config, "backbone": dev_teacher, **FLAGS}


def squared(predicted_BSC, batch):
    return (predicted_BSC - batch.velocity_BSC.float()).square().mean()


def last_student(run):
    return secondcast.load_student(run / "checkpoint-00000002" / "student").network.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_package_names_its_exports_before_it_loads_torch():
    code = "import sys, secondcast as s; assert {'train', 'open_cache'} <= {*dir(s)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'secondcast' has no attribute 'learn'"):
        _ = secondcast.learn  # type: ignore[attr-defined]


@pytest.mark.thorough
def test_a_build_is_that_of_the_command(tmp_path, dev_teacher, prompt_file, capsys):
    shared = {"steps": 3, "resolution": 64}
    cache = secondcast.build(
        tmp_path / "one", teacher=dev_teacher, prompts=prompt_file, guidance=2, dtype="float32", **shared
    )
    assert capsys.readouterr() == ("", "")
    words = ["--prompts", prompt_file, "--guidance", 2, "--dtype", "float32", "--steps", 3, "--resolution", 64]
    assert command("build", tmp_path / "other", "--teacher", dev_teacher, *words, capsys=capsys)[0] == 0
    other = secondcast.open_cache(tmp_path / "other")
    assert cache.finished and cache.manifest == other.manifest
    assert [one.velocity_KSC.tobytes() for one in cache.trajectories] == [
        one.velocity_KSC.tobytes() for one in other.trajectories
    ]
    shared |= {"teacher": str(dev_teacher), "prompts": [str(prompt_file)], "guidance": [2.0], "dtype": "float32"}
    assert len(secondcast.build(tmp_path / "one", **shared)) == len(cache)


@pytest.mark.thorough
def test_a_run_is_that_of_the_command_and_its_student_loads(tmp_path, cache_folder, options, capsys):
    run = secondcast.train(tmp_path / "run", cache_folder, **options)
    assert capsys.readouterr() == ("", "")
    flags = [word for key, value in FLAGS.items() for word in (f"--{key.replace('_', '-')}", value)]
    words = ["--cache", cache_folder, "--student", options["student"], "--backbone", options["backbone"], *flags]
    assert command("train", tmp_path / "other", *words, capsys=capsys)[0] == 0
    assert same(last_student(tmp_path / "run"), last_student(tmp_path / "other"))
    assert (run.steps, run.is_main_process, run.run) == (2, True, tmp_path / "run")
    logged = [entry["validation_loss"] for entry in run.metrics() if "validation_loss" in entry]
    assert run.validation_loss == min(logged)
    student, cache = run.load_student("cpu"), secondcast.open_cache(cache_folder)
    first = cache.trajectories[0]
    assert student.token_ids(first.prompt)[0].tolist() == cache.padded_token_ids(0).tolist()
    assert student([first.prompt, "a"]).shape == (2, *first.embedding_TD.shape)
    assert not student(first.prompt).requires_grad


def test_progress_is_shown_where_it_is_asked_for(tmp_path, cache_folder, options, capsys):
    options |= {"steps": 0, "pretrain_steps": 1, "pretrain_loss": "embedding"}
    secondcast.train(tmp_path / "run", cache_folder, progress=True, **options)
    said, heard = capsys.readouterr()
    assert said == "" and "step 1: validation loss" in heard


@pytest.mark.thorough
def test_a_loss_that_is_the_vision_loss_trains_the_same_student(tmp_path, cache_folder, options):
    plain = secondcast.train(tmp_path / "plain", Cache.open(cache_folder), **options)
    own = secondcast.train(tmp_path / "own", {"cache": cache_folder}, loss_fn=squared, **options)
    assert same(last_student(plain.run), last_student(own.run)) and plain.validation_loss == own.validation_loss


@pytest.mark.thorough
def test_another_loss_trains_another_student_with_steps_that_share_a_text(tmp_path, cache_folder, options):
    rows = []

    def first_step_only(predicted_BSC, batch):
        rows.append((len(predicted_BSC), len(batch.token_ids_BT), predicted_BSC.dtype))
        return ((predicted_BSC - batch.velocity_BSC).abs().mean((1, 2)) * (batch.step_B == 0)).mean()

    options |= {"timesteps_per_sample": 2, "grad_accum_steps": 2}
    plain = secondcast.train(tmp_path / "plain", cache_folder, **options)
    own = secondcast.train(tmp_path / "own", cache_folder, loss_fn=first_step_only, **options)
    assert rows == [(2, 1, torch.float32)] * 4
    assert not same(last_student(plain.run), last_student(own.run))


@pytest.mark.thorough
def test_a_run_is_resumed_with_the_loss_of_its_name_only(tmp_path, cache_folder, options):
    run = tmp_path / "run"
    secondcast.train(run, cache_folder, loss_fn=squared, **options)
    assert secondcast.train(run, cache_folder, loss_fn=squared, **options).steps == 2
    message = rf"{run} was started with loss-fn = {__name__}\.squared, not None: the weights depend on it"
    with pytest.raises(RunError, match=message):
        secondcast.train(run, cache_folder, **options)
    with pytest.raises(RunError, match=rf"loss-fn = {__name__}\.squared, not torch\.nn\.modules\.loss\.MSELoss"):
        secondcast.train(run, cache_folder, loss_fn=torch.nn.MSELoss(), **options)


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda predicted, batch: (predicted - batch.velocity_BSC).square().mean((1, 2)), r"a tensor of shape \[4\]"),
        (lambda predicted, batch: 0.5, "float"),
        (lambda predicted, batch: predicted.detach().mean(), r"a tensor of shape \[\] without a gradient"),
    ],
)
def test_what_is_no_loss_is_refused(tmp_path, cache_folder, options, loss_fn, found):
    with pytest.raises(SettingsError, match=rf"<lambda> returned {found}, expected a tensor of one number"):
        secondcast.train(tmp_path / "run", cache_folder, loss_fn=loss_fn, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3}, r"train\(\) has no option 'step' \(its value is 3\): did you mean steps\?"),
        ({"colour": "red"}, r"train\(\) has no option 'colour' \(its value is 'red'\): see docs/options.md"),
        ({"steps": -1}, "--steps is -1, expected at least 0"),
        ({"learning_rate": "fast"}, "--learning-rate is 'fast', expected a number"),
        ({"student": None}, "no student is given: give --student"),
        ({"sample_every": 0}, "--sample-every is 0, expected at least 1 step"),
        ({"sample_ids": "3"}, "--sample-ids is 3 without --sample-every"),
        ({"report_to": "tensorbord"}, "tensorbord"),
        ({"local_cache_dir": "copies", "local_cache_gib": 0}, "--local-cache-gib is 0, expected a number of GiB"),
        ({"loss_fn": squared, "huber_delta": 0.5}, rf"huber_delta is 0.5 with loss_fn {__name__}\.squared"),
        ({"loss_fn": squared, "loss": "embedding"}, "but no stage has the vision loss"),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_line(tmp_path, monkeypatch, cache_folder, options, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message) as caught:
        secondcast.train(tmp_path / "run", cache_folder, **options | changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_wrong_option_of_a_build_is_found_before_the_teacher_is_read(tmp_path):
    with pytest.raises(SettingsError, match=r"build\(\) has no option 'guidance_scale' .*: did you mean guidance\?"):
        secondcast.build(tmp_path / "cache", teacher="nowhere", prompts="p.txt", guidance_scale=3.5)
    with pytest.raises(SettingsError, match="--worker 0/2 and --workers cannot be combined"):
        secondcast.build(tmp_path / "cache", teacher="nowhere", prompts="p.txt", worker="0/2", workers=2)


def test_no_cache_and_no_student_are_named(tmp_path, options):
    with pytest.raises(SettingsError, match="no cache is given"):
        secondcast.train(tmp_path / "run", **options)
    with pytest.raises(StudentError, match=f"no student {tmp_path / 'run'}: there is no such folder"):
        secondcast.load_student(tmp_path / "run")
    (tmp_path / "cache").mkdir()
    with pytest.raises(secondcast.SecondcastError, match=r"has no manifest.json: it is not a cache"):
        secondcast.open_cache(tmp_path / "cache")


@pytest.mark.thorough
def test_a_recipe_states_the_stages_of_a_run(tmp_path, cache_folder, options):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'student = "{options["student"]}"\n[[stage]]\nname = "all"\nsteps = 1\nbatch-size = 4\n')
    run = secondcast.train(tmp_path / "run", cache_folder, config=recipe, backbone=options["backbone"], replay_check=4)
    assert run.steps == 1
    with pytest.raises(SettingsError, match="--steps is given beside --config"):
        secondcast.train(tmp_path / "other", cache_folder, config=recipe, steps=3)
    recipe.write_text('loss-fn = "mine"\n' + recipe.read_text())
    with pytest.raises(SettingsError, match="unknown key 'loss-fn'"):
        secondcast.train(tmp_path / "other", cache_folder, config=recipe)


@pytest.mark.parametrize("head", ["", '[build.a]\nteacher = "pocket"\n[train]\n'])
def test_options_of_the_command_in_a_recipe_are_named_with_the_call_that_has_them(tmp_path, head):
    recipe = tmp_path / "r.toml"
    table = "train.stage" if head else "stage"
    run = f'student = "pocket-tiny"\nquiet = true\n[[{table}]]\nsteps = 1\nbatch-size = 4\n'
    recipe.write_text(f'{head}report-to = ["wandb"]\nmax-gpu-memory = "11GiB"\n{run}')
    with pytest.raises(SettingsError) as raised:
        secondcast.train(tmp_path / "run", config=recipe)
    assert str(raised.value) == (
        f"{recipe} has report-to and max-gpu-memory, which only the command reads from a recipe, expected keys of the "
        "run: remove them and call secondcast.train(..., report_to=['wandb'], max_gpu_memory='11GiB')"
    )
    recipe.write_text(f'{head}device = "cpu"\n{run}')
    with pytest.raises(
        SettingsError, match=r"has device, .*: remove it and call secondcast\.train\(\.\.\., device='cpu'\)"
    ):
        secondcast.train(tmp_path / "run", config=recipe)
    recipe.write_text(f"{head}{run}")
    with pytest.raises(SettingsError, match="no cache is given"):
        secondcast.train(tmp_path / "run", config=recipe)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda recipe: recipe.stem)
def test_every_recipe_is_one_of_the_api(tmp_path, recipe):
    budget = {"time_budget": "1h"} if "budget-share" in recipe.read_text() else {}
    name = next(iter(tomllib.loads(recipe.read_text())["train"]["caches"]))
    # The recipe is valid: only its caches are missing.
    with pytest.raises(NotACacheError, match=f"{name}"):
        secondcast.train(tmp_path / "run", config=recipe, **budget)


def test_settings_without_a_loss_of_the_user_do_not_name_it():
    assert "loss_fn" not in TrainFlags.from_flags(student="s").settings().json_value()


@pytest.mark.thorough
def test_film_strips_need_trajectories(tmp_path, dev_teacher, prompt_file):
    cache = secondcast.build(tmp_path / "text", teacher=dev_teacher, prompts=prompt_file, text_only=True)
    assert cache.embedding(1).shape == (cache.manifest.teacher.text_length, cache.manifest.teacher.text_width)
    with pytest.raises(NoTrajectoriesError, match=r"film_strips needs trajectories, but .*text is a text cache"):
        secondcast.film_strips(cache, [0])
    with pytest.raises(NoTrajectoriesError, match=r"Cache\.trajectories needs trajectories"):
        _ = cache.trajectories
