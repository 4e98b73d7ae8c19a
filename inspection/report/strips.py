"""Film strips of a report: one WebP sheet of decoded latents and predicted clean latents per trajectory."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from secondcast.inspection.images import frame_latents, shown_steps
from secondcast.inspection.report.integrity import Readable
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.recording import Sampling

Why = Literal["hardest", "random", "all"]

# The VAE's last layers in fp32 take more than a gigabyte for an image of 512 x 512.
_PIXELS_TOGETHER = 2**18
# Lossy WebP halves the colour resolution, which spoils small frames: these are lossless, with 32 levels per channel
# (half the bytes of 256). For photographs lossless is eight times larger than lossy.
_LOSSLESS_UP_TO_PX = 48
_LEVELS = 32
_QUALITY = 75
_NEAREST_LEVEL = [round(round(value * (_LEVELS - 1) / 255) * 255 / (_LEVELS - 1)) for value in range(256)]
_LARGEST_WEBP_PX = 16_383


def frame_px(sampling: Sampling, side: int) -> int:
    """Width and height of a frame; small images are not enlarged."""
    return min(side, max(sampling.height, sampling.width))


def check_sheet(sampling: Sampling, *, side: int, frames: int | None) -> None:
    """Raise SettingsError if a sheet is wider than WebP allows."""
    count, width = len(shown_steps(sampling.steps, frames)) + 1, frame_px(sampling, side)
    if count * width > _LARGEST_WEBP_PX:
        raise SettingsError(
            f"{count} frames of {width} pixels are {count * width} pixels wide, WebP allows {_LARGEST_WEBP_PX}: give "
            f"--frame-size {_LARGEST_WEBP_PX // count}, or --num-frames {_LARGEST_WEBP_PX // width - 1}"
        )


def chosen_rows(rows: int, count: int | None, hardness: Mapping[int, float], seed: int) -> list[tuple[int, Why]]:
    """Table rows with film strips, ascending; count None: all.

    Up to half of them are the hardest rows with known hardness, the rest are drawn at random among all others.
    """
    if count is None or count >= rows:
        return [(row, "all") for row in range(rows)]
    hardest = sorted(hardness, key=lambda row: -hardness[row])[: min(count, len(hardness) + 1) // 2]
    others = np.setdiff1d(np.arange(rows), np.array(hardest, dtype=np.int64))
    drawn = np.random.default_rng(seed).choice(others, count - len(hardest), replace=False)
    chosen: dict[int, Why] = {row: "hardest" for row in hardest}
    chosen |= {row: "random" for row in drawn.tolist()}
    return sorted(chosen.items())


@dataclass(frozen=True, kw_only=True)
class StripMaker:
    """Makes the sheets of a cache's trajectories: frames for `steps`, then the final latent."""

    decoder: ImageDecoder
    manifest: Manifest
    steps: Sequence[int]
    side: int

    def sheet(self, trajectory: Trajectory) -> str:
        """A data URI: two rows of frames, latents above predicted clean latents; the final latent is in both."""
        latents, clean = frame_latents(trajectory, self.steps, self.manifest)
        final = trajectory.final_latent_SC.astype(np.float32)
        pictures = self._decoded(np.stack([*latents, final, *clean]))
        columns, px = len(self.steps) + 1, frame_px(self.manifest.sampling, self.side)
        sheet = Image.new("RGB", (columns * px, 2 * px))
        for number, picture_HWC in enumerate([*pictures, pictures[columns - 1]]):
            row, column = divmod(number, columns)
            sheet.paste(_frame(picture_HWC, px), (column * px, row * px))
        return data_uri(sheet, frame_side=px)

    def picture(self, picture_HWC: Array) -> str:
        """A decoded image as a data URI, at frame size."""
        px = frame_px(self.manifest.sampling, self.side)
        return data_uri(_frame(picture_HWC, px), frame_side=px)

    def _decoded(self, latents_NSC: Array) -> list[Array]:
        # In some layers a value that is not finite would spoil the images of the whole batch.
        stack = torch.from_numpy(np.nan_to_num(latents_NSC, posinf=0.0, neginf=0.0))
        together = max(1, _PIXELS_TOGETHER // (self.manifest.sampling.height * self.manifest.sampling.width))
        return [picture for part in stack.split(together) for picture in self.decoder.decode(part)]


def strip_rows(
    readable: Readable,
    maker: StripMaker,
    chosen: Sequence[tuple[int, Why]],
    indices: Sequence[int],
    progress: Progress,
) -> list[dict[str, Any]]:
    """The strips of the readable chosen rows; indices: trajectory index of each row."""
    found = []
    with progress.bar("film strips", total=len(chosen), done=0, unit="trajectories") as bar:
        for row, why in chosen:
            trajectory = readable.trajectory(indices[row])
            if trajectory is not None:
                found.append({"row": row, "why": why, "sheet": maker.sheet(trajectory)})
            bar.advance(1)
    return found


def data_uri(picture: Image.Image, *, frame_side: int) -> str:
    """An image as WebP in a data URI; frame_side: side of its frames in pixels."""
    buffer = io.BytesIO()
    if frame_side <= _LOSSLESS_UP_TO_PX:
        # A higher effort saves a tenth of the bytes and takes 25 times as long.
        picture.point(_NEAREST_LEVEL * 3).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    else:
        picture.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _frame(picture_HWC: Array, px: int) -> Image.Image:
    """Fit an image into a square frame."""
    picture = Image.fromarray(picture_HWC)
    picture.thumbnail((px, px), Image.Resampling.LANCZOS)
    if picture.size == (px, px):
        return picture
    frame = Image.new("RGB", (px, px))
    frame.paste(picture, ((px - picture.width) // 2, (px - picture.height) // 2))
    return frame
