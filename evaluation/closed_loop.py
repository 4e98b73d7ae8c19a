"""Closed loop: a text encoder leads the whole sampling from the cached noise, and the VAE decodes where it ends."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from evaluation.held_out import HeldOut
from evaluation.picture_distances import psnr_db, ssim
from evaluation.replaying import Conditions, EmbedPrompts, filled_batches, on_device
from evaluation.results import Led
from models.backbone import FluxBackbone
from models.image_decoder import ImageDecoder
from models.sampler import sample
from models.schedule import Schedule
from storage_schemas.errors import NonFinite
from storage_schemas.fields import Array
from storage_schemas.progress import Progress
from storage_schemas.reader import Cache

Lpips = Callable[[Array, Array], float]
TakePicture = Callable[[str, HeldOut, Array], None]
"""Who leads, where, and the uint8 picture [H, W, 3] that the sampling ended in."""


@torch.no_grad()
def closed_loop(
    cache: Cache,
    backbone: FluxBackbone,
    decoder: ImageDecoder,
    leaders: Mapping[str, EmbedPrompts],
    trajectories: Sequence[HeldOut],
    *,
    lpips: Lpips | None,
    batch_size: int,
    progress: Progress,
    take_picture: TakePicture | None = None,
) -> dict[str, Led]:
    """Where each text encoder leads, by its name, against where these trajectories ended.

    Schedule, guidance and pooled vectors are the recorded ones; every call of the backbone is of batch_size rows.
    take_picture is given each picture of each leader.
    """
    found: dict[str, list[_Distances]] = {name: [] for name in leaders}
    sampling = cache.manifest.sampling
    schedule = Schedule(sigmas=sampling.sigmas, timesteps=sampling.timesteps)
    total = len(trajectories) * len(leaders)
    with progress.bar("closed loop", total=total, done=0, unit="images") as bar:
        for batch, kept in filled_batches(trajectories, batch_size):
            distinct = {chosen.index: cache.trajectory(chosen.index) for chosen in batch}
            recorded = [distinct[chosen.index] for chosen in batch]
            noise_BSC = on_device([trajectory.noise_SC for trajectory in recorded], backbone.device)
            wanted_BSC = on_device([trajectory.final_latent_SC for trajectory in recorded], backbone.device)
            conditions = Conditions.of(cache, recorded, backbone)
            pictures = _decoded(decoder, wanted_BSC[:kept])
            for name, embed in leaders.items():
                text_BTD = embed([chosen.prompt for chosen in batch]).to(backbone.dtype)
                final_BSC = _led(backbone, schedule, noise_BSC, text_BTD, conditions)[:kept]
                fractions = _latent_fractions(final_BSC, wanted_BSC[:kept], name, batch)
                led = _decoded(decoder, final_BSC)
                for fraction, ours, theirs in zip(fractions, led, pictures, strict=True):
                    found[name].append(_distances(fraction, ours, theirs, lpips))
                if take_picture is not None:
                    for chosen, picture_HWC in zip(batch[:kept], led, strict=True):
                        take_picture(name, chosen, picture_HWC)
                bar.advance(kept)
    return {name: _columns(rows, measured=lpips is not None) for name, rows in found.items()}


def _led(
    backbone: FluxBackbone,
    schedule: Schedule,
    noise_BSC: torch.Tensor,
    text_BTD: torch.Tensor,
    conditions: Conditions,
) -> torch.Tensor:
    def predict(x_BSC: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        return backbone.predict(x_BSC, text_BTD, conditions.pooled_BP, timestep_B, conditions.guidance_B)

    return sample(predict, noise_BSC.to(backbone.dtype), schedule).final_latent_BSC


def _decoded(decoder: ImageDecoder, latent_BSC: torch.Tensor) -> list[Array]:
    # One by one: a VAE in fp32 takes gigabytes for each picture, and beside it lies the transformer.
    return [decoder.decode(latent_BSC[row : row + 1])[0] for row in range(len(latent_BSC))]


def _latent_fractions(
    final_BSC: torch.Tensor, wanted_BSC: torch.Tensor, name: str, batch: Sequence[HeldOut]
) -> list[float]:
    wanted = wanted_BSC.double().flatten(1)
    fraction_B = (final_BSC.double().flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)
    fractions: list[float] = fraction_B.tolist()
    if (wrong := next((row for row, value in enumerate(fractions) if not np.isfinite(value)), None)) is not None:
        raise NonFinite(
            f"the final latent of trajectory {batch[wrong].key} with {name} leading is not finite against the cached "
            f"one: embedding or prediction overflowed; try --backbone-dtype float32, or --closed-loop 0"
        )
    return fractions


_Distances = tuple[float, float | None, float, float | None]


def _distances(fraction: float, picture_HWC: Array, wanted_HWC: Array, lpips: Lpips | None) -> _Distances:
    perceived = None if lpips is None else lpips(picture_HWC, wanted_HWC)
    return fraction, psnr_db(picture_HWC, wanted_HWC), ssim(picture_HWC, wanted_HWC), perceived


def _columns(rows: Sequence[_Distances], *, measured: bool) -> Led:
    fractions, ratios, similarities, perceived = zip(*rows, strict=True)
    return Led(latent_fraction=fractions, psnr_db=ratios, ssim=similarities, lpips=perceived if measured else None)
