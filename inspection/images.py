"""`inspect images`: film strips of trajectories, decoded by the teacher's VAE, loaded alone."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from evaluation.picture import enlarged
from models.geometry import recorded_geometry
from models.image_decoder import ImageDecoder
from models.teacher_folder import TeacherFolder
from storage_schemas.derivation import predicted_clean_latent
from storage_schemas.reader import Cache

_SIDE = 96
_GAP = 4
_LEFT = 90
_TITLE = 22


def film_strips(
    cache: Cache, teacher: TeacherFolder, indices: Sequence[int], *, frames: int, device: torch.device
) -> Image.Image:
    """A contact sheet: per trajectory a row of latents x_k and one of predicted clean latents, decoded.

    frames: how many steps are shown, spread evenly from the first to the last; then the final latent.
    """
    decoder = ImageDecoder.load(teacher, recorded_geometry(cache.manifest.sampling), device=device)
    shown = _shown_steps(cache.manifest.sampling.steps, frames)
    strips = [_strip(cache, decoder, index, shown) for index in indices]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _shown_steps(steps: int, frames: int) -> list[int]:
    return sorted({round(position) for position in np.linspace(0, steps - 1, min(frames, steps))})


def _strip(cache: Cache, decoder: ImageDecoder, index: int, shown: list[int]) -> Image.Image:
    trajectory = cache.trajectory(index)
    sampling = cache.manifest.sampling
    latents = [trajectory.hidden_states_KSC[k].astype(np.float32) for k in shown]
    clean = [
        predicted_clean_latent(trajectory.hidden_states_KSC[k], trajectory.velocity_KSC[k], sampling.sigmas[k])
        for k in shown
    ]
    final = trajectory.final_latent_SC.astype(np.float32)
    stack = np.stack([*latents, final, *clean, final])
    images = decoder.decode(torch.from_numpy(stack))
    count = len(shown) + 1
    width = _LEFT + count * (_SIDE + _GAP)
    strip = Image.new("RGB", (width, _TITLE + 16 + 2 * (_SIDE + _GAP) + 8), "white")
    draw = ImageDraw.Draw(strip)
    font, small = ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    guidance = "" if trajectory.guidance is None else f"  guidance {trajectory.guidance:g}"
    title = f"{index}: {cache.prompts[trajectory.prompt].text}{guidance}"
    draw.text((4, 3), title, fill="black", font=font)
    for column in range(count):
        x = _LEFT + column * (_SIDE + _GAP)
        name = f"step {shown[column]}, {sampling.sigmas[shown[column]]:.2f}" if column < len(shown) else "final"
        draw.text((x, _TITLE), name, fill="#555555", font=small)
        for row in range(2):
            picture = enlarged(images[row * count + column], _SIDE)
            strip.paste(picture, (x, _TITLE + 16 + row * (_SIDE + _GAP)))
    for row, name in enumerate(("latent", "predicted\nclean")):
        draw.multiline_text((4, _TITLE + 50 + row * (_SIDE + _GAP)), name, fill="#555555", font=small)
    return strip
