"""What a run says of itself: RUN/metrics.jsonl, and its numbers in TensorBoard or Weights & Biases where asked for."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from secondcast.storage_schemas.io import durable
from secondcast.trainer.run.metric_mirrors import MIRRORS, Mirror, MirrorName

METRICS_FILE = "metrics.jsonl"
_NO_CURVE = ("step", "summary")


class Metrics:
    """The metrics of a run. The file is what counts: an error of a mirror is said once, and that mirror is off."""

    def __init__(self, run: Path, *, mirrors: Sequence[MirrorName] = (), say: Callable[[str], None]) -> None:
        """Writes nothing yet. MissingExtraError where a mirror's package is not installed."""
        self._run, self._say = run, say
        self._mirrors: dict[str, Mirror] = {name: MIRRORS[name](run) for name in mirrors}

    def log(self, *, step: int, **entry: Any) -> None:
        """Append one line; mirrors take its numbers."""
        path = self._run / METRICS_FILE
        try:
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")
        except OSError as error:
            # A full disk does not say which file.
            error.filename = str(path)
            raise
        if values := scalars(entry):
            self._mirror(lambda mirror: mirror.log(step, values))

    def forget_after(self, step: int) -> None:
        """Drop what a killed run logged beyond its last checkpoint, so that no step stands there twice."""
        file = self._run / METRICS_FILE
        lines = file.read_text().splitlines() if file.is_file() else []
        entries = [(line, _entry(line)) for line in lines]
        kept = [(line, entry) for line, entry in entries if entry is not None and _logged_before(entry, step)]
        if lines:
            durable.replace(file, "".join(f"{line}\n" for line, _ in kept).encode())
        at_step = [scalars(entry) for _, entry in kept if entry["step"] == step]
        standing = {tag: value for values in at_step for tag, value in values.items()}
        self._mirror(lambda mirror: mirror.forget_after(step, standing))

    def close(self, *, failed: bool = False) -> None:
        """Have the mirrors finish; nothing is logged after it. failed: the run ended by an error."""
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
                    f"--report-to {name} is off from here on ({type(error).__name__}: {reason}): training goes on, and "
                    f"{self._run / METRICS_FILE} has all"
                )
                with suppress(Exception):
                    mirror.close(True)


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of an entry by tag: train/loss and train/KIND_loss, validation/loss, replay_error.

    A list is a tag for each place (validation/loss_step_07), a mapping one for each key (validation/loss/NAME). What is
    no number is left out, and so is the summary at the end of a run, which is no point of a curve.
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
        # The last line of a killed run may be torn.
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _logged_before(entry: dict[str, Any], step: int) -> bool:
    return entry["step"] < step or ("validation_loss" in entry and entry["step"] == step)
