"""`~` in every argument, option and file that names a place."""

import inspect
import pwd
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast import cli
from secondcast.commands.shell.places import PLACES
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.home import expand_home
from secondcast.trainer.recipe import read_recipe
from tests.commands.test_cli import secondcast
from tests.storage_schemas.caches import write_cache

# Parameters that are texts and name no place.
TEXTS = {
    "attention_backend", "build_gpu", "train_gpu", "device", "format", "gpu", "grep", "guidance", "key", "keys",
    "report_to", "metrics", "names", "prompt", "push", "ray", "resolution", "revision", "max_gpu_memory", "num_prompts",
    "num_strips", "ranks", "sample_ids", "size", "time_budget", "timesteps", "worker",
}  # fmt: skip


def functions(app) -> list[Any]:
    below = [one for group in app.registered_groups for one in functions(group.typer_instance)]
    return [command.callback for command in app.registered_commands] + below


def kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation."""
    origin, words = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kinds(words[0])
    if origin in (Union, types.UnionType, list):
        return {kind for word in words for kind in kinds(word)}
    return {annotation}


def test_every_path_and_text_of_a_command_is_a_place_or_known_to_be_none():
    found = {Path: set(), str: set()}
    for function in functions(cli.app):
        hints = get_type_hints(function, include_extras=True)
        for name in inspect.signature(function).parameters:
            for kind in kinds(hints[name]) & {Path, str}:
                found[kind].add(name)
    assert len(functions(cli.app)) > 20
    assert found[Path] <= PLACES and found[str] <= PLACES | TEXTS
    assert not PLACES & TEXTS and found[Path] | found[str] == PLACES | TEXTS


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_home_is_expanded_in_arguments_options_names_and_settings(home, tmp_path, capsys):
    write_cache(home / "cache")
    code, said, _ = secondcast("inspect", "summary", "~/cache", capsys=capsys)
    assert code == 0 and str(home / "cache") in said
    assert secondcast("prompts", "pocket", "~/p.txt", "--num-prompts", 3, capsys=capsys)[0] == 0
    code, said, _ = secondcast("prompts", "list", "~/p.txt:limit=2", capsys=capsys)
    assert code == 0 and said.count("\n") == 2
    code, _, heard = secondcast("train", "r", "--cache", "a=~/nix", "--student", "pocket-tiny", capsys=capsys)
    assert code == 1 and f"{home}/nix is not a folder" in heard
    (home / "g.toml").write_text('teacher = "pocket"\nprompts = ["~/p.txt"]\nout = "~/g2"\nsteps = 1\nlimit = 1\n')
    code, said, heard = secondcast("generate", "teacher", "--config", "~/g.toml", "-q", capsys=capsys)
    assert code == 0 and (home / "g2/index.jsonl").is_file(), heard
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_home_is_expanded_in_recipes(home):
    (home / "r.toml").write_text(
        'student = "~/t5"\n[caches]\nsigns = "~/signs"\n[[stage]]\nname = "a"\nsteps = 1\nloss = "embedding"\n'
    )
    found = read_recipe(home / "r.toml")
    assert (found.settings.student, found.caches) == (f"{home}/t5", {"signs": f"{home}/signs"})


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "summary", "~nouser/x"],
        ["build", "~nouser/x", "--teacher", "pocket", "--prompts", "p.txt"],
        ["build", "c", "--teacher", "pocket", "--prompts", "hf:~nouser/x"],
        ["train", "r", "--cache", "name=~nouser/x", "--student", "pocket-tiny"],
        ["train", "r", "--config", "~nouser/x"],
        ["export", "~nouser/x", "out"],
        ["plan", "build", "--teacher", "pocket", "--num-prompts", 1, "--disk", "~nouser/x"],
        ["evaluate", "images", "~nouser/x"],
        ["evaluate", "score", "r", "--pocket", "--config", "~nouser/x"],
        ["prompts", "pocket", "~nouser/x"],
        ["demo", "~nouser/x"],
        ["merge", "a", "~nouser/x"],
    ],
)
def test_the_home_of_an_unknown_user_is_one_line(home, words, capsys):
    code, said, heard = secondcast(*words, capsys=capsys)
    before = {"build": "hf:", "train": "name="}.get(words[0], "") if any("~" in str(w)[1:] for w in words) else ""
    assert (code, said) == (1, "") and heard == (
        f"secondcast: '{before}~nouser/x' has ~nouser, and there is no user 'nouser' on this machine: give the full "
        f"path, or put ./ before a name that has a ~\n"
    )
    assert not list(home.parent.glob("~*"))


@given(st.text())
def test_only_a_tilde_at_the_beginning_of_a_path_is_expanded(text):
    try:
        found = expand_home(text)
    except SettingsError as error:
        assert "~" in text and "\n" not in str(error).replace(text, "")
        return
    assert found == text or "~" in text


@pytest.mark.parametrize("text", ["a~", "a/~", "a/b=~/c", "./~", "s3://bucket/~", "a photo of ~", "x:~", "hf:a/~b"])
def test_a_tilde_elsewhere_is_a_letter(text):
    assert expand_home(text) == text


def test_the_home_of_a_user_is_that_of_the_system():
    root = pwd.getpwuid(0)
    assert expand_home(f"~{root.pw_name}/x") == f"{root.pw_dir}/x"
