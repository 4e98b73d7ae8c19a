"""Metrics of a run: RUN/metrics.jsonl, and optionally TensorBoard or Weights & Biases."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.schema.fields import Array
from secondcast.trainer.run.metric_mirrors import MIRRORS, Mirror, MirrorName

METRICS_FILE = "metrics.jsonl"
_NO_CURVE = ("step", "summary")


class Metrics:
    """The metrics of a run. The file is authoritative: an error of a mirror is reported once and turns it off."""

    def __init__(self, run: Path, *, mirrors: Sequence[MirrorName] = (), say: Callable[[str], None]) -> None:
        """Writes nothing yet. MissingExtraError if a mirror's package is not installed."""
        self._run, self._say = run, say
        self._mirrors: dict[str, Mirror] = {name: MIRRORS[name](run) for name in mirrors}

    def log(self, *, step: int, **entry: Any) -> None:
        """Append one line, and send its numbers to the mirrors."""
        path = self._run / METRICS_FILE
        try:
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")
        except OSError as error:
            # The error of a full disk does not name the file.
            error.filename = str(path)
            raise
        if values := scalars(entry):
            self._mirror(lambda mirror: mirror.log(step, values))

    def log_picture(self, *, step: int, tag: str, picture_HWC: Array) -> None:
        """Send a uint8 picture to the mirrors; the file has none."""
        self._mirror(lambda mirror: mirror.log_picture(step, tag, picture_HWC))

    def truncate_after(self, step: int) -> None:
        """Drop entries that a killed run logged after its last checkpoint, so that no step appears twice."""
        file = self._run / METRICS_FILE
        lines = file.read_text().splitlines() if file.is_file() else []
        entries = [(line, _entry(line)) for line in lines]
        kept = [(line, entry) for line, entry in entries if entry is not None and _logged_before(entry, step)]
        if lines:
            durable.replace(file, "".join(f"{line}\n" for line, _ in kept).encode())
        at_step = [scalars(entry) for _, entry in kept if entry["step"] == step]
        standing = {tag: value for values in at_step for tag, value in values.items()}
        self._mirror(lambda mirror: mirror.truncate_after(step, standing))

    def close(self, *, failed: bool = False) -> None:
        """Close the mirrors; nothing is logged afterwards. failed: whether the run ended with an error."""
        self._mirror(lambda mirror: mirror.close(failed))
        self._mirrors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _mirror(self, act: Callable[[Mirror], None]) -> None:
        for name, mirror in list(self._mirrors.items()):
            try:
                act(mirror)
            except Exception as error:
                del self._mirrors[name]
                reason = (str(error).splitlines() or [""])[0]
                self._say(
                    f"--report-to {name} was disabled ({type(error).__name__}: {reason}): training continues, "
                    f"and {self._run / METRICS_FILE} has all metrics"
                )
                with suppress(Exception):
                    mirror.close(True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The entries of a run in order; empty without any."""
    file = run / METRICS_FILE
    entries = map(_entry, file.read_text().splitlines() if file.is_file() else ())
    return [entry for entry in entries if entry is not None]


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of an entry by tag: train/loss and train/KIND_loss, validation/loss, replay_error.

    A list has a tag for each index (validation/loss_step_07), a mapping one for each key (validation/loss/NAME). Values
    that are not numbers are skipped, as is the summary at the end of a run, which is not a point of a curve.
    """
    curves = {key: given for key, given in entry.items() if key not in _NO_CURVE}
    found = {tag: value for key, given in curves.items() for tag, value in _flat(_tag(key), given)}
    if "train/loss" in found and isinstance(entry.get("kind"), str):
        found[f"train/{entry['kind']}_loss"] = found["train/loss"]
    return found


def _tag(key: str) -> str:
    if key.startswith("validation_"):
        return key.replace("_", "/", 1)
    return key if key.startswith("replay_") else f"train/{key}"


def _flat(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield tag, float(value)
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _flat(f"{tag}_{place:02}", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{tag}/{key}", part)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        # The last line of a killed run may be incomplete.
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _logged_before(entry: dict[str, Any], step: int) -> bool:
    return entry["step"] < step or ("validation_loss" in entry and entry["step"] == step)
