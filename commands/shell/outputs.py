"""Files that commands write. What is there, and is not this command's own result, stays unless --overwrite is given."""

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
from secondcast.storage_schemas.schema.manifest import Record

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the pictures that commands write."""
# An ending of letters is that of some kind of file; run.v2 and guidance-3.5 are names of folders.
_OF_A_FILE = re.compile(r"\.[A-Za-z]{2,5}")
RECORD_FILE = "secondcast-files.json"


class Output(Protocol):
    """A file to write; `path` as the user named it."""

    path: Path

    def write(self, data: bytes) -> None:
        """Write it, whole or not at all; SettingsError where that is not possible."""
        ...


class OutputFile:
    """A file by itself. Made before the work begins, so that hours of it do not end with a refusal."""

    def __init__(self, path: Path, named: str, *, replaces: bool) -> None:
        """named: see `open`. replaces: whether what is there now may be replaced."""
        self.path, self._named, self._replaces = path, named, replaces

    @classmethod
    def open(
        cls, path: Path, *, overwrite: bool = False, own: Callable[[bytes], bool] | None = None, named: str = "--out"
    ) -> Self:
        """Check that a file can be written; SettingsError where it cannot, or where another file would be lost.

        overwrite: whether any file may be replaced.
        own: tells from its bytes whether a file is an earlier result of the same command.
        named: what the user gave the file with, for messages.
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
        """See Output. What came there since the work began is not replaced."""
        with _writing(self.path, self._named):
            if _is_stream(self.path):
                self.path.write_bytes(data)
            elif self._replaces:
                durable.replace(_target(self.path), data)
            elif not durable.publish(_target(self.path), data):
                raise SettingsError(f"{self.path} came into being meanwhile, and stays: give another {self._named}")
            self._replaces = True


class _Written(Record):
    """What RECORD_FILE says: checksums of the files that a command wrote into a folder, the last ones of each.

    settings: flags that must be the same when the command is given again.
    """

    format: Literal["secondcast-files"] = "secondcast-files"
    command: str
    settings: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class OutputFolder:
    """A folder of results that is written again when its command is given again, and only those files of it."""

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
        """Make a folder, or take up that of an earlier call.

        names: files that will be written, none of which may be another's.
        overwrite: whether files of others may be replaced. alone: whether a folder that holds other files is refused.
        Raises SettingsError for files of others, SettingsMismatchError for a folder that was begun with other settings.
        """
        check_folder(folder)
        found = _read_record(folder)
        if found is None and alone:
            _check_empty(folder)
        if found is not None and found.command != command:
            raise SettingsError(f"{folder} holds results of `secondcast {found.command}`: give another folder")
        for key, value in (settings or {}).items():
            if found is not None and found.settings.get(key) != value:
                raise SettingsMismatchError(
                    f"{folder} was begun with {key.replace('_', '-')} = {found.settings.get(key)}, you asked for "
                    f"{value}: give the flags of the first time, or another folder"
                )
        written = found or _Written(command=command, settings=settings or {})
        opened = cls(folder, written, overwrite=overwrite)
        for name in names:
            opened._check_own(name)
        opened._record()
        return opened

    def file(self, name: str) -> Output:
        """A file of the folder, to be written."""
        return _FileOf(self, name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the folder, whole or not at all; SettingsError where it is another's."""
        path = self.folder / name
        with _writing(path, "folder"):
            if path.is_file() and path.read_bytes() == data:
                return
            before = self._check_own(name)
            files = {**self._written.files, name: (*before, xxh3_128(data))}
            self._written = self._written.model_copy(update={"files": files})
            # The record first: a kill between the two leaves a file that is known, or none.
            self._record()
            durable.replace(path, data)

    def _check_own(self, name: str) -> tuple[str, ...]:
        path = self.folder / name
        if not os.path.lexists(path):
            return ()
        found = xxh3_128(path.read_bytes()) if path.is_file() else ""
        if found not in self._written.files.get(name, ()) and not (self._overwrite and path.is_file()):
            raise SettingsError(
                f"{path} exists and is not as `secondcast {self._written.command}` wrote it: move it away, or give "
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
    """Whether a path that is no folder yet has the ending of a file."""
    return not path.is_dir() and _OF_A_FILE.fullmatch(path.suffix) is not None


def check_folder_name(folder: Path) -> None:
    """Raise SettingsError for an --out that is named as a file, where a folder is to be made."""
    if is_named_as_a_file(folder):
        raise SettingsError(
            f"--out is {folder}, which is named as a file, and a folder is expected: give {folder.with_suffix('')}"
        )


def check_folder(folder: Path) -> None:
    """Make the folder of --out; SettingsError for the name of a file, where there is one, or where none can be made."""
    check_folder_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--out {folder} cannot be a folder ({error.strerror}): give a new one, or another"
        ) from error


def check_outside(path: Path, cache: str) -> None:
    """Raise SettingsError for an --out among the files of a cache."""
    from secondcast.storage_schemas.io.folders import is_remote
    from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE

    if is_remote(cache) or not (Path(cache) / MANIFEST_FILE).is_file():
        return
    if path.resolve().is_relative_to(Path(cache).resolve()):
        raise SettingsError(
            f"--out {path} lies in the cache {cache}, where `secondcast inspect verify` would call it foreign: give a "
            f"place outside it"
        )


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a text file that the user named by an argument; the same text again is no loss."""
    data = text.encode()
    OutputFile.open(path, overwrite=overwrite, own=lambda found: found == data, named="FILE").write(data)


def picture_bytes(picture: Any, path: Path) -> bytes:
    """A picture as a file of this name."""
    data = io.BytesIO()
    picture.save(data, format={".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"))
    return data.getvalue()


def check_picture(path: Path, flag: str) -> None:
    """Raise SettingsError for a name that is not that of a picture."""
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise SettingsError(f"{flag} is {path}, expected a picture such as {path.stem or 'picture'}.png")


def json_bytes(value: Any) -> bytes:
    """JSON for people."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout, which is written to and cannot be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _target(path: Path) -> Path:
    """Where a link leads: the file is replaced, not the link."""
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
            f"{file} cannot be read ({reason}): it names the results that may be replaced; give another folder"
        ) from error


def _check_empty(folder: Path) -> None:
    foreign = sorted(path.name for path in folder.iterdir() if not durable.is_temporary(path.name))
    if foreign:
        raise SettingsError(
            f"{folder} holds {foreign[0]!r} and {len(foreign) - 1} more, and no {RECORD_FILE}: it was not made by this "
            f"command; give a new or empty folder"
        )
