"""The provenance of an exported student, as a record beside its weights."""

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secondcast.models.families.family import Family
from secondcast.models.families.flux import FLUX
from secondcast.models.families.registry import family_named
from secondcast.models.student.folder import best_checkpoint
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.trainer.run.config import RecordedWith, RunConfig
from secondcast.trainer.run.folder import CONFIG_FILE
from secondcast.trainer.run.metrics import read_metrics

FACTS_FILE = "secondcast.json"


class ExportFacts(Record):
    """Provenance of an exported student: FACTS_FILE of a folder, or the metadata of a single file.

    guidance: guidance values of its training; None if none was recorded.
    validation_loss: at the exported checkpoint; None if not measured.
    replay_error: the loss of a perfect student on the machine that trained it; None if not measured.
    recorded: None for runs of older versions, and on text caches alone.
    family: of the teacher; exports of older versions are of the first one.
    """

    teacher: str
    teacher_digest: str
    sampling_digest: str
    text_length: int
    guidance: tuple[float, ...] | None
    settings: dict[str, Any]
    checkpoint: str
    validation_loss: float | None
    replay_error: float | None
    created_by: str
    recorded: RecordedWith | None = None
    family: str = FLUX.name

    @property
    def teacher_family(self) -> Family:
        """The family of the teacher; that of the recording where older versions stated no other."""
        return family_named(self.family if self.recorded is None else self.recorded.family)


def facts_of(path: Path, student: Path) -> ExportFacts | None:
    """The facts of a run folder or of an export; None for a student without any.

    student: folder of the exported student within `path`. Raises StudentError for an unreadable file.
    """
    try:
        if student != path:
            return _facts_of_run(path, student.parent.name)
        if (path / FACTS_FILE).is_file():
            return ExportFacts.model_validate_json((path / FACTS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        file = path / (CONFIG_FILE if student != path else FACTS_FILE)
        raise StudentError(f"{file} cannot be read ({problem}): export from another copy of {path}") from error
    return None


def _facts_of_run(run: Path, checkpoint: str) -> ExportFacts:
    config = RunConfig.model_validate_json((run / CONFIG_FILE).read_bytes())
    metrics = read_metrics(run)
    step = int(checkpoint.rsplit("-", 1)[-1])
    losses = [entry["validation_loss"] for entry in metrics if entry.get("step") == step and "validation_loss" in entry]
    replay_errors = [entry["replay_error"] for entry in metrics if "replay_error" in entry]
    return ExportFacts(
        # --backbone may name a folder with a transformer alone.
        teacher=config.recorded.teacher if config.recorded else config.backbone,
        teacher_digest=config.teacher_digest,
        sampling_digest=", ".join(sorted({trained_on.sampling_digest for trained_on in config.caches.values()})),
        text_length=config.text_length,
        guidance=config.guidance,
        settings=config.settings.json_value(),
        checkpoint=checkpoint,
        validation_loss=_best_loss(run, checkpoint) if not losses else losses[-1],
        replay_error=replay_errors[-1] if replay_errors else None,
        created_by=f"secondcast {version('secondcast')}",
        recorded=config.recorded,
        family=config.family,
    )


def _best_loss(run: Path, checkpoint: str) -> float | None:
    with suppress(StudentError):
        best = best_checkpoint(run)
        return best[1] if best is not None and best[0].name == checkpoint else None
    return None
