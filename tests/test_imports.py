"""Who may import whom: the map of the rooms, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("storage_schemas", "models", "cache_builder", "trainer", "evaluation", "inspection", "pocket", "commands")
EVERYTHING = {*ROOMS, "cli"}
MAY_IMPORT = {
    "storage_schemas": set(),
    "pocket": set(),
    "models": {"storage_schemas"},
    "cache_builder": {"models", "storage_schemas"},
    "trainer": {"models", "storage_schemas"},
    "evaluation": {"models", "storage_schemas", "pocket"},
    "inspection": {"models", "storage_schemas", "evaluation"},
    "commands": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
}


def imported_modules(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides the room it goes to"
            found.add(node.module or "")
    return found


def sources(room: str) -> list[Path]:
    return [ROOT / "cli.py"] if room == "cli" else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", [*ROOMS, "cli"])
def test_a_room_imports_only_where_the_design_draws_a_line(room: str):
    for file in sources(room):
        rooms = {name.split(".")[0] for name in imported_modules(file)} & EVERYTHING
        assert rooms <= MAY_IMPORT[room] | {room}, f"{file.relative_to(ROOT)} imports {rooms}"


def test_the_two_phases_never_import_each_other():
    assert "trainer" not in MAY_IMPORT["cache_builder"] and "cache_builder" not in MAY_IMPORT["trainer"]


def test_evaluation_knows_only_the_scorer_of_the_pocket():
    for file in sources("evaluation"):
        assert {name for name in imported_modules(file) if name.startswith("pocket")} <= {"pocket.scorer"}


@pytest.mark.parametrize("module", ["pocket", "pocket.world", "pocket.scorer"])
def test_the_world_and_its_scorer_import_nothing_heavy(module: str):
    code = f"import sys, {module}; assert not {{'torch', 'diffusers', 'models'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_room_is_a_drawer_for_everything():
    names = {file.stem for room in ROOMS for file in sources(room)}
    assert not names & {"utils", "common", "helpers", "misc"}


def test_nothing_is_unpickled():
    for room in (*ROOMS, "cli"):
        for file in sources(room):
            tree = ast.parse(file.read_text())
            assert "pickle" not in imported_modules(file), file
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file
