"""Control images of a ControlNet: one for each image to be generated, in files named as `generate` names its own."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from PIL import Image

from secondcast.evaluation.pictures.folder import picture_name
from secondcast.evaluation.pictures.rgb import in_rgb
from secondcast.models.geometry import Geometry
from secondcast.storage_schemas.errors import ImagesError, reason
from secondcast.storage_schemas.io.digests import xxh3_128


@dataclass(frozen=True, kw_only=True)
class ControlImages:
    """Files of control images and their digests, by prompt number and sample."""

    files: dict[tuple[int, int], Path]
    digests: dict[tuple[int, int], str]

    @classmethod
    def read(cls, folder: Path, prompts: Sequence[str], *, samples: int, geometry: Geometry) -> Self:
        """Find the control image of every image, and check that it has the proportions of the geometry.

        The first of these files: NUMBER-PROMPT_SAMPLE.png as `generate` names it, the same of the first sample,
        NUMBER.png.

        Raises ImagesError.
        """
        if not folder.is_dir():
            raise ImagesError(f"no folder {folder}: expected --control-images with a control image for each prompt")
        files = {
            (number, sample): _file(folder, number, prompt, sample)
            for number, prompt in enumerate(prompts)
            for sample in range(samples)
        }
        by_file = {file: _checked_digest(file, geometry) for file in dict.fromkeys(files.values())}
        return cls(files=files, digests={place: by_file[file] for place, file in files.items()})

    def images(self, numbers: Sequence[int], sample: int) -> list[Image.Image]:
        """The control images of a batch, in RGB. Raises ImagesError for one that is not as it was read before."""
        return [self._image((number, sample)) for number in numbers]

    def _image(self, place: tuple[int, int]) -> Image.Image:
        file = self.files[place]
        data = _bytes(file)
        if xxh3_128(data) != self.digests[place]:
            raise ImagesError(f"{file} has changed since this command began: run it again")
        return _opened(data, file)


def _file(folder: Path, number: int, prompt: str, sample: int) -> Path:
    names = [picture_name(number, prompt, sample), picture_name(number, prompt), picture_name(number, "")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ImagesError(
        f"{folder} has no control image of prompt {number}: expected {names[1]} or {names[2]}, the names by which "
        f"`secondcast generate` writes the images of these prompts"
    )


def _checked_digest(file: Path, geometry: Geometry) -> str:
    data = _bytes(file)
    width, height = _opened(data, file).size
    if width * geometry.height != height * geometry.width:
        raise ImagesError(
            f"{file} is {width} x {height} px, expected the proportions of the images, {geometry.width} x "
            f"{geometry.height} px: resizing would distort it; crop it, or give --height and --width"
        )
    return xxh3_128(data)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ImagesError(f"{file} cannot be read ({reason(error)}): make it again") from error


def _opened(data: bytes, file: Path) -> Image.Image:
    try:
        return in_rgb(Image.open(io.BytesIO(data)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImagesError(f"{file} cannot be read as an image ({reason(error)}): make it again") from error
