"""RUN/report.html: losses, validations and samples of a run, rewritten at every checkpoint."""

from collections.abc import Callable
from pathlib import Path

from secondcast.inspection.report.page import is_of_run, render_run
from secondcast.inspection.report.run import REPORT_FILE, run_data
from secondcast.storage_schemas.io import durable
from secondcast.trainer.loop import Observer


class RunReport(Observer):
    """Writes the report, unless the user has another file of its name in the run folder."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._kept = say, False

    def on_checkpoint(self, run: Path, step: int) -> None:
        """See Observer."""
        file = run / REPORT_FILE
        if file.exists() and not (file.is_file() and is_of_run(file.read_bytes())):
            if not self._kept:
                self._say(
                    f"{file} is not a report of this run and is kept: move it, and the next checkpoint writes one"
                )
            self._kept = True
            return
        durable.replace(file, render_run(run_data(run)).encode())
