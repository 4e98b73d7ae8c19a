"""Who may import whom, read from the imports themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "storage_schemas", "models", "cache_builder", "trainer", "evaluation", "inspection", "check", "pocket", "api",
    "commands",
)  # fmt: skip
EVERYTHING = {*PACKAGES, "cli"}
MAY_IMPORT = {
    "storage_schemas": set(),
    "pocket": set(),
    "models": {"storage_schemas"},
    "cache_builder": {"models", "storage_schemas"},
    "trainer": {"models", "storage_schemas"},
    "evaluation": {"models", "storage_schemas", "pocket"},
    "inspection": {"models", "storage_schemas", "evaluation"},
    "check": {"models", "storage_schemas", "cache_builder", "trainer", "evaluation", "pocket"},
    "api": EVERYTHING - {"cli", "commands", "check"},
    "commands": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
}
LARGEST_FOLDER = 16


def imported_modules(file: Path) -> set[str]:
    """Modules of ours without the leading `secondcast.`, others by their name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides the package that it reaches"
            # `from package import module` names a module, `from package.module import name` does not.
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("secondcast.") for name in found}


def sources(package: str) -> list[Path]:
    return [ROOT / "cli.py"] if package == "cli" else sorted((ROOT / package).rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for package in EVERYTHING for file in sources(package)}
IMPORTS = {module: imported_modules(file) & MODULES.keys() for module, file in MODULES.items()}


@pytest.mark.parametrize("package", [*PACKAGES, "cli"])
def test_a_package_imports_only_what_the_design_allows(package: str):
    for file in sources(package):
        found = {name.split(".")[0] for name in imported_modules(file)} & EVERYTHING
        assert found <= MAY_IMPORT[package] | {package}, f"{file.relative_to(ROOT)} imports {found}"


@pytest.mark.thorough
def test_a_package_is_imported_by_its_installed_name_only():
    for file in [*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & EVERYTHING, f"{file} lacks `secondcast.`"


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def grouped(package: str) -> Iterator[tuple[str, set[str]]]:
    """Each module and sub-package at the top of a package, with those that it imports."""
    groups: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        if module.split(".")[0] != package or module == package:
            continue
        own = groups.setdefault(module.split(".")[1], set())
        own |= {name.split(".")[1] for name in imported if name.startswith(f"{package}.")}
    return ((name, below - {name}) for name, below in groups.items())


def test_modules_import_one_another_without_cycles():
    # A package's own __init__ is named by every import of what it holds.
    graph = {module: {name for name in imported if "." in name} for module, imported in IMPORTS.items()}
    assert cycle_in(graph) is None


@pytest.mark.parametrize("package", PACKAGES)
def test_sub_packages_import_one_another_in_one_direction(package: str):
    assert cycle_in(dict(grouped(package))) is None


def test_a_cycle_between_sub_packages_is_noticed():
    assert cycle_in({"formats": {"schema"}, "schema": {"formats"}}) is not None


def test_the_two_phases_never_import_each_other():
    assert "trainer" not in MAY_IMPORT["cache_builder"] and "cache_builder" not in MAY_IMPORT["trainer"]


def test_evaluation_uses_only_the_scorer_of_the_pocket():
    for file in sources("evaluation"):
        found = {name for name in imported_modules(file) & MODULES.keys() if name.startswith("pocket.")}
        assert found <= {"pocket.scorer"}


@pytest.mark.parametrize("module", ["pocket", "pocket.world", "pocket.scorer"])
def test_the_world_and_its_scorer_import_nothing_heavy(module: str):
    code = f"import sys, secondcast.{module}; assert not {{'torch', 'diffusers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_package_itself_imports_no_library():
    code = "import sys, secondcast; assert not {'torch', 'numpy', 'pydantic', 'typer'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_package_holds_more_than_can_be_overlooked():
    for package in (*PACKAGES, "tests", "benchmarks", "experiments"):
        for folder in [ROOT / package, *(file.parent for file in (ROOT / package).rglob("__init__.py"))]:
            entries = {entry.name for entry in folder.iterdir()} - {"__pycache__"}
            assert len(entries) <= LARGEST_FOLDER, f"{folder.relative_to(ROOT)} has {len(entries)} entries"


def test_no_module_is_a_drawer_for_everything():
    assert not {file.stem for file in MODULES.values()} & {"utils", "common", "helpers", "misc"}


# What makes tensors of a file; of a class, `from_pretrained` does so too unless it is a configuration or a tokenizer.
LOADERS = {"load_file", "safe_open", "torch.load", "load_model", "load_checkpoint_and_dispatch", "from_single_file"}
WITHOUT_WEIGHTS = ("Config", "config_class", "Tokenizer", "TokenizerFast", "Processor")
MAY_LOAD = {
    "models/weights/checked_loading.py": {"load_file", "safe_open", "kind.from_pretrained"},
    # Embeddings that `evaluate paper` wrote.
    "evaluation/tables/paper/encoders.py": {"safe_open"},
    # Headers alone.
    "models/weights/files.py": {"safe_open", "torch.load"},
    # The unmodified pipeline, and the unmodified transformer: references that results are compared with.
    "models/families/flux.py": {"getattr(diffusers, self.pipeline).from_pretrained"},
    "models/families/klein.py": {"diffusers.Flux2KleinPipeline.from_pretrained"},
    "models/families/pixart.py": {"diffusers.PixArtSigmaPipeline.from_pretrained"},
    "models/families/sd3.py": {"diffusers.StableDiffusion3Pipeline.from_pretrained"},
    "check/teachers.py": {"getattr(diffusers, self.folder.family.transformer).from_pretrained"},
    "check/recording.py": {"safe_open"},
    # Loaders of a student's classes, of which an export carries a copy.
    "models/student/student_network.py": {"super().from_pretrained"},
    "models/student/encoder_student_network.py": {"super().from_pretrained", "cls.from_pretrained"},
    # The pocket's training reads back what it wrote.
    "pocket/training/examine.py": {"FluxPipeline.from_pretrained"},
    "pocket/training/stages.py": {"torch.load"},
}


@pytest.mark.thorough
def test_weights_are_loaded_in_one_place():
    for file in MODULES.values():
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
        found = {call for call in calls if call in LOADERS or call.split(".")[-1] in LOADERS - {"torch.load"}}
        found |= {
            call
            for call in calls
            if call.endswith(".from_pretrained") and not call.split(".")[-2].endswith(WITHOUT_WEIGHTS)
        }
        assert found <= MAY_LOAD.get(str(file.relative_to(ROOT)), set()), f"{file.relative_to(ROOT)}: {found}"


@pytest.mark.thorough
def test_nothing_is_unpickled():
    for module, file in MODULES.items():
        assert "pickle" not in imported_modules(file), module
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), module
