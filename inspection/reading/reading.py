"""`inspect reading`: what the transformer reads of the teacher's embedding, without training.

Statistics come from prompts that training uses, errors from held-out ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from secondcast.evaluation.held_out import held_out_trajectories, spread
from secondcast.evaluation.on_cache import backbone_of
from secondcast.evaluation.open_loop import replay_errors
from secondcast.evaluation.replaying import EmbedPrompts, cached_embeddings
from secondcast.inspection.reading.gradients import measured_metric
from secondcast.inspection.reading.settings import ReadingOptions
from secondcast.inspection.reading.spread import PromptLists, Spread, measure_spread
from secondcast.inspection.reading.statistics import TokenStatistics, replace_padding
from secondcast.inspection.reading.truncation import Truncation, metric_root, row_space
from secondcast.models.backbone import Backbone
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.reader import Cache

METRICS = ("pca", "read_pca", "context", "measured")
"""The metrics of the truncations, in the order of the table."""

_FLOAT64_BYTES = 8
_READ_AT_ONCE = 64
Record = tuple[int, int]
"""Trajectory index and step."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Vision losses (mean squared difference to the recorded velocity) on held-out records with changed embeddings.

    records, gradients, prompts: the numbers that it is measured on.
    replay_error: with the recorded embedding. velocity_mean_square: the loss of a prediction of zeros.
    losses: by rank, then by metric. inner_width: rank of the text projection.
    padding_mean, padding_zero: with the padding replaced by its mean at each position, or by zeros.
    spread: by kind of prompts; None without the teacher's text encoder.
    """

    cache: str
    backbone: str
    records: int
    gradients: int
    prompts: int
    width: int
    inner_width: int
    replay_error: float
    velocity_mean_square: float
    losses: Mapping[int, Mapping[str, float]]
    padding_fraction: float
    padding_variance_fraction: float
    padding_mean: float
    padding_zero: float
    spread: Mapping[str, Spread] | None


def read_embedding(
    cache: Cache,
    teacher: TeacherFolder,
    options: ReadingOptions,
    *,
    lists: PromptLists | None,
    device: torch.device,
    progress: Progress,
) -> Reading:
    """Measure a cache with the transformer of its teacher. lists: to measure the spread of.

    Incompatible inputs are refused before the transformer is loaded: NotInCacheError, TeacherError, SettingsError.
    """
    ranks = options.ranks_on(cache.manifest.teacher.text_width)
    held_out, trained, prompts = _chosen(cache, options)
    embedded = None if lists is None else lists.embeddings(cache.manifest, device)
    backbone = backbone_of(
        cache, teacher, options.scoring(), device, progress, gradients=True, beside_bytes=_matrix_bytes(cache)
    )
    size = options.batch_size
    context_ID = _context(backbone)
    read_RD = row_space(context_ID)
    statistics = TokenStatistics.of(_embeddings(cache, prompts, device, progress))
    metric_DD = measured_metric(cache, backbone, trained, seed=options.seed, batch_size=size, progress=progress)
    roots = {
        "pca": torch.eye(len(metric_DD)).to(metric_DD),
        "read_pca": read_RD,
        "context": context_ID,
        "measured": metric_root(metric_DD),
    }
    truncations = {name: Truncation.of(statistics.mean_D, statistics.covariance_DD, roots[name]) for name in METRICS}
    encoders = _encoders(cache, statistics, truncations, ranks, device)
    found = replay_errors(cache, backbone, encoders, held_out, batch_size=size, progress=progress, title="replays")
    loss = {name: float(errors_N2[:, 1].mean()) for name, errors_N2 in found.items()}
    measured = None
    if embedded is not None:
        steps, indices = cache.manifest.sampling.steps, [index for index, _ in held_out]
        latents = spread_records(indices, steps, options.num_latents, seed=options.seed)
        measured = measure_spread(cache, backbone, embedded, context_ID, latents, batch_size=size, progress=progress)
    return Reading(
        cache=cache.location,
        backbone=teacher.source,
        records=len(held_out),
        gradients=len(trained),
        prompts=len(prompts),
        width=cache.manifest.teacher.text_width,
        inner_width=len(read_RD),
        replay_error=loss["replay"],
        velocity_mean_square=_mean_square(cache, held_out),
        losses={rank: {metric: loss[_named(metric, rank)] for metric in METRICS} for rank in ranks},
        padding_fraction=statistics.padding_fraction,
        padding_variance_fraction=statistics.padding_variance_fraction,
        padding_mean=loss["padding means"],
        padding_zero=loss["padding zeros"],
        spread=measured,
    )


def spread_records(indices: Sequence[int], steps: int, count: int, *, seed: int) -> list[Record]:
    """`count` different records of these trajectories, all if there are fewer, spread over trajectories and steps."""
    # Shuffled, so that the step does not depend on the place in the cache, which follows the sources of prompts.
    shuffled = np.random.default_rng(seed).permutation(np.unique(indices))
    rows = min(count, len(shuffled) * steps)
    return sorted((int(shuffled[row % len(shuffled)]), row * steps // rows) for row in range(rows))


def _chosen(cache: Cache, options: ReadingOptions) -> tuple[list[Record], list[Record], list[int]]:
    """Held-out records, records of training prompts, and training prompts with their embedding."""
    manifest = cache.manifest
    if not manifest.keeps_embeddings:
        raise NotInCacheError(
            f"{cache.folder} has no embeddings: it was built with --no-store-embeddings, and a reading changes the "
            f"recorded embeddings; build another cache with --store-embeddings"
        )
    everything = held_out_trajectories(cache)
    held_out = [everything[place].index for place in spread(everything, options.num_records)]
    there = {number for number in range(len(cache.prompts)) if _is_committed(cache, number)}
    prompts = sorted(
        there - {number for number, prompt in enumerate(cache.prompts) if prompt.held_out} - {cache.negative}
    )
    known = set(prompts)
    trained = [int(index) for index in cache.indices() if cache.layout.place(int(index)).prompt in known]
    if not trained:
        raise NotInCacheError(
            f"{cache.folder} has {counted(len(cache), 'committed trajectory')}, all of held-out prompts: the "
            f"statistics of a reading come from the prompts that training uses; build more prompts"
        )
    steps, seed = manifest.sampling.steps, options.seed
    return (
        spread_records(held_out, steps, options.num_records, seed=seed),
        spread_records(_evenly(trained, options.num_gradients), steps, options.num_gradients, seed=seed),
        _evenly(prompts, options.num_prompts),
    )


def _is_committed(cache: Cache, prompt: int) -> bool:
    return ("embeddings", cache.layout.embedding_place(prompt)[0]) in cache.records


def _evenly(items: Sequence[int], count: int) -> list[int]:
    taken = min(count, len(items))
    return [items[(2 * number + 1) * len(items) // (2 * taken)] for number in range(taken)]


def _padding(cache: Cache, prompts: Sequence[int], device: torch.device) -> torch.Tensor:
    """padding_BT: which tokens of these prompts are padding."""
    counts_B = torch.tensor([len(cache.prompts[prompt].token_ids) for prompt in prompts])
    return (torch.arange(cache.manifest.teacher.text_length) >= counts_B[:, None]).to(device)


def _embeddings(
    cache: Cache, prompts: Sequence[int], device: torch.device, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    recorded = cached_embeddings(cache, device)
    with progress.bar("embeddings", total=len(prompts), done=0, unit="prompts") as bar:
        for first in range(0, len(prompts), _READ_AT_ONCE):
            batch = prompts[first : first + _READ_AT_ONCE]
            yield recorded(batch), _padding(cache, batch, device)
            bar.advance(len(batch))


def _context(backbone: Backbone) -> torch.Tensor:
    """context_ID: the text projection, float64."""
    weight_ID = backbone.transformer.get_parameter(backbone.family.anatomy.text_entry)
    return weight_ID.detach().to(device=backbone.device, dtype=torch.float64)


def _named(metric: str, rank: int) -> str:
    return f"the embedding truncated to rank {rank} by {metric}"


def _encoders(
    cache: Cache,
    statistics: TokenStatistics,
    truncations: Mapping[str, Truncation],
    ranks: Sequence[int],
    device: torch.device,
) -> dict[str, EmbedPrompts]:
    """The recorded embedding, and every changed one, by name."""
    recorded = cached_embeddings(cache, device)

    def truncated(truncation: Truncation, rank: int) -> EmbedPrompts:
        return lambda prompts: truncation.apply(recorded(prompts), rank)

    def padded(replacement_TD: torch.Tensor) -> EmbedPrompts:
        return lambda prompts: replace_padding(recorded(prompts), _padding(cache, prompts, device), replacement_TD)

    return {
        "replay": recorded,
        "padding means": padded(statistics.padding_mean_TD),
        "padding zeros": padded(torch.zeros_like(statistics.padding_mean_TD)),
        **{_named(metric, rank): truncated(truncations[metric], rank) for metric in METRICS for rank in ranks},
    }


def _matrix_bytes(cache: Cache) -> int:
    """Matrices in float64: covariance, metric, an encoder and a decoder for each metric, and work space for one."""
    width = cache.manifest.teacher.text_width
    return (2 + 2 * len(METRICS) + 4) * width * width * _FLOAT64_BYTES


def _mean_square(cache: Cache, records: Sequence[Record]) -> float:
    total, read = 0.0, None
    for index, k in records:
        read = read if read is not None and read.index == index else cache.trajectory(index)
        total += float(np.square(read.velocity_KSC[k].astype(np.float64)).mean())
    return total / len(records)


def reading_facts(reading: Reading) -> dict[str, Any]:
    """All values as plain JSON types."""
    return {
        "cache": reading.cache,
        "backbone": reading.backbone,
        "records": reading.records,
        "gradients": reading.gradients,
        "prompts": reading.prompts,
        "width": reading.width,
        "inner_width": reading.inner_width,
        "replay_error": reading.replay_error,
        "velocity_mean_square": reading.velocity_mean_square,
        "ranks": [{"rank": rank, **losses} for rank, losses in reading.losses.items()],
        "padding": {
            "token_fraction": reading.padding_fraction,
            "variance_fraction": reading.padding_variance_fraction,
            "position_mean": reading.padding_mean,
            "zeros": reading.padding_zero,
        },
        "spread": None
        if reading.spread is None
        else {
            kind: {
                "prompts": row.prompts,
                "prediction_fraction": row.prediction,
                "context_fraction": row.context,
                "embedding_fraction": row.embedding,
            }
            for kind, row in reading.spread.items()
        },
    }
