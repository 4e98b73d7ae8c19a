"""Files that commands write. Existing files that are not results of the same command are kept unless --overwrite."""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal, Protocol, Self

import typer
from pydantic import Field, ValidationError

from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.schema.json_files import Record

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of the pictures that commands write."""
# A suffix of letters denotes a file; run.v2 and guidance-3.5 are folder names.
_OF_A_FILE = re.compile(r"\.[A-Za-z]{2,5}")
RECORD_FILE = "secondcast-files.json"


class Output(Protocol):
    """A file to write; `path` as the user named it."""

    path: Path

    def write(self, data: bytes) -> None:
        """Write the file atomically; SettingsError if that is not possible."""
        ...


class OutputFile:
    """A single file, opened before the work starts, so that an error does not come after hours."""

    def __init__(self, path: Path, named: str, *, replaces: bool) -> None:
        """named: see `open`. replaces: whether an existing file may be replaced."""
        self.path, self._named, self._replaces = path, named, replaces

    @classmethod
    def open(
        cls, path: Path, *, overwrite: bool = False, own: Callable[[bytes], bool] | None = None, named: str = "--out"
    ) -> Self:
        """Check that a file can be written; SettingsError if it cannot, or if another file would be lost.

        overwrite: whether any file may be replaced.
        own: whether these bytes are an earlier result of the same command.
        named: the flag or argument that named the file, for messages.
        """
        if _is_stream(path):
            return cls(path, named, replaces=True)
        with _writing(path, named):
            target = _target(path)
            there = os.path.lexists(target)
            if target.is_dir():
                raise IsADirectoryError(EISDIR, "Is a directory")
            if there and not overwrite and not (own is not None and own(target.read_bytes())):
                raise SettingsError(
                    f"{path} exists and would be lost: give another {named}, or --overwrite to replace it"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=target.parent):
                pass
        return cls(path, named, replaces=there)

    def write(self, data: bytes) -> None:
        """See Output. A file created since `open` is not replaced."""
        with _writing(self.path, self._named):
            if _is_stream(self.path):
                self.path.write_bytes(data)
            elif self._replaces:
                durable.replace(_target(self.path), data)
            elif not durable.publish(_target(self.path), data):
                raise SettingsError(f"{self.path} was created meanwhile and is kept: give another {self._named}")
            self._replaces = True


class _Written(Record):
    """Contents of RECORD_FILE: the last checksums of each file that a command wrote into a folder.

    settings: flags that must not change when the command is run again.
    """

    format: Literal["secondcast-files"] = "secondcast-files"
    command: str
    settings: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class OutputFolder:
    """A folder of results; running the command again replaces its own files only."""

    def __init__(self, folder: Path, written: _Written, *, overwrite: bool) -> None:
        """See `open`."""
        self.folder, self._written, self._overwrite = folder, written, overwrite

    @classmethod
    def open(
        cls,
        folder: Path,
        command: str,
        names: Iterable[str],
        *,
        settings: dict[str, Any] | None = None,
        overwrite: bool = False,
        alone: bool = False,
    ) -> Self:
        """Create a folder, or reopen that of an earlier call.

        names: files that will be written.
        overwrite: whether foreign files may be replaced.
        alone: whether a folder that holds other files is refused.

        Raises SettingsError for foreign files, SettingsMismatchError for a folder started with other settings.
        """
        check_folder(folder)
        found = _read_record(folder)
        if found is None and alone:
            _check_empty(folder)
        if found is not None and found.command != command:
            raise SettingsError(f"{folder} has results of `secondcast {found.command}`: give another folder")
        for key, value in (settings or {}).items():
            if found is not None and found.settings.get(key) != value:
                raise SettingsMismatchError(
                    f"{folder} was started with {key.replace('_', '-')} = {found.settings.get(key)}, not "
                    f"{value}: give the original flags, or another folder"
                )
        written = found or _Written(command=command, settings=settings or {})
        opened = cls(folder, written, overwrite=overwrite)
        for name in names:
            opened._check_own(name)
        opened._record()
        return opened

    def file(self, name: str) -> Output:
        """A file of the folder, for writing."""
        return _FileOf(self, name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the folder atomically; SettingsError if a foreign file is there."""
        path = self.folder / name
        with _writing(path, "folder"):
            if path.is_file() and path.read_bytes() == data:
                return
            before = self._check_own(name)
            files = {**self._written.files, name: (*before, xxh3_128(data))}
            self._written = self._written.model_copy(update={"files": files})
            # The record first: a kill between the two leaves a recorded file, or none.
            self._record()
            durable.replace(path, data)

    def remove(self, name: str) -> None:
        """Remove what an earlier call wrote; any other file stays, also with --overwrite."""
        path = self.folder / name
        with _writing(path, "folder"):
            if path.is_file() and xxh3_128(path.read_bytes()) in self._written.files.get(name, ()):
                path.unlink()

    def _check_own(self, name: str) -> tuple[str, ...]:
        path = self.folder / name
        if not os.path.lexists(path):
            return ()
        found = xxh3_128(path.read_bytes()) if path.is_file() else ""
        if found not in self._written.files.get(name, ()) and not (self._overwrite and path.is_file()):
            raise SettingsError(
                f"{path} exists and differs from what `secondcast {self._written.command}` wrote: move it, or give "
                f"another folder"
            )
        return (found,)

    def _record(self) -> None:
        data = (self._written.model_dump_json(indent=1) + "\n").encode()
        with _writing(self.folder / RECORD_FILE, "folder"):
            durable.replace(self.folder / RECORD_FILE, data)


