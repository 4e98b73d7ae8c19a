"""Runs the processes of the simulation, each group of rows once."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.simulated_cuda.device.shim import compile_shim
from tests.simulated_cuda.runs.rows import ROWS

ROOT = Path(__file__).parents[2]


class Runner:
    """The results of the groups, in a folder that processes may share."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder

    def group(self, name: str) -> dict[str, Any]:
        """The result of run_group, and beside it `planned` (see Planned) of each row."""
        result = self._folder / f"{name}.json"
        with self._locked(name):
            if not result.exists():
                self._run(name, result)
        found: dict[str, Any] = json.loads(result.read_text())
        plans = json.loads((self._folder / f"{name}-plans.json").read_text())
        return {row: one | {"planned": plans.get(row)} for row, one in found.items()}

    def _run(self, name: str, result: Path) -> None:
        library = self._folder / "shim.so"
        with self._locked("shim"):
            if not library.exists():
                compile_shim(library)
        plans = self._folder / f"{name}-plans.json"
        plans.write_text(json.dumps({row.name: asdict(row.planned()) for row in ROWS[name]}))
        folder = self._folder / name
        folder.mkdir()
        # One thread: nothing is computed.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.simulated_cuda.process", name, library, plans, folder, result]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
