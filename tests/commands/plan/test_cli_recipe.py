"""`secondcast plan recipe`: the verdict over both phases, with a GPU and a price for each."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from secondcast.commands.plan.cards import GpuChoice
from secondcast.commands.plan.verdict import RentedGpu
from secondcast.models.cost.cards import CARDS, PRICES_ASSUMED, find_card
from tests.commands.plan.test_cli_plan import unwrapped
from tests.commands.test_cli import secondcast

ROOT = Path(__file__).resolve().parents[3]
COUNTS = [word for name in ("text=100000", "256=20000", "512=10000") for word in ("--num-prompts", f"flux-{name}")]


def words_of(name: str, *more: object) -> list[object]:
    return ["plan", "recipe", ROOT / f"recipes/{name}.toml", *COUNTS, "--time-budget", "168h", *more]


@pytest.fixture
def planned(capsys):
    """What a plan of a recipe prints without its line breaks, and its facts of both phases."""

    def run(name: str, *more: object) -> tuple[str, dict]:
        words = words_of(name, *more)
        code, said, heard = secondcast(*words, capsys=capsys)
        assert (code, heard) == (0, "")
        return unwrapped(said), json.loads(secondcast(*words, "--json", capsys=capsys)[1])["both_phases"]

    return run


def test_the_first_line_of_a_recipe_is_the_verdict_over_both_gpus(planned):
    said, both = planned("flux-12gb", "--build-gpu", "h100", "--train-gpu", "4070")
    assert both["fits"] is True and both["train_hours"] == 168 and both["hours"] == 168 + both["build_hours"]
    assert [phase["phase"] for phase in both["phases"]] == [
        "build flux-text", "build flux-256", "build flux-512", "train"
    ]  # fmt: skip
    assert both["build_usd"] == pytest.approx(2.5 * both["build_hours"])
    assert both["usd"] == pytest.approx(2.5 * both["build_hours"] + 0.15 * 168)
    # The caches, and the initial student of 129.6 million parameters in fp32.
    for end in ("low", "high"):
        copied = both[f"copy_{end}_bytes"] - both[f"stored_{end}_bytes"]
        assert copied == pytest.approx(4 * 129.6e6, rel=0.001)
    low, high = both["copy_low_bytes"] / 2**30, both["copy_high_bytes"] / 2**30
    verdict = (
        f"fits: {both['hours']:.1f} h in all (builds {both['build_hours']:.1f} h on one H100 SXM, training 168 h on "
        f"one RTX 4070), about {both['usd']:.0f} USD, {low:.1f} GiB to {high:.1f} GiB to copy to the training machine "
        f"(estimated)"
    )
    assert both["verdict"] == verdict and said.startswith(f"{verdict} ")
    assert "not in these hours: init-student, loading weights, copying the caches " in said
    assert (
        f"prices: 2.50 USD per hour of H100 SXM (assumed, {PRICES_ASSUMED}; --build-price X replaces it), 0.15 USD "
        f"per hour of RTX 4070 (assumed, {PRICES_ASSUMED}; --train-price X replaces it) "
    ) in said


def test_the_verdict_in_the_documentation_is_what_the_command_prints(capsys):
    page = (ROOT / "docs/training.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("secondcast plan recipe recipes/flux-12gb.toml"))
    words = [ROOT / word if word.startswith("recipes/") else word for word in line.split()[1:]]
    said = secondcast(*words, capsys=capsys)[1].partition("build flux-text\nteacher")[0]
    shown = "\n".join(line.rstrip() for line in said.splitlines())
    assert f"```\n{shown}\n```\n" in page


def test_what_does_not_fit_is_named_with_what_it_lacks_and_the_option_that_fixes_it(planned):
    said, both = planned("flux-24gb", "--build-gpu", "4070", "--train-gpu", "4070", "--train-price", 0)
    lacking = {phase["phase"]: phase["missing"] for phase in both["phases"]}
    assert lacking["build flux-text"] == [] and both["fits"] is False
    texts = []
    for name in ("build flux-256", "build flux-512", "train"):
        (missing,) = lacking[name]
        assert missing["fix"] == "--max-gpu-memory 12GiB"
        what = "training" if name == "train" else f"the sample stage of {name}"
        verb = name.split()[0]
        texts.append(
            f"{what} needs {missing['bytes'] / 2**30:.1f} GiB more than one RTX 4070 has: {verb} with {missing['fix']}"
        )
    assert both["verdict"].startswith(f"does not fit: {'; '.join(texts)}. With these options: ")
    # One's own card costs nothing.
    assert both["train_usd"] == 0 and both["usd"] == both["build_usd"] > 0
    assert "0.00 USD per hour of RTX 4070 " in said and "--train-price X" not in said


def test_a_given_option_that_makes_the_training_fit_is_part_of_the_verdict(planned):
    words = ["--build-gpu", "h100", "--train-gpu", "4070"]
    _, advised = planned("flux-24gb", *words)
    assert "train with --max-gpu-memory 12GiB" in advised["verdict"] and advised["fits"] is False
    said, both = planned("flux-24gb", *words, "--max-gpu-memory", "12GiB")
    assert both["fits"] is True and both["phases"][-1]["missing"] == []
    assert both["phases"][-1]["needed_bytes"] < 12 * 2**30 and both["usd"] == advised["usd"]
    assert both["verdict"].startswith("fits: ") and "train with" not in both["verdict"]
    assert both["verdict"].endswith("(estimated); with --max-gpu-memory 12GiB in training")
    assert "does not fit" not in said


def test_a_text_stage_that_does_not_fit_runs_on_the_cpu_or_in_smaller_batches(planned):
    _, both = planned("flux-8gb", "--build-gpu", "4060", "--train-gpu", "4060")
    text, *_ = both["phases"]
    assert text["missing"][0]["fix"] == "--stage text --device cpu"
    assert (
        "the text stage of build flux-text needs 3.2 GiB more than one RTX 4060 has: build with --stage text "
        in (both["verdict"])
    )


def test_where_nothing_fits_there_is_no_price_in_the_verdict(planned):
    words = ["--build-gpu", "h100", "--train-gpu", "4070", "--max-gpu-memory", "3GiB"]
    _, both = planned("flux-24gb", *words)
    (missing,) = both["phases"][-1]["missing"]
    assert missing["fix"] is None and both["verdict"] == (
        f"does not fit: training needs {missing['bytes'] / 2**30:.1f} GiB more than the limit of 3.0 GiB: use a larger "
        f"GPU, a smaller student, or a cache with fewer pixels or text tokens"
    )


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ([], "not checked: give --build-gpu and --train-gpu to learn whether it fits; hours unknown (builds unknown, "
             "training 168 h), money unknown, 66.6 GiB to 77.4 GiB to copy"),
        (["--train-gpu", "4070"], "not checked: give --build-gpu to learn whether it fits; hours unknown (builds "
                                  "unknown, training 168 h on one RTX 4070), money unknown, "),
        (["--build-tflops", 300, "--build-price", 2, "--train-gpu", "4070"],
         "not checked: give --build-gpu to learn whether it fits; 172.5 h in all (builds 4.5 h, training 168 h on one "
         "RTX 4070), about 34 USD, "),
    ],
)  # fmt: skip
def test_without_a_gpu_the_verdict_says_what_is_unknown(words, start, planned):
    said, both = planned("flux-12gb", *words)
    assert both["fits"] is None and said.startswith(start)
    assert "the rate" not in said and ("give --build-gpu NAME or --build-tflops X" in said) == ("300" not in str(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--build-gpu", "voodoo"], "--build-gpu 'voodoo' is unknown, expected one of RTX 3060 12GB, "),
        (["--train-gpu", "voodoo"], "--train-gpu 'voodoo' is unknown, expected one of RTX 3060 12GB, "),
        (["--train-price", "inf"], "--train-price is inf, expected a number of USD per hour, 0 or more"),
        (["--build-tflops", "nan"], "--build-tflops is nan, expected the achieved TFLOP/s, above 0"),
        (["--train-tflops", 0], "--train-tflops is 0.0, expected the achieved TFLOP/s, above 0"),
        (["--train-price", "-1"], "--train-price is '-1', expected at least 0 (see secondcast plan recipe --help)"),
        (["--gpu", "4090"], "no such option: --gpu. The GPU of the builds is --build-gpu, that of training"),
        (["--tflops", "4090"], "no such option: --tflops. The rate of the builds is --build-tflops, that of"),
    ],
)
def test_what_is_no_gpu_or_price_is_one_line(words, message, capsys):
    code, said, heard = secondcast(*words_of("flux-12gb", *words), capsys=capsys)
    assert code in (1, 2) and said == "" and heard.count("\n") == 1
    assert heard.lower().startswith(f"secondcast: {message.lower()}"), heard


@pytest.mark.parametrize(
    ("build", "train", "words", "message"),
    [
        ("", "caches = 3\n", ["--num-prompts", 64], "{file} has caches = 3, expected lines such as signs ="),
        ("steps = 'x'\n", "", ["--num-prompts", 64], "[build.a] of {file}: steps is 'x', expected an integer"),
        ("prompts = 'nix.txt'\n", "", [], "no prompt file nix.txt: expected a text file"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_recipe_is_one_line(build, train, words, message, tmp_path, capsys):
    file = tmp_path / "r.toml"
    stage = "[[train.stage]]\nsteps = 2\nbatch-size = 2\n"
    file.write_text(f'[build.a]\nteacher = "pocket"\n{build}[train]\nstudent = "pocket-tiny"\n{train}{stage}')
    code, said, heard = secondcast("plan", "recipe", file, *words, capsys=capsys)
    assert (code, said, heard.count("\n")) == (1, "", 1)
    assert heard.startswith(f"secondcast: {message.format(file=file)}"), heard
    assert heard.endswith("; or give --num-prompts a=N, a plan without the file\n") == (not words)


def test_every_card_has_an_assumed_price_that_a_given_one_replaces():
    assert all(0 < card.usd_per_hour < 20 for card in CARDS)
    gpu = GpuChoice(name="h100", phase="build")
    assumed = RentedGpu(gpu=gpu, usd_per_hour=None).facts()
    assert assumed["usd_per_hour"] == find_card("h100").usd_per_hour and assumed["price_assumed"] == PRICES_ASSUMED
    assert RentedGpu(gpu=gpu, usd_per_hour=0.0).facts() == {
        "name": "H100 SXM", "usd_per_hour": 0.0, "price_assumed": None
    }  # fmt: skip
    assert RentedGpu(gpu=GpuChoice(tflops=1), usd_per_hour=None).facts()["usd_per_hour"] is None


def test_a_cache_that_the_run_does_not_read_is_not_copied(tmp_path, capsys):
    (tmp_path / "r.toml").write_text(
        '[build.read]\nteacher = "pocket"\n[build.apart]\nteacher = "pocket"\n[train]\nstudent = "pocket-tiny"\n'
        '[train.caches]\nread = "read"\n[[train.stage]]\nname = "a"\ncaches = ["read"]\nloss = "embedding"\nsteps = 2\n'
        "batch-size = 2\n"
    )
    words = ["plan", "recipe", tmp_path / "r.toml", "--num-prompts", 64]
    facts = json.loads(secondcast(*words, "--json", capsys=capsys)[1])
    both = facts["both_phases"]
    assert both["copy_high_bytes"] == facts["build"]["read"]["disk"]["stored_high_bytes"]
    assert both["stored_high_bytes"] == 2 * both["copy_high_bytes"]


@pytest.mark.parametrize(
    "words",
    [
        words_of("flux-12gb", "--build-gpu", "3060", "--train-gpu", "4060"),
        ["plan", "build", "--teacher", "FLUX.1-dev", "--num-prompts", 1000, "--gpu", "3060"],
        ["plan", "train", "--teacher", "FLUX.1-dev", "--student", "base", "--gpu", "4060"],
        ["plan", "generate", "--teacher", "FLUX.1-dev", "--gpu", "4070"],
        ["plan", "evaluate", "--teacher", "FLUX.1-dev", "--gpu", "4070"],
    ],
    ids=lambda words: words[1],
)
def test_a_plan_is_80_columns_wide_without_a_terminal(words, capsys):
    code, said, _ = secondcast(*words, capsys=capsys)
    assert code == 0 and max(map(len, said.splitlines())) <= 80
    # A flag and its value are read in whole.
    assert "--max-gpu-memory" in said


@pytest.mark.thorough
def test_a_plan_is_as_wide_as_its_terminal():
    controller, terminal = pty.openpty()
    words = map(str, words_of("flux-12gb", "--build-gpu", "3060", "--train-gpu", "4060"))
    command = [sys.executable, "-c", "from secondcast import cli; cli.main()", *words]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "110", "LINES": "60"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment, cwd=ROOT)
    os.close(terminal)
    parts = []
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    assert process.wait() == 0
    os.close(controller)
    lines = b"".join(parts).decode().replace("\r\n", "\n").splitlines()
    assert 80 < max(map(len, lines)) <= 110
