"""A run folder: config.json, metrics.jsonl, checkpoints. Opening one with other settings is an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secondcast.models.student.folder import BEST_FILE, best_checkpoint, checkpoints
from secondcast.storage_schemas.errors import RunError, StudentError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.schema.problems import first_problem
from secondcast.trainer.run.config import RunConfig
from secondcast.trainer.settings import MAIN, TrainSettings

CONFIG_FILE = "config.json"
_LOCK_FILE = "lock"
# Neither the weights nor the choice of the best checkpoint depend on these.
RESUMABLE_OPTIONS = (
    "keep_checkpoints",
    "replay_check",
    "checkpoint_every",
    "checkpoint_minutes",
    "activation_checkpointing",
    "gpu_blocks",
)


def find_run(run: Path, wanted: RunConfig) -> RunConfig | None:
    """The config of a run that has a checkpoint, None for a new run; RunError with the difference for another run."""
    file = run / CONFIG_FILE
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file, expected a new folder or the folder of this run: give another one")
    if file.is_file():
        found = _read(file)
        # Without a checkpoint there is nothing to resume: other settings may replace the config.
        if not checkpoints(run):
            _check_lost_none(run)
            return None
        _check_same_run(found, wanted, run)
        _check_variances(found, file)
        return found
    if run.is_dir() and any(not _is_left_over(path) and path.name != _LOCK_FILE for path in run.iterdir()):
        raise RunError(f"{run} has other files but no {CONFIG_FILE}, so it is not a run: give a new folder")
    return None


def recorded_settings(run: Path) -> TrainSettings | None:
    """The settings of a run that has a checkpoint; None for any other folder."""
    return _read(run / CONFIG_FILE).settings if (run / CONFIG_FILE).is_file() and checkpoints(run) else None


def resumed_settings(begun: RunConfig, wanted: TrainSettings) -> TrainSettings:
    """The settings that a run was begun with, but for those that neither weights nor the best checkpoint depend on."""
    return begun.settings.model_copy(update={name: getattr(wanted, name) for name in RESUMABLE_OPTIONS})


def create_run(run: Path, config: RunConfig) -> None:
    """Write the config of a run that has no checkpoint yet; call it inside `lock_run`."""
    for leftover in run.iterdir():
        if _is_left_over(leftover):
            leftover.unlink()
    # Runs with one id end with the same weights, so they can exchange checkpoints.
    steps = [stage.steps for stage in config.settings.stages]
    named = {key: value for key, value in _flat(config).items() if key not in RESUMABLE_OPTIONS} | {"steps": steps}
    config = config.model_copy(update={"id": digest(named)})
    durable.replace(run / CONFIG_FILE, (config.model_dump_json(indent=1) + "\n").encode())


def _is_left_over(path: Path) -> bool:
    # A temporary file of a process that was killed.
    return durable.is_temporary(path.name) and path.is_file()


def _check_lost_none(run: Path) -> None:
    """Raise RunError if a run without checkpoints has a record of one."""
    try:
        best = best_checkpoint(run)
    except StudentError as error:
        raise RunError(
            f"{run} has no checkpoint and an unreadable {BEST_FILE}: its checkpoints are lost, and a run does not "
            f"restart over them; restore them, or give a new run folder"
        ) from error
    if best is not None:
        raise RunError(
            f"{run} has no checkpoint, but {BEST_FILE} names {best[0].name}: its checkpoints are lost, and a run does "
            f"not restart over them; restore them, or give a new run folder"
        )


def _read(file: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json(file.read_bytes())
    except OSError as error:
        raise RunError(
            f"{file} cannot be read ({error.strerror}): nothing is changed; make it readable for this user"
        ) from error
    except ValidationError as error:
        raise RunError(
            f"{file} cannot be read ({first_problem(error)}): it is damaged, or of another version of this program; "
            f"give a new run folder"
        ) from error


def _check_same_run(found: RunConfig, wanted: RunConfig, run: Path) -> None:
    _check_same_names(found, wanted, run)
    was, now = _flat(found), _flat(wanted)
    for key in [*was, *(key for key in now if key not in was)]:
        if was.get(key) != now.get(key) and key not in RESUMABLE_OPTIONS:
            raise RunError(
                f"{run} was started with {key.replace('_', '-')} = {was.get(key)}, not {now.get(key)}: the weights "
                f"depend on it; give the original flags, or another folder"
            )


def _check_variances(found: RunConfig, file: Path) -> None:
    depths, measured = found.settings.depths, [one.blocks for one in found.stream_variances]
    if not {*depths} <= {*measured}:
        raise RunError(
            f"{file} has stream_variances of depth-blocks {measured}, expected those of {depths}: the depth loss of "
            f"this run divides by them; restore the file, or give a new run folder"
        )


def _check_same_names(found: RunConfig, wanted: RunConfig, run: Path) -> None:
    lost = {name: cache for name, cache in found.caches.items() if name not in wanted.caches}
    for other, now in wanted.caches.items():
        name = next((name for name, was in lost.items() if was.sampling_digest == now.sampling_digest), None)
        if other not in found.caches and name is not None:
            raise RunError(
                f"{run} was started with a cache named {name!r}, found {other!r} with the same sampling: the data "
                f"order depends on the names; give --cache {name}={now.location}"
            )


def _flat(config: RunConfig) -> dict[str, Any]:
    """All values that the weights depend on, by name."""
    values = config.settings.flat()
    for stage in config.settings.stages:
        if stage.budget_share is not None:
            # The steps of a budget_share follow from the other values.
            values.pop("steps" if stage.name == MAIN else f"{stage.name} steps")
    return values | {f"cache {name}": trained_on.sampling_digest for name, trained_on in config.caches.items()}


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Create a run folder and lock it; RunError if another process on this machine holds the lock."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / _LOCK_FILE).open("a") as file:
        try:
            durable.lock(file, run, wait=False)
        except BlockingIOError as error:
            raise RunError(
                f"another process trains in {run}, and two would overwrite each other's checkpoints: wait for it, or "
                f"give another folder"
            ) from error
        yield
