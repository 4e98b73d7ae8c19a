"""A run folder: config.json, metrics.jsonl, checkpoints. Opening one with other settings is refused."""

import json
from pathlib import Path
from typing import Any

from models.student import checkpoints
from storage_schemas import durable
from storage_schemas.errors import BadRun
from trainer.settings import RunConfig
from trainer.training_set import TrainingSet

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
# Neither the weights nor what is best depend on these.
_FREE = ("keep",)


def open_run(run: Path, config: RunConfig, committed: TrainingSet) -> TrainingSet:
    """Begin a run in a new or empty folder, or check that it is the same run; BadRun says what differs.

    Gives what the run trains on: `committed`, unless it has a checkpoint that was trained on what was there then.
    """
    file = run / CONFIG_FILE
    if run.exists() and not run.is_dir():
        raise BadRun(f"{run} is a file, expected a new folder or the folder of this run: give another one")
    if file.is_file():
        found = RunConfig.model_validate_json(file.read_bytes())
        _check_same_run(found, config, run)
        if found.training_set is not None and checkpoints(run):
            return found.training_set
        config = found
    elif run.is_dir() and any(run.iterdir()):
        raise BadRun(f"{run} holds other files and no {CONFIG_FILE}: it is not a run; give a new folder")
    run.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"training_set": committed})
    durable.replace(file, (config.model_dump_json(indent=1) + "\n").encode())
    return committed


def _check_same_run(found: RunConfig, wanted: RunConfig, run: Path) -> None:
    was = {**found.settings.json_value(), "cache": found.sampling_digest}
    now = {**wanted.settings.json_value(), "cache": wanted.sampling_digest}
    for key in was:
        if was[key] != now[key] and key not in _FREE:
            raise BadRun(
                f"{run} was begun with {key.replace('_', '-')} = {was[key]}, you asked for {now[key]}: the weights "
                f"depend on it; give the flags of the first time, or another folder"
            )


def log_metrics(run: Path, **entry: Any) -> None:
    """Append one line to RUN/metrics.jsonl."""
    with (run / METRICS_FILE).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def forget_metrics_after(run: Path, step: int) -> None:
    """Drop what a killed run logged beyond its last checkpoint, so that no step stands there twice."""
    file = run / METRICS_FILE
    if not file.is_file():
        return
    lines = file.read_text().splitlines()
    kept = [line for line in lines if _logged_before(line, step)]
    durable.replace(file, "".join(f"{line}\n" for line in kept).encode())


def _logged_before(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return int(entry["step"]) < step or ("validation_loss" in entry and int(entry["step"]) == step)
