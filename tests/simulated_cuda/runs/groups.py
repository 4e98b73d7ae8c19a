"""All rows of one process."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from secondcast.models.device import quiet_libraries
from tests.simulated_cuda.device.simulated import Measured, SimulatedCuda
from tests.simulated_cuda.runs.faults import faults
from tests.simulated_cuda.runs.rows import BROKEN, CONTEXT_GIB, ROWS, Planned, Row, TrainingRow
from tests.simulated_cuda.runs.sampling import PARTS
from tests.simulated_cuda.runs.session import Session
from tests.simulated_cuda.runs.training import train


def run_group(group: str, plans: Mapping[str, Planned], folder: Path) -> dict[str, Any]:
    """What each row of a group needed, and each fault in the group of BROKEN, by its name.

    plans: of the rows. The result has, for each, `measured` (see Measured; None after an error) and `error` (None
    without one).
    """
    quiet_libraries()
    rows, session = ROWS[group], Session(SimulatedCuda(), folder)

    def outcome(row: Row, run: Callable[[], Measured]) -> dict[str, Any]:
        session.device.fit_into(plans[row.name].card_gib - CONTEXT_GIB)
        try:
            return {"measured": asdict(run()), "error": None}
        # Any error is the result of this row: the others run nevertheless.
        except Exception as raised:
            traceback.print_exc()
            return {"measured": None, "error": f"{type(raised).__name__}: {raised}"}

    found = {}
    if BROKEN in rows:
        for name, fault in faults(plans[BROKEN.name]).items():
            found[name] = outcome(BROKEN, partial(train, BROKEN, session, fault))
    for row in rows:
        run = partial(train, row, session) if isinstance(row, TrainingRow) else partial(_part, row, session)
        found[row.name] = outcome(row, run)
    return found


def _part(row: Row, session: Session) -> Measured:
    session.release()
    with session.device as device:
        PARTS[type(row)](row, session)
        return device.measured()
