"""The depth loss: both streams of the frozen backbone after its first blocks.

Shape letters in this module: P prompts, I the backbone's inner width, L the tokens of a stream.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from secondcast.models.backbone import Backbone
from secondcast.models.families.family import TEXT_MASK
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.fields import Array
from secondcast.trainer.data.replay_dataset import Batch, ReplayDataset
from secondcast.trainer.losses.difference import differences
from secondcast.trainer.losses.vision import inputs
from secondcast.trainer.run.config import StreamVariances

# Of each cache: prompts, and records with other latents; every latent is run with every prompt.
_SAMPLED = 16


def streams(
    backbone: Backbone, blocks: int, embedding_BTD: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states_BSI and encoder_hidden_states_BTI after the first blocks, on cached latents."""
    return backbone.streams(blocks, *inputs(backbone, embedding_BTD, batch), modulation_BM=batch.modulation_BM)


def depth_errors(
    backbone: Backbone,
    embedding_BTD: torch.Tensor,
    batch: Batch,
    variances: StreamVariances,
    *,
    huber: float | None = None,
) -> torch.Tensor:
    """Error of each row, [B] fp32: mean of two streams' mean squared differences, each per variance between prompts.

    It is 0 for the teacher's embedding, and about 2 for the teacher's embedding of another prompt.

    embedding_BTD: the student's, any float dtype; it is rounded to the backbone's.
    batch: with the teacher's embeddings.
    variances: of the streams after the blocks that are run.
    huber: in standard deviations between prompts.
    """
    assert batch.encoder_hidden_states_BTD is not None
    factors = (variances.hidden_states**-0.5, variances.encoder_hidden_states**-0.5)
    with torch.no_grad():
        teachers = streams(backbone, variances.blocks, batch.encoder_hidden_states_BTD, batch)
        wanted = [factor * stream_BLI.float() for factor, stream_BLI in zip(factors, teachers, strict=True)]
    found = streams(backbone, variances.blocks, embedding_BTD, batch)
    errors = [
        differences(factor * found_BLI.float(), wanted_BLI, huber).flatten(1).mean(1)
        for factor, found_BLI, wanted_BLI in zip(factors, found, wanted, strict=True)
    ]
    return torch.stack(errors).mean(0)


@torch.no_grad()
def measure_variances(
    backbones: Sequence[Backbone], dataset: ReplayDataset, blocks: int, *, batch_rows: int
) -> StreamVariances:
    """Variances between prompts of the teacher's streams after the first blocks, in float64.

    Of each stream: the unbiased variance over prompts of each value (position, channel), with the same latent,
    timestep, guidance and conditioning (but for the mask of each text); averaged over positions and channels, then over
    latents. Latents and prompts are those of up to 16 trajectories of each cache, of different prompts, spread over the
    trajectories, at steps spread over the schedule.

    backbones: one for each source of the dataset with trajectories.
    dataset: the training data.
    batch_rows: rows in a forward pass.

    Raises SettingsError where the streams do not vary.
    """
    found = list[torch.Tensor]()
    for number, source in enumerate(dataset.sources):
        # Only the depth stages' caches have latents and embeddings for certain.
        if source.cache.manifest.is_text or not source.cache.manifest.keeps_embeddings:
            continue
        records = _records(dataset, number)
        prompts = [dataset.prompt_of(position) for position, _ in records]
        embeddings_PTD = dataset.teacher_embeddings(prompts)
        masks = [source.cache.conditioning(prompt).get(TEXT_MASK) for _, prompt in prompts]
        parts = [
            _Prompts(
                embedding_PTD=part_PTD,
                masks=[mask for mask in masks[first : first + len(part_PTD)] if mask is not None],
            )
            for first, part_PTD in zip(itertools.count(0, batch_rows), embeddings_PTD.split(batch_rows), strict=False)
        ]
        latents = (dataset.replay_batch([record]) for record in records)
        found += [_variances_of_latent(backbones[number], blocks, latent, parts) for latent in latents]
    image, text = torch.stack(found).mean(0).tolist()
    if not (0 < image < torch.inf and 0 < text < torch.inf):
        raise SettingsError(
            f"the variances between prompts of image and text stream after {counted(blocks, 'block')} are {image:.3g} "
            f"and {text:.3g}, expected finite numbers above 0: the depth loss divides by them; use another loss"
        )
    return StreamVariances(blocks=blocks, hidden_states=image, encoder_hidden_states=text)


def _records(dataset: ReplayDataset, number: int) -> list[tuple[int, int]]:
    """(position, k) of trajectories of a source, of different prompts."""
    source, first = dataset.sources[number], dataset.first_of(number)
    count, steps = len(source.indices), source.steps
    spread = [first + place * count // _SAMPLED for place in range(_SAMPLED)]
    positions = list({dataset.prompt_of(position): position for position in spread}.values())
    if len(positions) < 2:
        raise SettingsError(
            f"{source.cache.folder} has 1 prompt to train on, expected at least 2: the depth loss is normalised by the "
            f"variance between prompts; build more prompts"
        )
    return [(position, place * steps // len(positions)) for place, position in enumerate(positions)]


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    """Embeddings of prompts, and the mask of each where the backbone takes one."""

    embedding_PTD: torch.Tensor
    masks: Sequence[Array]


def _variances_of_latent(backbone: Backbone, blocks: int, record: Batch, parts: Sequence[_Prompts]) -> torch.Tensor:
    """Variances of both streams of one record, [2] float64."""
    firsts, sums, squares = list[torch.Tensor](), [torch.zeros(())] * 2, [torch.zeros(())] * 2
    for part in parts:
        batch = _repeated(record, len(part.embedding_PTD))
        if part.masks:
            masks_PT = torch.from_numpy(np.stack(part.masks)).to(record.hidden_states_BSC.device)
            batch = replace(batch, conditioning={**batch.conditioning, TEXT_MASK: masks_PT})
        for which, stream_PLI in enumerate(streams(backbone, blocks, part.embedding_PTD, batch)):
            if len(firsts) == which:
                firsts.append(stream_PLI[0].double())
            # Differences from the first prompt lose no digits to a mean that is far from 0.
            from_first_PLI = stream_PLI.double() - firsts[which]
            sums[which] = sums[which] + from_first_PLI.sum(0)
            squares[which] = squares[which] + from_first_PLI.square().sum(0)
    prompts = sum(len(part.embedding_PTD) for part in parts)
    return torch.stack([
        ((square_LI - sum_LI.square() / prompts) / (prompts - 1)).mean()
        for sum_LI, square_LI in zip(sums, squares, strict=True)
    ])  # fmt: skip


def _repeated(record: Batch, rows: int) -> Batch:
    """A record as the rows of a batch."""

    def repeated(row: torch.Tensor) -> torch.Tensor:
        return row.repeat(rows, *[1] * (row.ndim - 1))

    names = ("hidden_states_BSC", "timestep_B", "guidance_B", "modulation_BM")
    values = {name: value for name in names if (value := getattr(record, name)) is not None}
    repeats: dict[str, Any] = {name: repeated(value) for name, value in values.items()}
    conditioning = {name: repeated(value) for name, value in record.conditioning.items()}
    return replace(record, conditioning=conditioning, **repeats)
