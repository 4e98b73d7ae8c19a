"""`--config FILE`: options of one command, or a recipe for builds and a run."""

import json

import pytest

from tests.commands.test_cli import secondcast

RECIPE = """
[build.cats]
teacher = "pocket"
prompts = ["p.txt"]
dtype = "float32"
steps = 2
threads = 1
resolution = 48

[build.dogs]
teacher = "pocket"
prompts = ["p.txt"]
limit = 1
dtype = "float32"
steps = 2

[train]
student = "pocket-tiny"
replay-check = 0
quiet = true

[train.caches]
here = "cats"

[[train.stage]]
name = "one"
loss = "embedding"
steps = 2
batch-size = 2
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def test_a_recipe_builds_its_caches_and_trains_on_them(here, capsys):
    code, said, heard = secondcast("build", "cats", "--config", "r.toml:cats", "--resolution", 32, "-q", capsys=capsys)
    assert (code, heard) == (0, "") and said.startswith("cats: 2 trajectories of 2 prompts")
    manifest = json.loads((here / "cats/manifest.json").read_bytes())
    assert (manifest["sampling"]["height"], manifest["sampling"]["steps"]) == (32, 2), (
        "the command line precedes the file"
    )
    code, said, heard = secondcast("train", "run", "--config", "r.toml", "--device", "cpu", capsys=capsys)
    assert (code, said, heard) == (0, "run: student trained for 2 steps\n", "")


@pytest.mark.thorough
def test_a_plan_takes_the_same_file_and_leaves_out_what_is_of_the_command_alone(capsys):
    facts = json.loads(secondcast("plan", "build", "--config", "r.toml:dogs", "--json", capsys=capsys)[1])
    assert (facts["cache"]["prompts"], facts["cache"]["steps"]) == (1, 2)
    facts = json.loads(secondcast("plan", "recipe", "r.toml", "--json", capsys=capsys)[1])
    assert {name: build["cache"]["prompts"] for name, build in facts["build"].items()} == {"cats": 2, "dogs": 1}
    assert [stage["name"] for stage in facts["train"]["ways"]["as_asked"]["stages"]] == ["one"]
    counts = ["--num-prompts", 7, "--num-prompts", "dogs=9"]
    facts = json.loads(secondcast("plan", "recipe", "r.toml", *counts, "--json", capsys=capsys)[1])
    assert {name: build["cache"]["prompts"] for name, build in facts["build"].items()} == {"cats": 7, "dogs": 1}
    code, said, _ = secondcast("plan", "recipe", "r.toml", capsys=capsys)
    assert code == 0 and said.startswith("not checked: ") and "\nbuild cats\n" in said and "\ntrain\n" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "c", "--config", "r.toml"], "r.toml has the builds cats, dogs: select one, as in --config r"),
        (["build", "c", "--config", "r.toml:birds"], "r.toml has the builds cats, dogs: select one, as in --con"),
        (["train", "r", "--config", "r.toml:cats"], "--config r.toml:cats names a build, but this command is "),
        (["generate", "s", "--config", "r.toml"], "r.toml has no [generate]: it has [build], [train]"),
        (["build", "c", "--config", "flat.toml:x"], "--config flat.toml:x names 'x', but flat.toml has no [build.NAM"),
        (["build", "c", "--config", "mixed.toml"], "mixed.toml has 'seed' beside its tables: expected only [build.NA"),
        (["build", "c", "--config", "bare.toml"], "bare.toml has a [build] without a name: expected [build.NAME] f"),
        (["build", "c", "--config", "flag.toml"], "flag.toml has build = 3, expected a table; the tables"),
        (["build", "c", "--config", "nix.toml"], "no file nix.toml for --config: expected lines such as batch-siz"),
        (["train", "r", "--config", "r.toml", "--loss", "vision"], "--loss is given beside --config r.toml: it is"),
        (["plan", "recipe", "flat.toml"], "flat.toml lacks a [build.NAME] or [train]: expected both; plan"),
        (["plan", "recipe", "r.toml", "--num-prompts", "birds=3"], "--num-prompts is 'birds=3', expected a number of"),
        (["plan", "recipe", "poor.toml"], "[build.a] of poor.toml has no teacher, expected a line"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(words, message, here, capsys):
    (here / "flat.toml").write_text("seed = 3\n")
    (here / "mixed.toml").write_text("seed = 3\n[build.a]\nseed = 4\n")
    (here / "bare.toml").write_text("[build]\nseed = 4\n")
    (here / "flag.toml").write_text('build = 3\n[train]\nstudent = "x"\n')
    (here / "poor.toml").write_text('[build.a]\nseed = 4\n[train]\nstudent = "x"\n')
    if words[0] == "generate":
        words = [*words, "--teacher", "pocket", "--prompts", "p.txt", "--out", "o"]
    code, said, heard = secondcast(*words, capsys=capsys)
    assert (code, said) == (1, "") and heard.startswith(f"secondcast: {message}") and heard.count("\n") == 1


def test_the_stage_of_a_build_in_a_file_hides_no_other_key(here, capsys):
    (here / "b.toml").write_text('stage = "text"\nseed = 7\nsteps = 2\n')
    words = ["build", "c", "--teacher", "pocket", "--prompts", "p.txt", "--config", "b.toml", "-q"]
    assert secondcast(*words, capsys=capsys)[0] == 0
    assert json.loads((here / "c/manifest.json").read_bytes())["sampling"]["seed"] == 7
    assert not list((here / "c/commits").glob("trajectories-*"))


@pytest.mark.thorough
def test_the_run_of_a_recipe_is_planned_with_the_caches_that_its_builds_make(here, capsys):
    vision = RECIPE.replace('loss = "embedding"', 'loss = "vision"')
    flops = []
    for side in (48, 96):
        (here / "r.toml").write_text(vision.replace("resolution = 48", f"height = {side}\nwidth = {side}"))
        facts = json.loads(secondcast("plan", "recipe", "r.toml", "--json", capsys=capsys)[1])
        flops.append(facts["train"]["ways"]["as_asked"]["stages"][0]["flop_per_step"])
    assert flops[1] > 2 * flops[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("limit = 1", "limti = 1"),
            "[build.dogs] of r.toml has the unknown key 'limti', expected one of attention-back",
        ),
        (
            ('"pocket"\nprompts = ["p.txt"]\nlimit', '"a"\nprompts = []\nlimit'),
            "the tables of r.toml have the teachers pocket and a, expected one",
        ),
    ],
)
def test_builds_that_are_none_of_one_run_are_not_planned(change, message, here, capsys):
    assert change[0] in RECIPE
    (here / "r.toml").write_text(RECIPE.replace(*change))
    code, said, heard = secondcast("plan", "recipe", "r.toml", capsys=capsys)
    assert (code, said) == (1, "") and heard.startswith(f"secondcast: {message}")


INITIAL = """
[init-student]
teacher = "pocket"
prompts = ["many.txt"]
size = "2x48"
kind = "cut"
batch-size = 8
"""


@pytest.fixture
def with_initial(here, capsys):
    """A recipe whose run starts from its initial student."""
    assert secondcast("prompts", "pocket", "many.txt", "--num-prompts", 20, capsys=capsys)[0] == 0
    text = RECIPE.replace("pocket-tiny", "first").replace("[build.dogs]", INITIAL + "\n[build.dogs]")
    (here / "r.toml").write_text(text)
    return here


@pytest.mark.thorough
def test_a_recipe_makes_the_student_that_its_run_starts_from(with_initial, capsys):
    words = ["init-student", "first", "--config", "r.toml", "-q", "--limit", 12]
    code, said, heard = secondcast(*words, capsys=capsys)
    assert (code, heard) == (0, "") and said.endswith("first: cut; give it to train --student\n")
    record = json.loads((with_initial / "first/initial.json").read_bytes())
    assert (record["asked"]["size"], record["asked"]["batch_size"]) == ("2x48", 8)
    code, _, heard = secondcast(*words, "--size", "2x64", capsys=capsys)
    assert code == 1 and "made with size = 2x48, not 2x64" in heard, "the command line precedes the file"
    assert secondcast("build", "cats", "--config", "r.toml:cats", "-q", capsys=capsys)[0] == 0
    assert secondcast("train", "run", "--config", "r.toml", "--device", "cpu", capsys=capsys)[0] == 0

    planned = json.loads(secondcast("plan", "recipe", "r.toml", "--json", capsys=capsys)[1])
    (made,) = record["made"]
    assert planned["init_student"] == {
        "kind": "cut", "size": "2x48", "parameters": made["parameters"], "bytes": made["bytes"]
    }  # fmt: skip
    assert planned["train"]["student"] == {"source": "first", "parameters": made["parameters"]}


@pytest.mark.thorough
def test_the_plan_of_a_recipe_names_the_size_of_its_initial_student(with_initial, capsys):
    code, said, _ = secondcast("plan", "recipe", "r.toml", capsys=capsys)
    assert code == 0 and "\ninit-student\n" in said and "2x48 (cut), " in said
    assert " in fp32 (calculated)" in " ".join(said.split())
    recipe = (with_initial / "r.toml").read_text()
    counts = {}
    for kind, size in (("cut", "pocket-small"), ("auto", "pocket-small"), ("shallow", "2x48"), ("pretrained", "2x48")):
        text = recipe.replace('size = "2x48"', f'size = "{size}"').replace('"cut"', f'"{kind}"\nfrom = "small"')
        (with_initial / "r.toml").write_text(text.replace('from = "small"', 'from = "google/t5-v1_1-small"'))
        facts = json.loads(secondcast("plan", "recipe", "r.toml", "--json", capsys=capsys)[1])
        counts[kind] = facts["init_student"]["parameters"]
    # Those of the first two and of two layers at full width are measured in docs/training.md.
    assert (counts["cut"], counts["auto"], counts["shallow"]) == (199_872, 199_872, 1_127_040)
    assert counts["pretrained"] > 30_000_000


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (("\nsize =", "\nsise ="), ["init-student", "o"], "r.toml has the unknown key 'sise', expected one of batch-"),
        (
            ("\nsize =", "\nsise ="),
            ["plan", "recipe", "r.toml"],
            "[init-student] of r.toml has the unknown key 'sise', exp",
        ),
        (
            ('size = "2x48"', ""),
            ["plan", "recipe", "r.toml"],
            "[init-student] of r.toml has no size, expected lines su",
        ),
        (('"2x48"', '"x"\ntext-length = 0'), ["plan", "recipe", "r.toml"], "--text-length is 0"),
        (("", ""), ["init-student", "o", "--config", "r.toml:cats"], "--config r.toml:cats names a build, but this co"),
        (
            ("[init-student]", "[build.a]"),
            ["init-student", "o"],
            "r.toml has no [init-student]: it has [build], [train]",
        ),
    ],
)
def test_what_is_wrong_with_an_initial_student_of_a_recipe_is_one_line(change, words, message, with_initial, capsys):
    assert change[0] in INITIAL
    (with_initial / "r.toml").write_text((with_initial / "r.toml").read_text().replace(*change))
    if words[0] == "init-student" and "--config" not in words:
        words = [*words, "--config", "r.toml"]
    code, said, heard = secondcast(*words, capsys=capsys)
    assert (code, said) == (1, "") and heard.startswith(f"secondcast: {message}") and heard.count("\n") == 1, heard


def test_a_key_is_the_name_of_its_flag(here, capsys):
    (here / "i.toml").write_text('kind = "cut"\nfrom = "x"\nsize = "2x48"\n')
    words = ["init-student", "o", "--teacher", "pocket", "--prompts", "p.txt", "--config", "i.toml"]
    code, _, heard = secondcast(*words, capsys=capsys)
    assert code == 1 and heard.startswith(
        "secondcast: --from is x, but --kind cut is made of the teacher's own encoder"
    )
