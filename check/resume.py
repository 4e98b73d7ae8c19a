"""The row of a run that is killed: `secondcast train` is killed by SIGKILL and run again, on the pocket teacher."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from secondcast.cache_builder.build import build
from secondcast.cache_builder.settings import BuildSettings
from secondcast.check.results import CheckRow
from secondcast.models.student.folder import checkpoints
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.world import captions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Silent

NAME = "resume"
_CLAIM = "a run that is killed and resumed ends with the weights of an unbroken one (invariant 6)"
PROGRAM = (sys.executable, "-P", "-m", "secondcast.cli")
"""The command line, as a process of its own."""
_STEPS, _EVERY, _PROMPTS, _BATCH = 12, 4, 16, 8
# Much longer than the run takes on a slow machine.
_PATIENCE_SECONDS, _POLL_SECONDS = 600.0, 0.02


def resume_row(folder: Path, *, device: str, program: Sequence[str] = PROGRAM) -> CheckRow:
    """Train twice, killed once; runs and their cache stay in `folder`.

    program: the command line; tests break it on purpose.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache, prompts = folder / "cache", folder / "prompts.txt"
    prompts.write_text("".join(f"{text}\n" for text in captions(_PROMPTS, seed=0, split="train")))
    settings = BuildSettings.from_flags(prompts=(prompts,), steps=4)
    build(str(cache), settings, find_teacher(str(TEACHER_FOLDER), BUILD_PARTS), torch.device(device), Silent())
    # New runs for each attempt: those of an interrupted check were not unbroken.
    attempt = folder / f"attempt-{sum(1 for _ in folder.glob('attempt-*'))}"
    unbroken, killed = attempt / "unbroken", attempt / "killed"
    _run([*program, *_train(unbroken, cache, device)])
    _kill([*program, *_train(killed, cache, device)], killed)
    done = checkpoints(killed)[-1].name
    if done.endswith(f"{_STEPS:08d}"):
        raise SettingsError("the run ended before it could be killed: run the check again")
    _run([*program, *_train(killed, cache, device)])
    expected, resumed = (_files(checkpoints(run)[-1]) for run in (unbroken, killed))
    differing = sorted(name for name in expected | resumed if expected.get(name) != resumed.get(name))
    detail = f"killed behind {done} of {_STEPS} steps; " + (
        f"{differing[0]} and {len(differing) - 1} more differ" if differing else f"all {len(resumed)} files are equal"
    )
    return CheckRow(name=NAME, claim=_CLAIM, result="broken" if differing else "holds", detail=detail)


def _train(run: Path, cache: Path, device: str) -> list[str]:
    return [
        "train", str(run), "--cache", str(cache), "--student", "pocket-small", "--init", "random", "--dropout", "0.1",
        "--steps", str(_STEPS), "--batch-size", str(_BATCH), "--checkpoint-every", str(_EVERY), "--deterministic",
        "--replay-check", str(_BATCH),
        "--device", device, "--quiet",
    ]  # fmt: skip


def _run(command: Sequence[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"`secondcast train` failed ({last})")


def _kill(command: Sequence[str], run: Path) -> None:
    """Run a command and kill it as soon as the run has a checkpoint."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + _PATIENCE_SECONDS
    try:
        while process.poll() is None and not checkpoints(run) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
    if not checkpoints(run):
        raise RuntimeError(f"the run made no checkpoint (exit code {process.returncode})")


def _files(checkpoint: Path) -> dict[str, bytes]:
    """Weights, optimizer state and step of a checkpoint."""
    return {
        os.path.relpath(file, checkpoint): file.read_bytes()
        for file in sorted(checkpoint.rglob("*"))
        if file.suffix == ".safetensors"
    }
