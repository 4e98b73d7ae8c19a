"""CITATION.cff, the workflow, the hooks of pre-commit, CHANGELOG.md and CONTRIBUTING.md agree with the project."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

import secondcast

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_names_this_version_and_the_paper():
    cited = read_yaml("CITATION.cff")
    assert cited["version"] == secondcast.__version__ and cited["license"] == PROJECT["license"]
    (paper,) = cited["references"]
    title = "Scaling Down Text Encoders of Text-to-Image Diffusion Models"
    assert paper["title"] == title and title in " ".join((ROOT / "README.md").read_text().split())
    assert paper["identifiers"][0]["value"] == "arXiv:2503.19897" and paper["year"] == 2025
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Liu", "Liu", "He"]


def test_the_newest_section_of_the_changelog_is_unreleased_or_this_version():
    newest, *older = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest in ("Unreleased", secondcast.__version__)
    assert "Unreleased" not in older


def test_the_workflow_runs_pythons_of_the_declared_range_its_oldest_among_them():
    jobs = read_yaml(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    pythons = {job["target"]: job["python"] for job in jobs}
    declared = SpecifierSet(PROJECT["requires-python"])
    assert all(version in declared for version in pythons.values())
    oldest = min(pythons.values(), key=lambda version: int(version.split(".")[1]))
    assert f">={oldest}" == PROJECT["requires-python"] and pythons["test-oldest"] == oldest
    assert pythons["test-py313"] == "3.13" == re.search(r"^PYTHON313 \?= python(.*)$", MAKEFILE, re.MULTILINE)[1]
    assert len(pythons) == len(jobs), "a target runs twice"
    assert not {"test", "test-thorough"} & pythons.keys(), "test-all runs them"


def test_the_hooks_of_pre_commit_are_programs_of_make_check_in_the_versions_of_the_constraints():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    checked = MAKEFILE.partition("\ncheck:")[2].partition("\n\n")[0]
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    # Hooks of another repository would have versions of their own.
    assert repository["repo"] == "local" and "rev" not in repository
    entries = [hook["entry"].split() for hook in repository["hooks"]]
    assert [entry[0] for entry in entries] == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/codespell"]
    for program, *words in entries:
        name = program.removeprefix(".venv/bin/")
        command = " ".join([name, *(word for word in words if not word.startswith("--"))])
        assert f"$(BIN)/{command}" in checked and name in pins
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_contributing_names_targets_of_the_makefile_and_files_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    made = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    asked = set(re.findall(r"(?:^|`)make ([\w-]+)", page, re.MULTILINE))
    assert {"check", "test", "test-thorough", "test-wheel"} <= asked <= made
    for name in re.findall(r"`((?:docs|tests|\.ci)/[\w./-]+)`", page):
        assert (ROOT / name).exists(), name
    assert all(make in page for make in re.findall(r"^make [\w-]+$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
