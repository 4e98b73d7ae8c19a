"""`inspect images`: film strips of trajectories, decoded with the teacher's VAE only."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from secondcast.evaluation.pictures.picture import enlarged
from secondcast.inspection.sheet import GREY, LINE, font, lines_of
from secondcast.models.families.registry import family_named
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.image_decoder import ImageDecoder, load_recorded_decoder
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import Manifest

SIDE = 96
_GAP = 4
_LEFT = 90
_TITLE = 22
_TITLE_FONT, _SMALL_FONT = 13, 11


def each_film_strip(
    cache: Cache,
    teacher: TeacherFolder,
    indices: Sequence[int],
    steps: Sequence[int],
    *,
    device: torch.device,
    side: int = SIDE,
) -> Iterator[tuple[Trajectory, Image.Image]]:
    """Per trajectory a row of latents x_k and one of predicted clean latents at these steps, then the final latent.

    side: frame size in pixels.
    """
    decoder = load_recorded_decoder(teacher, cache.manifest.sampling, device)
    for index in indices:
        trajectory = cache.trajectory(index)
        yield trajectory, _strip(cache, decoder, trajectory, steps, side)


def shown_steps(steps: int, frames: int | None) -> list[int]:
    """`count` of the steps, spread evenly from the first to the last; None: all."""
    return sorted({round(step) for step in np.linspace(0, steps - 1, min(frames or steps, steps)).tolist()})


def frame_latents(trajectory: Trajectory, steps: Sequence[int], manifest: Manifest) -> tuple[list[Array], list[Array]]:
    """Latents x_k and predicted clean latents of these steps, [S, C] in fp32 each."""
    family, sigmas = family_named(manifest.teacher.family), manifest.sampling.sigmas
    latents_KSC, velocity_KSC = trajectory.hidden_states_KSC, trajectory.velocity_KSC
    # `inspect show` and the report count values that are not finite.
    with np.errstate(invalid="ignore", over="ignore"):
        clean = [family.predicted_clean_latent(latents_KSC[k], velocity_KSC[k], sigmas[k]) for k in steps]
    return [latents_KSC[k].astype(np.float32) for k in steps], clean


def _strip(cache: Cache, decoder: ImageDecoder, trajectory: Trajectory, shown: Sequence[int], side: int) -> Image.Image:
    count = len(shown) + 1
    width = _LEFT + count * (side + _GAP)
    guidance = "" if trajectory.guidance is None else f", guidance {trajectory.guidance:g}"
    sample = f", sample {trajectory.sample_index}" if trajectory.sample_index else ""
    title = f"{trajectory.index}: {cache.prompts[trajectory.prompt].text}{guidance}{sample}"
    titles = lines_of(title, width - 8, _TITLE_FONT)
    top = _TITLE + LINE * (len(titles) - 1)
    strip = Image.new("RGB", (width, top + 16 + 2 * (side + _GAP) + 8), "white")
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(titles):
        draw.text((4, 3 + LINE * number), line, fill="black", font=font(_TITLE_FONT))
    sigmas = cache.manifest.sampling.sigmas
    names = [*(f"{k}: sigma {sigmas[k]:.2f}" for k in shown), "final"]
    for column, name in enumerate(names):
        draw.text((_LEFT + column * (side + _GAP), top), name, fill=GREY, font=font(_SMALL_FONT))
    for row, images in enumerate(_frames(decoder, trajectory, shown, cache.manifest)):
        for column, image_HWC in enumerate(images):
            strip.paste(enlarged(image_HWC, side), (_LEFT + column * (side + _GAP), top + 16 + row * (side + _GAP)))
    for row, name in enumerate(("latent", "predicted\nclean")):
        place = (4, top + 16 + row * (side + _GAP) + side // 2 - 14)
        draw.multiline_text(place, name, fill=GREY, font=font(_SMALL_FONT))
    return strip


def _frames(
    decoder: ImageDecoder, trajectory: Trajectory, shown: Sequence[int], manifest: Manifest
) -> tuple[list[Array], list[Array]]:
    latents, clean = frame_latents(trajectory, shown, manifest)
    final = _decoded(decoder, trajectory.final_latent_SC.astype(np.float32))
    return (
        [*(_decoded(decoder, latent) for latent in latents), final],
        [*(_decoded(decoder, latent) for latent in clean), final],
    )


def _decoded(decoder: ImageDecoder, latent_SC: Array) -> Array:
    # One at a time: a VAE in fp32 takes gigabytes per large image.
    image_HWC: Array = decoder.decode(torch.from_numpy(latent_SC)[None])[0]
    return image_HWC
