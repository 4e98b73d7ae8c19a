"""What pyproject.toml declares is what the packages import, and the oldest of it can be asked for."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoConfig, AutoTokenizer

from secondcast.trainer.run.metric_mirrors import MIRRORS
from tests.models.families.random_teacher import WORDS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
# Needed by what is imported, as the comments of pyproject.toml say.
FOR_OTHERS = {"protobuf"}


def name_of(requirement: str) -> str:
    return re.split(r"[\[><=!~; ]", requirement)[0].lower().replace("_", "-")


def imported() -> set[str]:
    """Top-level modules that the packages import, at any depth of the code; none of our own."""
    found = set()
    files = [
        ROOT / "cli.py",
        *(file for package in PACKAGES for file in ROOT.joinpath(*package.split(".")[1:]).glob("*.py")),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - {"secondcast"} - set(sys.stdlib_module_names)


@pytest.mark.thorough
def test_every_package_that_is_imported_is_declared():
    distributions = packages_distributions()
    extras = [names for extra, names in PROJECT["optional-dependencies"].items() if extra != "dev"]
    declared = {name_of(requirement) for names in (PROJECT["dependencies"], *extras) for requirement in names}
    for module in sorted(imported()):
        # An extra that is not installed here has no distribution: its module is named as it is.
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
        assert names & declared, f"{module} of {names} is imported and not declared"


@pytest.mark.thorough
def test_every_declared_package_is_imported_or_needed_by_one_that_is():
    distributions = packages_distributions()
    used = {name.lower().replace("_", "-") for module in imported() for name in distributions.get(module, [])}
    declared = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert declared - used == FOR_OTHERS


def test_the_oldest_versions_are_those_of_pyproject():
    done = subprocess.run([sys.executable, ROOT / ".ci/oldest.py"], capture_output=True, text=True, check=True)
    pins = dict(line.split("==") for line in done.stdout.splitlines())
    assert {name.lower().replace("_", "-") for name in pins} == {name_of(r) for r in PROJECT["dependencies"]} - {
        "torch"
    }
    assert pins["zarr"] == "3.1.3" and pins["transformers"] == "5.13"


def test_the_workflow_runs_targets_of_the_makefile_and_names_no_registry():
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    asked = set(re.findall(r"target: ([\w-]+)", workflow))
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"check", "test-all", "test-oldest", "test-py313", "test-wheel"} <= asked <= made
    assert "://" not in workflow and "index-url" not in workflow


@pytest.mark.slow
def test_a_tokenizer_that_is_a_spiece_model_alone_gives_the_ids_of_sentencepiece(tmp_path):
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*WORDS, " ".join(WORDS)] * 20), model_writer=file, vocab_size=60,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=AutoConfig.for_model("t5"), extra_ids=0)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for text in ("a red dog", "two cats on the left of a sign"):
        assert tokenizer(text).input_ids == [*expected.encode(text), 1]


def test_every_extra_that_a_text_names_is_declared():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "cli.py"]
    for package in PACKAGES:
        files += ROOT.joinpath(*package.split(".")[1:]).glob("*.py")
    named = {name for file in files for name in re.findall(r"secondcast\[([a-z0-9]+)\]", file.read_text())}
    assert {"quant", "metrics", "ray"} <= named <= PROJECT["optional-dependencies"].keys()


def test_every_mirror_of_metrics_is_an_extra():
    assert set(MIRRORS) <= PROJECT["optional-dependencies"].keys()
