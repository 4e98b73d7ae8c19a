"""Closed loop: samples with a text encoder from the cached noise and decodes the final latents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image sampled with a text encoder from the cached noise, and the recorded image of the same trajectory.

    latent_fraction: norm of the difference of the final latents / norm of the recorded one.
    """

    encoder: str
    trajectory: HeldOut
    latent_fraction: float
    picture_HWC: Array
    recorded_HWC: Array


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

    For the rest see `each_sample`.
    keep: receives each image once, the recorded one of a trajectory before those of the text encoders.
    """
    found: dict[str, list[_Distances]] = {name: [] for name in text_encoders}
    first = next(iter(text_encoders), None)
    for one in each_sample(
        cache, backbone, decoder, text_encoders, trajectories, batch_size=batch_size, progress=progress
    ):
        if keep is not None:
            if one.encoder == first:
                keep(RECORDED, one.trajectory, one.recorded_HWC)
            keep(one.encoder, one.trajectory, one.picture_HWC)
        found[one.encoder].append(_distances(one, lpips))
    return {name: _columns(rows, measured=lpips is not None) for name, rows in found.items()}


@torch.no_grad()
def each_sample(
    cache: Cache,
    backbone: Backbone,
    decoder: ImageDecoder,
    text_encoders: Mapping[str, EmbedPrompts],
    trajectories: Sequence[HeldOut],
    *,
    batch_size: int,
    progress: Progress,
) -> Iterator[Sample]:
    """The samples of each batch of trajectories, by text encoder; NonFiniteError.

    Schedule, guidance, negative prompt and conditioning are the recorded ones; every batch has batch_size rows.
    """
    total = len(trajectories) * len(text_encoders)
    with progress.bar("closed loop", total=total, done=0, unit="images") as bar:
        for batch, kept in filled_batches(trajectories, batch_size):
            distinct = {chosen.index: cache.trajectory(chosen.index) for chosen in batch}
            recorded = [distinct[chosen.index] for chosen in batch]
            inputs = RecordedInputs.of(cache, recorded, backbone)
            wanted_BSC = on_device([trajectory.final_latent_SC for trajectory in recorded], backbone.device)
            pictures = decoded(decoder, wanted_BSC[:kept])
            for name, embed in text_encoders.items():
                final_BSC = inputs.final_latent(embed([chosen.prompt for chosen in batch]))[:kept]
                fractions = _latent_fractions(final_BSC, wanted_BSC[:kept], name, batch)
                sampled = decoded(decoder, final_BSC)
                bar.advance(kept)
                # A batch is padded with its own rows.
                rows = zip(batch[:kept], fractions, sampled, pictures, strict=True)
                for chosen, fraction, picture_HWC, recorded_HWC in rows:
                    yield Sample(
                        encoder=name, trajectory=chosen, latent_fraction=fraction, picture_HWC=picture_HWC,
                        recorded_HWC=recorded_HWC,
                    )  # fmt: skip


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


def _distances(one: Sample, lpips: Lpips | None) -> _Distances:
    both = (one.picture_HWC, one.recorded_HWC)
    return one.latent_fraction, psnr_db(*both), ssim(*both), None if lpips is None else lpips(*both)


def _columns(rows: Sequence[_Distances], *, measured: bool) -> SampledResult:
    fractions, ratios, similarities, perceived = zip(*rows, strict=True)
    return SampledResult(
        latent_fraction=fractions, psnr_db=ratios, ssim=similarities, lpips=perceived if measured else None
    )
