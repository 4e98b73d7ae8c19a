"""Plans of bundled configurations start within a second, because they import no torch."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DEV = ["--teacher", "FLUX.1-dev"]
COMMANDS = (
    ["build", *DEV, "--num-prompts", "1000", "--gpu", "h100"],
    # Only streamed blocks fit.
    ["build", *DEV, "--num-prompts", "1000", "--gpu", "3060", "--resolution", "1024"],
    ["train", *DEV, "--student", "base", "--gpu", "4090"],
    ["train", "--teacher", "FLUX.1-schnell", "--student", "google-t5/t5-base", "--max-gpu-memory", "12GiB"],
    ["train", *DEV, "--student", "base", "--gpu", "4060", "--loss", "depth", "--depth-blocks", "4"],
    ["generate", *DEV, "--gpu", "4070"],
    ["evaluate", *DEV, "--gpu", "4090"],
)
HEAVY = ("torch", "transformers", "diffusers", "zarr")


def recipes() -> Iterator[list[str]]:
    """A plan of each bundled recipe of a bundled configuration."""
    for file in sorted((ROOT / "recipes").glob("*.toml")):
        if "FLUX.1-" in (text := file.read_text()):
            budget = ["--time-budget", "72h"] if "budget-share" in text else []
            yield ["recipe", str(file), "--num-prompts", "1000", *budget]


@pytest.mark.thorough
def test_plans_of_bundled_configurations_and_recipes_import_no_torch(tmp_path):
    commands = [*COMMANDS, *recipes()]
    assert len(commands) > len(COMMANDS)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from secondcast import cli\n"
        f"for words in {commands!r}:\n"
        "    cli.app(['plan', *words], standalone_mode=False)\n"
        f"    assert not {{*{HEAVY!r}}} & sys.modules.keys(), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count("total GiB,") >= 4 and "--gpu-blocks" in done.stdout
