"""The wheel, and the wheel made from the sdist, run in an environment of their own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import secondcast
from secondcast.inspection.reading.spread import KINDS

ROOT = Path(__file__).resolve().parents[2]
# Shadows what an import without the prefix would find: the user's own folder must never be taken for the product.
TRAPS = ("models/__init__.py", "trainer/__init__.py", "storage_schemas/__init__.py", "pocket/__init__.py", "cli.py")


def build(source: Path, out: Path, kind: str) -> Path:
    """The wheel or sdist of a source tree, by the build backend that pyproject.toml names."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    return out / done.stdout.splitlines()[-1]


def checkout(folder: Path) -> Path:
    """The tracked files, so that building leaves nothing in the working tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("the sources are no git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("dist")
    source = checkout(tmp_path_factory.mktemp("source"))
    found = {"sdist": build(source, out, "sdist"), "wheel": build(source, out, "wheel")}
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(found["sdist"]) as archive:
        archive.extractall(unpacked, filter="data")
    again = tmp_path_factory.mktemp("again")
    found["wheel of the sdist"] = build(next(unpacked.iterdir()), again, "wheel")
    return found


def environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel alone; its dependencies are those of the running interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # Lines of a .pth file become import paths, but the .pth files of those folders, the checkout's too, are not read.
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    return folder / "bin/python"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "wheel of the sdist"])
def test_an_installed_wheel_runs_the_demo_from_a_folder_with_packages_of_the_same_names(tmp_path, distributions, kind):
    python = environment(tmp_path / "env", distributions[kind])
    work = tmp_path / "work"
    for name in TRAPS:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("raise RuntimeError('this file is the user\\'s own')\n")
    code = "import secondcast, sys; from secondcast.cli import main; sys.argv[0] = 'secondcast'; main()"
    tiny = ["demo", "out", "--num-prompts", "64", "--pretrain-steps", "2", "--steps", "2"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code, *tiny], cwd=work, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert (work / "out/report.html").stat().st_size > 10_000


@pytest.mark.thorough
def test_the_wheel_holds_the_recipes_and_no_tests_experiments_or_pocket_training(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = archive.namelist()
    recipes = {f"secondcast/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.toml")}
    assert recipes and recipes <= set(names)
    data = {"py.typed", "inspection/page/table.js", "models/cost/counted.json"}
    data |= {f"{folder}/{kind}.txt" for folder in ("inspection/reading/prompts", "pocket/prompts") for kind in KINDS}
    assert {f"secondcast/{name}" for name in data} <= set(names)
    unwanted = ("secondcast/tests/", "secondcast/experiments/", "secondcast/benchmarks/", "secondcast/pocket/training/")
    assert [name for name in names if name.startswith(unwanted)] == []
    assert {name.split("/")[0] for name in names} == {"secondcast", f"secondcast-{secondcast.__version__}.dist-info"}


@pytest.mark.thorough
def test_both_wheels_hold_the_same_files(distributions):
    contents = []
    for kind in ("wheel", "wheel of the sdist"):
        with zipfile.ZipFile(distributions[kind]) as archive:
            contents.append({info.filename: info.CRC for info in archive.infolist()})
    assert contents[0] == contents[1]


def test_the_sdist_holds_what_the_repository_holds_for_developers(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        ".github/workflows/tests.yml",
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
        "NOTICE",
        "docs/training.md",
        "recipes/paper.toml",
        "tests/project/test_imports.py",
    } <= names


def test_every_package_of_the_tree_is_shipped(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = set(archive.namelist())
    tops = (
        "api",
        "cache_builder",
        "commands",
        "evaluation",
        "inspection",
        "models",
        "pocket",
        "storage_schemas",
        "trainer",
    )
    files = {file.relative_to(ROOT).as_posix() for top in tops for file in (ROOT / top).rglob("*.py")}
    expected = {f"secondcast/{name}" for name in files if not name.startswith("pocket/training/")}
    assert expected <= names


@pytest.mark.thorough
def test_the_version_is_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    stated = [
        file
        for file in ROOT.glob("*/**/*.py")
        if not any(part.startswith(".") for part in file.relative_to(ROOT).parts)
        and f'"{secondcast.__version__}"' in file.read_text()
    ]
    assert stated == []
