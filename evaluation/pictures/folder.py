"""A folder of generated images: their settings, a PNG per prompt, and an index for scoring."""

import io
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

from PIL import Image
from pydantic import Field

from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.flags import Flags
from secondcast.storage_schemas.schema.manifest import Dtype, Pooled, Quantization, Record

SETTINGS_FILE = "generate.json"
INDEX_FILE = "index.jsonl"
_LONGEST_SLUG = 60


class PictureSettings(Flags):
    """Every setting that affects the images of a folder.

    student, teacher: digests of the weights, for a student of all its files.
    guidance: None where the backbone takes none. pooled: the pooled text input.
    lora: sha256 of its file, and its scale.
    """

    student: str
    teacher: str
    text_length: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    steps: int = Field(ge=1)
    schedule: Literal["diffusers"]
    guidance: float | None = Field(ge=0, le=1e6)
    seed: int = Field(ge=0, lt=2**63)
    dtype: Dtype
    pooled: Pooled
    # Folders of earlier versions do not state it.
    quantize: Quantization = "none"
    lora: tuple[str, float] | None = None


class IndexEntry(Record):
    """One line of the index; `file` is relative to the folder."""

    number: int
    prompt: str
    file: str
    seed: int
    guidance: float | None


class PictureFolder:
    """Images of a list of prompts; existing ones are kept."""

    def __init__(self, folder: Path, settings: PictureSettings, prompts: Sequence[str]) -> None:
        self.folder, self.settings, self.prompts = folder, settings, prompts
        self._entries: dict[int, IndexEntry] = {}

    @classmethod
    def open(
        cls, folder: Path, settings: PictureSettings, prompts: Sequence[str], *, earlier_digest: str | None = None
    ) -> Self:
        """Create a new folder or resume one.

        earlier_digest: digest of the same student in earlier versions, accepted as equal.

        Raises SettingsMismatchError for images with other settings or prompts, SettingsError for other files.
        """
        opened = cls(folder, settings, prompts)
        file = folder / SETTINGS_FILE
        if file.is_file():
            opened._check_same_settings(file, earlier_digest)
            opened._read_index()
        elif folder.is_file():
            raise SettingsError(f"{folder} is a file, expected a folder for images: give another --out")
        elif folder.exists() and any(not durable.is_temporary(file.name) for file in folder.iterdir()):
            raise SettingsError(f"{folder} has other files and no {SETTINGS_FILE}: give a new folder with --out")
        else:
            durable.replace(file, (settings.model_dump_json(indent=1) + "\n").encode())
        durable.remove_leftovers(folder)
        opened._write_index()
        return opened

    @property
    def missing(self) -> list[int]:
        """Numbers of the prompts without an image."""
        return [number for number in range(len(self.prompts)) if number not in self._entries]

    def add(self, numbers: Iterable[int], images_BHWC: Array) -> int:
        """Write the missing images among these atomically; return their number."""
        lines = []
        for number, image_HWC in zip(numbers, images_BHWC, strict=True):
            if number in self._entries:
                continue
            entry = self._entry(number)
            data = io.BytesIO()
            Image.fromarray(image_HWC).save(data, format="PNG")
            durable.replace(self.folder / entry.file, data.getbuffer())
            self._entries[number] = entry
            lines.append(_line(entry))
        with (self.folder / INDEX_FILE).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        return len(lines)

    def finish(self) -> None:
        """Sort the index by prompt number."""
        self._write_index()

    def _entry(self, number: int) -> IndexEntry:
        prompt = self.prompts[number]
        return IndexEntry(
            number=number,
            prompt=prompt,
            file=picture_name(number, prompt),
            seed=self.settings.seed,
            guidance=self.settings.guidance,
        )

    def _check_same_settings(self, file: Path, earlier_digest: str | None) -> None:
        try:
            was = PictureSettings.model_validate_json(file.read_bytes()).json_value()
        except ValueError as error:
            raise SettingsError(
                f"{file} cannot be read: it was not written by this version; give another --out"
            ) from error
        now = self.settings.json_value()
        if was["student"] == earlier_digest:
            was["student"] = now["student"]
        for key in was:
            if was[key] != now[key]:
                raise SettingsMismatchError(
                    f"{self.folder} has images made with {key.replace('_', '-')} = {was[key]}, requested "
                    f"{now[key]}: images of both must not be mixed; give another --out"
                )

    def _read_index(self) -> None:
        index = self.folder / INDEX_FILE
        for line in index.read_bytes().split(b"\n") if index.is_file() else ():
            try:
                entry = IndexEntry.model_validate_json(line)
            except ValueError:
                # The incomplete last line of an index whose writer was killed.
                continue
            number = entry.number
            if number < len(self.prompts) and entry.prompt != self.prompts[number]:
                raise SettingsMismatchError(
                    f"{self.folder} has prompt {number} = {entry.prompt!r}, requested {self.prompts[number]!r}: "
                    f"images are numbered by prompt; give the prompts in the same order, or another --out"
                )
            if entry.file == picture_name(number, entry.prompt) and (self.folder / entry.file).is_file():
                self._entries[number] = entry

    def _write_index(self) -> None:
        text = "".join(_line(self._entries[number]) for number in sorted(self._entries))
        durable.replace(self.folder / INDEX_FILE, text.encode())


def picture_name(number: int, prompt: str) -> str:
    """File name of an image: its number and the shortened ASCII letters and digits of the prompt."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", plain))[:_LONGEST_SLUG].strip("-")
    return f"{number:06d}-{slug}.png" if slug else f"{number:06d}.png"


def _line(entry: IndexEntry) -> str:
    return json.dumps(entry.json_value(), ensure_ascii=False) + "\n"
