"""Every experiment script runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(file.stem for file in (ROOT / "experiments").glob("*.py") if '"__main__"' in file.read_text())


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_are_known():
    assert SCRIPTS == [
        "pocket_controlnet",
        "pocket_experiment",
        "pocket_lora",
        "pocket_premise",
        "pocket_roads",
        "pocket_sd3",
        "pocket_text_rendering",
        "pocket_training",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_describes_itself(name: str):
    assert f"usage: {name}" in run(f"experiments.{name}", "--help").replace(".py", "")


@pytest.mark.slow
def test_the_premise_is_measured_on_the_shipped_teacher():
    table = run("experiments.pocket_premise")
    assert "| another clause, same picture |" in table and "effective rank" in table


@pytest.mark.slow
def test_an_arm_of_the_training_experiment_is_calibrated(tmp_path: Path):
    small = [
        "--num-prompts",
        "64",
        "--captions",
        "2",
        "--steps",
        "2",
        "--seconds",
        "0.1",
        "--seeds",
        "1",
        "--jobs",
        "1",
    ]
    run("experiments.pocket_training", str(tmp_path), "--part", "calibrate", *small)
    assert (tmp_path / "calibration.json").stat().st_size > 0
