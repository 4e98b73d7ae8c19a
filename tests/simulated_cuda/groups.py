"""Rows that run in one process."""

import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secondcast.models.device import quiet_libraries
from tests.simulated_cuda.device import SimulatedCuda
from tests.simulated_cuda.faults import FAULTS
from tests.simulated_cuda.sampling import SAMPLING, SamplingRow
from tests.simulated_cuda.session import Session
from tests.simulated_cuda.training import STREAMED, TRAINING, TrainingRow

GROUPS: dict[str, Sequence[TrainingRow | SamplingRow]] = {
    "training": (*FAULTS, *TRAINING),
    "streamed": STREAMED,
    "sampling": SAMPLING,
}


def run_group(group: str, folder: Path) -> dict[str, Any]:
    """Each row by its name: the plan, what was measured (None if it failed), and the error (None if it did not)."""
    quiet_libraries()
    # Before torch has the device: the plans count on the meta device with the kernels of a CPU.
    plans = {row.name: row.planned() for row in GROUPS[group]}
    session = Session(SimulatedCuda(), folder)
    found = {}
    for row in GROUPS[group]:
        plan = plans[row.name]
        session.device.fit_into(plan.card_gib)
        measured = error = None
        try:
            measured = asdict(row.run(session))
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
        found[row.name] = {"planned": asdict(plan), "measured": measured, "error": error}
    return found