class _FileOf:
    def __init__(self, folder: OutputFolder, name: str) -> None:
        self._folder, self._name, self.path = folder, name, folder.folder / name

    def write(self, data: bytes) -> None:
        """See Output."""
        self._folder.write(self._name, data)


def is_named_as_a_file(path: Path) -> bool:
    """Whether a path that is not a folder has the suffix of a file."""
    return not path.is_dir() and _OF_A_FILE.fullmatch(path.suffix) is not None


def check_folder_name(folder: Path) -> None:
    """Raise SettingsError for an --out that is named like a file, where a folder is expected."""
    if is_named_as_a_file(folder):
        raise SettingsError(
            f"--out is {folder}, which is named like a file, expected a folder: give {folder.with_suffix('')}"
        )


def check_folder(folder: Path) -> None:
    """Create the folder of --out; SettingsError for the name of a file, or if the folder cannot be created."""
    check_folder_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {folder} cannot be created as a folder ({error.strerror}): give another") from error


def check_outside(path: Path, cache: str) -> None:
    """Raise SettingsError for an --out among the files of a cache."""
    from secondcast.storage_schemas.io.folders import is_remote
    from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE

    if is_remote(cache) or not (Path(cache) / MANIFEST_FILE).is_file():
        return
    if path.resolve().is_relative_to(Path(cache).resolve()):
        raise SettingsError(
            f"--out {path} is inside the cache {cache}, where `secondcast inspect verify` would report it as foreign: "
            f"give a path outside it"
        )


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a text file named by an argument; a file with the same text may be replaced."""
    data = text.encode()
    OutputFile.open(path, overwrite=overwrite, own=lambda found: found == data, named="FILE").write(data)


def picture_bytes(picture: Any, path: Path) -> bytes:
    """A picture encoded in the format of this file name."""
    data = io.BytesIO()
    picture.save(data, format={".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"))
    return data.getvalue()


def check_picture(path: Path, flag: str) -> None:
    """Raise SettingsError for a file name without a picture suffix."""
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise SettingsError(f"{flag} is {path}, expected a picture such as {path.stem or 'picture'}.png")


def json_bytes(value: Any) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout, which can be written to but not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _target(path: Path) -> Path:
    """The target of a link: the file is replaced, not the link."""
    return Path(os.path.realpath(path))


@contextmanager
def _writing(path: Path, named: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}): give another {named}") from error


def _read_record(folder: Path) -> _Written | None:
    file = folder / RECORD_FILE
    try:
        return _Written.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not what this version writes"
        raise SettingsError(
            f"{file} cannot be read ({reason}), and it lists the results that may be replaced: give another folder"
        ) from error


def _check_empty(folder: Path) -> None:
    foreign = sorted(path.name for path in folder.iterdir() if not durable.is_temporary(path.name))
    if foreign:
        raise SettingsError(
            f"{folder} has {foreign[0]!r} and {len(foreign) - 1} more, but no {RECORD_FILE}, so this command did not "
            f"create it: give a new or empty folder"
        )
