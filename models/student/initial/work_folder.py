"""The folder of finished statistics beside a student that is being made; it is deleted when the student is complete."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from secondcast.models.student.folder import INITIAL_FILE, config_of
from secondcast.models.weights.checked_loading import read_tensors
from secondcast.models.weights.files import CheckpointSource
from secondcast.models.weights.mismatch import Shape
from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError, StudentError
from secondcast.storage_schemas.io import durable

_SETTINGS_FILE = "settings.json"
_STUDENT = "student"


class WorkFolder:
    """A hidden folder beside OUT: statistics as safetensors, and the student until it is complete."""

    record_name = INITIAL_FILE

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(f".{out.name}.init-student")
        self._files = set[Path]()

    def check_out(self, asked: Mapping[str, Any]) -> bool:
        """Whether OUT has the student that `asked` describes.

        Raises SettingsError for an OUT with files of another origin, SettingsMismatchError for another initial student.
        """
        if not os.path.lexists(self.out) or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        try:
            made = dict(json.loads((self.out / INITIAL_FILE).read_bytes())["asked"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SettingsError(
                f"{self.out} exists and is not empty, but has no {INITIAL_FILE} of this command: give a new folder"
            ) from error
        for key, value in asked.items():
            if made.get(key) != value:
                raise SettingsMismatchError(
                    f"{self.out} is an initial student made with {key.replace('_', '-')} = {made.get(key)}, not "
                    f"{value}: give the original flags, or a new folder"
                )
        return True

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Create the folder, or open that of an interrupted call, under a lock.

        settings: what the statistics depend on; SettingsMismatchError if they were begun with others.
        """
        begun = config_of(self.path, _SETTINGS_FILE)
        if not begun and self.path.is_dir() and any(self.path.iterdir()):
            raise SettingsError(f"{self.path} has files that this command did not write: move it, or give another OUT")
        with durable.locked(self.path):
            if begun:
                self._check(begun, settings)
            else:
                durable.replace(self.path / _SETTINGS_FILE, json.dumps(settings, indent=1).encode())
            durable.remove_leftovers(self.path)
            yield

    def _check(self, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        for key, value in settings.items():
            if begun.get(key) != value:
                raise SettingsMismatchError(
                    f"{self.path} has statistics of an interrupted call with {key.replace('_', '-')} = "
                    f"{begun.get(key)}, not {value}: give the original flags, or delete it"
                )

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors to NAME.safetensors atomically."""
        found = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        durable.replace(self._file(name), save(found))

    def read(self, name: str, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor] | None:
        """The tensors of NAME.safetensors; None if there is none. StudentError for a damaged one."""
        file = self._file(name)
        if not file.is_file():
            return None
        source = CheckpointSource(where=str(self.path), error=StudentError, again="delete this folder")
        return read_tensors(file, shapes, source, kind="the statistics")

    @contextmanager
    def student(self) -> Iterator[Path]:
        """A folder to write the student to, which becomes OUT at the end; then the statistics are deleted."""
        made = self.path / _STUDENT
        made.mkdir(exist_ok=True)
        for left in made.iterdir():
            left.unlink()
        yield made
        for file in (*made.iterdir(), made):
            durable.sync(file)
        with suppress(FileNotFoundError):
            self.out.rmdir()
        made.rename(self.out)
        durable.sync(self.out.parent)
        for file in (*self._files, self.path / _SETTINGS_FILE):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _file(self, name: str) -> Path:
        file = self.path / f"{name}.safetensors"
        self._files.add(file)
        return file
