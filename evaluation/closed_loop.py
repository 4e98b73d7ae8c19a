"""Closed loop: samples with a text encoder from the cached noise and decodes the final latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from secondcast.evaluation.held_out import HeldOut
from secondcast.evaluation.pictures.distances import psnr_db, ssim
from secondcast.evaluation.replaying import Conditions, EmbedPrompts, filled_batches, on_device
from secondcast.evaluation.results import SampledResult
from secondcast.models.backbone import Backbone
from secondcast.models.families.text import Text, recorded_text
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.models.sampler import bound, sample
from secondcast.models.schedule import Schedule
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.fields import Array

Lpips = Callable[[Array, Array], float]
Keep = Callable[[str, HeldOut, Array], None]
"""Name of the text encoder (RECORDED: the recording itself), trajectory, uint8 image HWC."""
RECORDED = "recorded"


@dataclass(frozen=True, kw_only=True)
class RecordedInputs:
    """What the sampler reads of recorded trajectories besides the text embedding, all as recorded."""

    backbone: Backbone
    schedule: Schedule
    noise_BSC: torch.Tensor
    conditions: Conditions
    negative: Text | None

    @classmethod
    def of(cls, cache: Cache, trajectories: Sequence[Trajectory], backbone: Backbone) -> Self:
        """The inputs of these trajectories, on the backbone's device."""
        return cls(
            backbone=backbone,
            schedule=recorded_schedule(cache.manifest),
            noise_BSC=on_device([trajectory.noise_SC for trajectory in trajectories], backbone.device),
            conditions=Conditions.of(cache, trajectories, backbone),
            negative=None if cache.negative is None else recorded_text(cache, [cache.negative]).on(backbone.device),
        )

    @torch.no_grad()
    def final_latent(self, embedding_BTD: torch.Tensor) -> torch.Tensor:
        """final_latent_BSC, sampled with these embeddings."""
        text_BTD = embedding_BTD.to(self.backbone.dtype)
        text = Text(embedding_BTD=text_BTD, conditioning=self.conditions.conditioning)
        predict = bound(self.backbone, text, self.conditions.guidance_B, self.negative)
        return sample(predict, self.noise_BSC.to(self.backbone.dtype), self.schedule).final_latent_BSC


@torch.no_grad()
def closed_loop(
    cache: Cache,
    backbone: Backbone,
    decoder: ImageDecoder,
    text_encoders: Mapping[str, EmbedPrompts],
    trajectories: Sequence[HeldOut],
    *,
    lpips: Lpips | None,
    batch_size: int,
    progress: Progress,
    keep: Keep | None = None,
) -> dict[str, SampledResult]:
    """Sample with each text encoder and compare with the recorded end of these trajectories, by encoder name.

    Schedule, guidance, negative prompt and conditioning are the recorded ones; every batch has batch_size rows.
    keep: receives each image once, the recorded one of a trajectory before those of the text encoders.
    """
    found: dict[str, list[_Distances]] = {name: [] for name in text_encoders}
    total = len(trajectories) * len(text_encoders)
    with progress.bar("closed loop", total=total, done=0, unit="images") as bar:
        for batch, kept in filled_batches(trajectories, batch_size):
            distinct = {chosen.index: cache.trajectory(chosen.index) for chosen in batch}
            recorded = [distinct[chosen.index] for chosen in batch]
            inputs = RecordedInputs.of(cache, recorded, backbone)
            wanted_BSC = on_device([trajectory.final_latent_SC for trajectory in recorded], backbone.device)
            pictures = decoded(decoder, wanted_BSC[:kept])
            _pass_on(keep, RECORDED, batch, pictures)
            for name, embed in text_encoders.items():
                final_BSC = inputs.final_latent(embed([chosen.prompt for chosen in batch]))[:kept]
                fractions = _latent_fractions(final_BSC, wanted_BSC[:kept], name, batch)
                sampled = decoded(decoder, final_BSC)
                _pass_on(keep, name, batch, sampled)
                for fraction, ours, theirs in zip(fractions, sampled, pictures, strict=True):
                    found[name].append(_distances(fraction, ours, theirs, lpips))
                bar.advance(kept)
    return {name: _columns(rows, measured=lpips is not None) for name, rows in found.items()}


def _pass_on(keep: Keep | None, name: str, batch: Sequence[HeldOut], pictures: Sequence[Array]) -> None:
    """Pass on as many images as the batch has distinct rows: a batch is padded with its own rows."""
    if keep is not None:
        for chosen, picture_HWC in zip(batch, pictures, strict=False):
            keep(name, chosen, picture_HWC)


def decoded(decoder: ImageDecoder, latent_BSC: torch.Tensor) -> list[Array]:
    """uint8 images HWC of packed latents."""
    # One at a time: a VAE in fp32 takes gigabytes per image, and the transformer is in memory too.
    return [decoder.decode(latent_BSC[row : row + 1])[0] for row in range(len(latent_BSC))]


def _latent_fractions(
    final_BSC: torch.Tensor, wanted_BSC: torch.Tensor, name: str, batch: Sequence[HeldOut]
) -> list[float]:
    wanted = wanted_BSC.double().flatten(1)
    fraction_B = (final_BSC.double().flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)
    fractions: list[float] = fraction_B.tolist()
    if (wrong := next((row for row, value in enumerate(fractions) if not np.isfinite(value)), None)) is not None:
        raise NonFiniteError(
            f"the final latent of trajectory {batch[wrong].key} sampled with {name} is not finite: embedding or "
            f"prediction overflowed; try --backbone-dtype float32, or --closed-loop 0"
        )
    return fractions


_Distances = tuple[float, float | None, float, float | None]


def _distances(fraction: float, picture_HWC: Array, wanted_HWC: Array, lpips: Lpips | None) -> _Distances:
    perceived = None if lpips is None else lpips(picture_HWC, wanted_HWC)
    return fraction, psnr_db(picture_HWC, wanted_HWC), ssim(picture_HWC, wanted_HWC), perceived


def _columns(rows: Sequence[_Distances], *, measured: bool) -> SampledResult:
    fractions, ratios, similarities, perceived = zip(*rows, strict=True)
    return SampledResult(
        latent_fraction=fractions, psnr_db=ratios, ssim=similarities, lpips=perceived if measured else None
    )
