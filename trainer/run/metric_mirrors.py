"""Metric loggers in addition to metrics.jsonl: TensorBoard, Weights & Biases."""

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from secondcast.storage_schemas.errors import MissingExtraError, SettingsError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.schema.fields import Array

MirrorName = Literal["tensorboard", "wandb"]

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_id.txt"
# A killed run loses at most this much of its curves.
_FLUSH_SECONDS = 10
_STEP = "optimizer_step"


class Mirror(Protocol):
    """Logs numbers and pictures by tag and optimizer step. An error turns it off."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        ...

    def log_picture(self, step: int, tag: str, picture_HWC: Array) -> None:
        """Log a uint8 picture of a step."""
        ...

    def truncate_after(self, step: int, standing: Mapping[str, float]) -> None:
        """Discard everything logged from `step` on, where a run resumes, except `standing`, of `step` itself."""
        ...

    def close(self, failed: bool) -> None:
        """Flush and close."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        """MissingExtraError without tensorboard."""
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._folder = run / TENSORBOARD_FOLDER
        self._purge_step: int | None = None
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Mirror."""
        for tag, value in values.items():
            self._opened().add_scalar(tag, value, step)

    def log_picture(self, step: int, tag: str, picture_HWC: Array) -> None:
        """See Mirror."""
        self._opened().add_image(tag, picture_HWC, step, dataformats="HWC")

    def truncate_after(self, step: int, standing: Mapping[str, float]) -> None:
        """See Mirror: TensorBoard drops values of older event files from the purge step on, inclusive."""
        self.close(failed=False)
        self._purge_step = step
        self.log(step, standing)

    def close(self, failed: bool) -> None:
        """See Mirror."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, flush_secs=_FLUSH_SECONDS)
        return self._writer


class Wandb:
    """A run of Weights & Biases, continued on resume; WANDB_... variables set project and mode.

    Its own step counts log calls, so curves are drawn over optimizer_step. Values that a killed run logged after its
    last checkpoint remain, so those steps appear twice.
    """

    def __init__(self, run: Path) -> None:
        """MissingExtraError without wandb."""
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise _missing("wandb") from error
        self._folder = run
        self._run: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Mirror."""
        self._opened().log({**values, _STEP: step})

    def log_picture(self, step: int, tag: str, picture_HWC: Array) -> None:
        """See Mirror."""
        import wandb

        self._opened().log({tag: wandb.Image(picture_HWC), _STEP: step})

    def truncate_after(self, step: int, standing: Mapping[str, float]) -> None:
        """See Mirror: logged values cannot be deleted."""

    def close(self, failed: bool) -> None:
        """See Mirror."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None

    def _opened(self) -> Any:
        if self._run is None:
            self._run = self._begin()
        return self._run

    def _begin(self) -> Any:
        import wandb

        config = self._folder / "config.json"
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "secondcast"),
            name=self._folder.resolve().name,
            dir=str(self._folder),
            id=self._id(),
            resume="allow",
            config=json.loads(config.read_bytes()) if config.is_file() else None,
            # The console output is a progress bar.
            settings=wandb.Settings(console="off"),
        )
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP)
        return run

    def _id(self) -> str:
        file = self._folder / WANDB_ID_FILE
        if not file.is_file():
            durable.publish(file, f"{secrets.token_hex(6)}\n".encode())
        return file.read_text().strip()


def _missing(name: MirrorName) -> MissingExtraError:
    return MissingExtraError(
        f"--report-to {name} needs {name}, which is not installed: pip install 'secondcast[{name}]'"
    )


MIRRORS: dict[MirrorName, Callable[[Path], Mirror]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def mirror_names(given: Sequence[str]) -> list[MirrorName]:
    """Names of mirrors, each once; SettingsError for an unknown one."""
    if unknown := [name for name in given if name not in MIRRORS]:
        raise SettingsError(f"--report-to is {unknown[0]!r}, expected {' or '.join(MIRRORS)}")
    return [name for name in MIRRORS if name in given]
