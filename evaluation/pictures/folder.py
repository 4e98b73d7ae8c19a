"""A folder of generated images: their settings, PNGs of each prompt, and an index for scoring."""

import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from PIL import Image
from pydantic import Field

from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.flags import Flags
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.recording import Dtype, Pooled, Quantization

SETTINGS_FILE = "generate.json"
INDEX_FILE = "index.jsonl"
_LONGEST_SLUG = 60


class PictureSettings(Flags):
    """Every setting that affects the images of a folder.

    student, teacher: digests of the weights, for a student of all its files.
    guidance: None where the backbone takes none. pooled: the pooled text input.
    lora: sha256 of its file, and its scale. controlnet: digest of its folder, and its scale.
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
    controlnet: tuple[str, float] | None = None


class IndexEntry(Record):
    """One line of the index; `file` is relative to the folder.

    sample: number of the image among those of its prompt. categories: source names of the prompt.
    control: digest of its control image.
    """

    number: int
    prompt: str
    file: str
    seed: int
    guidance: float | None
    # These are written only if not empty: earlier indices do not have them.
    sample: int = Field(default=0, ge=0)
    categories: tuple[str, ...] = ()
    control: str = ""


class PictureFolder:
    """Images of a list of prompts; existing ones are kept."""

    def __init__(
        self,
        folder: Path,
        settings: PictureSettings,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        categories: Sequence[tuple[str, ...]] | None = None,
        controls: Mapping[tuple[int, int], str] | None = None,
    ) -> None:
        self.folder, self.settings, self.prompts, self.samples = folder, settings, prompts, samples
        self._categories = categories if categories is not None else [()] * len(prompts)
        self._controls = controls or {}
        self._entries: dict[tuple[int, int], IndexEntry] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: PictureSettings,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        categories: Sequence[tuple[str, ...]] | None = None,
        controls: Mapping[tuple[int, int], str] | None = None,
        earlier_digest: str | None = None,
    ) -> Self:
        """Create a new folder or resume one, possibly with more prompts or samples.

        samples: images per prompt. categories: source names of each prompt.
        controls: digests of control images by number and sample; None without a ControlNet.
        earlier_digest: digest of the same student in earlier versions, accepted as equal.

        Raises SettingsMismatchError for images with other settings or prompts, SettingsError for other files.
        """
        opened = cls(folder, settings, prompts, samples=samples, categories=categories, controls=controls)
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
        """Numbers of the prompts that lack an image."""
        return [number for number in range(len(self.prompts)) if self.missing_samples([number])]

    @property
    def missing_count(self) -> int:
        """Number of missing images."""
        return sum(len(self.missing_samples([number])) for number in self.missing)

    def missing_samples(self, numbers: Sequence[int]) -> list[int]:
        """The samples that any of these prompts lacks."""
        return [
            sample for sample in range(self.samples) if any((number, sample) not in self._entries for number in numbers)
        ]

    def add(self, numbers: Iterable[int], images_BHWC: Array, *, sample: int = 0) -> int:
        """Write the missing images among these, one sample of each prompt, atomically; return their number."""
        lines = []
        for number, image_HWC in zip(numbers, images_BHWC, strict=True):
            if (number, sample) in self._entries:
                continue
            entry = self._entry(number, sample)
            data = io.BytesIO()
            Image.fromarray(image_HWC).save(data, format="PNG")
            durable.replace(self.folder / entry.file, data.getbuffer())
            self._entries[number, sample] = entry
            lines.append(_line(entry))
        with (self.folder / INDEX_FILE).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        return len(lines)

    def finish(self) -> None:
        """Sort the index by prompt number and sample."""
        self._write_index()

    def _entry(self, number: int, sample: int) -> IndexEntry:
        prompt = self.prompts[number]
        return IndexEntry(
            number=number,
            prompt=prompt,
            file=picture_name(number, prompt, sample),
            seed=self.settings.seed,
            guidance=self.settings.guidance,
            sample=sample,
            categories=self._categories[number],
            control=self._controls.get((number, sample), ""),
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
            control = self._controls.get((number, entry.sample), entry.control)
            if entry.control != control:
                raise SettingsMismatchError(
                    f"{self.folder} has {entry.file} made with the control image {entry.control[:12]}, requested "
                    f"{control[:12]}: images of both must not be mixed; give another --out"
                )
            if number < len(self.prompts) and self._categories[number]:
                entry = entry.model_copy(update={"categories": self._categories[number]})
            name = picture_name(number, entry.prompt, entry.sample)
            if entry.file == name and (self.folder / name).is_file():
                self._entries[number, entry.sample] = entry

    def _write_index(self) -> None:
        text = "".join(_line(self._entries[place]) for place in sorted(self._entries))
        durable.replace(self.folder / INDEX_FILE, text.encode())


def picture_name(number: int, prompt: str, sample: int = 0) -> str:
    """File name of an image: its number, the shortened ASCII letters and digits of the prompt, and later samples."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", plain))[:_LONGEST_SLUG].strip("-")
    name = f"{number:06d}-{slug}" if slug else f"{number:06d}"
    return f"{name}_{sample}.png" if sample else f"{name}.png"


def _line(entry: IndexEntry) -> str:
    value: dict[str, Any] = entry.json_value()
    for optional in ("sample", "categories", "control"):
        if not value[optional]:
            del value[optional]
    return json.dumps(value, ensure_ascii=False) + "\n"
