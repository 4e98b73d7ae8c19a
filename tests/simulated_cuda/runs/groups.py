"""All rows of one process."""

import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from secondcast.models.device import quiet_libraries
from tests.simulated_cuda.device.simulated import Measured, SimulatedCuda
from tests.simulated_cuda.runs.faults import BROKEN, FAULTS
from tests.simulated_cuda.runs.rows import CONTEXT_GIB, ROWS, Row, TrainingRow
from tests.simulated_cuda.runs.sampling import PARTS
from tests.simulated_cuda.runs.session import Session
from tests.simulated_cuda.runs.training import train


def run_group(group: str, folder: Path) -> dict[str, Any]:
    """Each row, and in the process of BROKEN each fault, by its name.

    planned: see Planned; measured: see Measured, None after an error; error: None after none.
    """
    quiet_libraries()
    rows = ROWS[group]
    # Before torch has the device: the plans count on the meta device, with the kernels of a CPU.
    plans = {row.name: row.planned() for row in rows}
    session = Session(SimulatedCuda(), folder)

    def outcome(row: Row, run: Callable[[], Measured]) -> dict[str, Any]:
        plan = plans[row.name]
        session.device.fit_into(plan.card_gib - CONTEXT_GIB)
        measured = error = None
        try:
            measured = asdict(run())
        # Any error is the result of this row: the others run nevertheless.
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
        return {"planned": asdict(plan), "measured": measured, "error": error}

    found = {}
    if BROKEN in rows:
        for name, fault in FAULTS.items():
            found[name] = outcome(BROKEN, lambda fault=fault: train(BROKEN, session, fault()))
    for row in rows:
        run = partial(train, row, session) if isinstance(row, TrainingRow) else partial(_part, row, session)
        found[row.name] = outcome(row, run)
    return found


def _part(row: Row, session: Session) -> Measured:
    session.release()
    with session.device as device:
        PARTS[type(row)](row, session)
        return device.measured()
