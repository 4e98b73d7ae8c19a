"""A run folder: config.json, metrics.jsonl, checkpoints. Opening one with other settings is refused."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secondcast.models.student.student import checkpoints
from secondcast.storage_schemas.errors import BadRun
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.schema.manifest import first_problem
from secondcast.trainer.settings import MAIN, RunConfig, TrainSettings

CONFIG_FILE = "config.json"
_LOCK_FILE = "lock"
# Neither the weights nor what is best depend on these.
FREE = ("keep", "floor", "checkpoint_every", "checkpoint_minutes", "checkpoint_blocks", "resident_blocks")


def begun_run(run: Path, wanted: RunConfig) -> RunConfig | None:
    """How a run was begun that has a checkpoint, None for a new one; BadRun, saying what differs, for another run."""
    file = run / CONFIG_FILE
    if run.exists() and not run.is_dir():
        raise BadRun(f"{run} is a file, expected a new folder or the folder of this run: give another one")
    if file.is_file():
        # Without a checkpoint there is nothing to go on with: other settings begin it anew.
        if not checkpoints(run):
            return None
        found = _read(file)
        _check_same_run(found, wanted, run)
        return found
    if run.is_dir() and any(not _is_temporary(path) and path.name != _LOCK_FILE for path in run.iterdir()):
        raise BadRun(f"{run} holds other files and no {CONFIG_FILE}: it is not a run; give a new folder")
    return None


def recorded_settings(run: Path) -> TrainSettings | None:
    """The settings of a run that has a checkpoint; None for any other folder."""
    return _read(run / CONFIG_FILE).settings if (run / CONFIG_FILE).is_file() and checkpoints(run) else None


def begin_run(run: Path, config: RunConfig) -> None:
    """Write down what a run is, or what it is now that it has no checkpoint yet; inside `held`."""
    for leftover in run.iterdir():
        if _is_temporary(leftover) and leftover.is_file():
            leftover.unlink()
    durable.replace(run / CONFIG_FILE, (config.model_dump_json(indent=1) + "\n").encode())


def _is_temporary(path: Path) -> bool:
    # What a process left that was killed while it wrote.
    return path.name.startswith(".") and path.suffix == ".tmp"


def _read(file: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise BadRun(
            f"{file} cannot be read ({reason}): damaged, or of another version of this program; give a new run folder"
        ) from error


def _check_same_run(found: RunConfig, wanted: RunConfig, run: Path) -> None:
    _check_same_names(found, wanted, run)
    was, now = _flat(found), _flat(wanted)
    for key in [*was, *(key for key in now if key not in was)]:
        if was.get(key) != now.get(key) and key not in FREE:
            raise BadRun(
                f"{run} was begun with {key.replace('_', '-')} = {was.get(key)}, you asked for {now.get(key)}: the "
                f"weights depend on it; give the flags of the first time, or another folder"
            )


def _check_same_names(found: RunConfig, wanted: RunConfig, run: Path) -> None:
    lost = {name: cache for name, cache in found.caches.items() if name not in wanted.caches}
    for other, now in wanted.caches.items():
        name = next((name for name, was in lost.items() if was.sampling_digest == now.sampling_digest), None)
        if other not in found.caches and name is not None:
            raise BadRun(
                f"{run} was begun with a cache named {name!r}, which {other!r} may be: the order of training goes by "
                f"the names; give --cache {name}={now.location}"
            )


def _flat(config: RunConfig) -> dict[str, Any]:
    """All that the weights depend on, by the names that people gave."""
    values = config.settings.flat()
    for stage in config.settings.stages:
        if stage.budget_share is not None:
            # What a share of a budget came to follows from the rest.
            values.pop("steps" if stage.name == MAIN else f"{stage.name} steps")
    return values | {f"cache {name}": trained_on.sampling_digest for name, trained_on in config.caches.items()}


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Make a run folder and be the one who trains in it; BadRun where another process does.

    A lock of the machine's own disk.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / _LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadRun(
                f"another process trains in {run}: two would write over each other's checkpoints; wait for it, or give "
                f"another folder"
            ) from error
        yield
