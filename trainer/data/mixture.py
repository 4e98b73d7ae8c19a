"""The caches of a run: their training and held-out rows, and the data order of each stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from secondcast.models.memory.host_modulation import HostModulation
from secondcast.models.student.tokens import StudentTokens
from secondcast.storage_schemas.errors import NotInCacheError, TeacherError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.first_difference import first_difference
from secondcast.storage_schemas.schema.manifest import Manifest, Teacher
from secondcast.trainer.data.replay_dataset import ReplayDataset, Source
from secondcast.trainer.data.sampler import InterleavedSampler, Part, Sampler, mix
from secondcast.trainer.run.config import RunConfig
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage
from secondcast.trainer.training_set import TrainingSet, row_name


@dataclass(frozen=True, kw_only=True)
class TrainingCache:
    """A cache of a run, and the rows that the run trains on; stages refer to it by `name`."""

    name: str
    cache: Cache
    training_set: TrainingSet

    @classmethod
    def of_run(cls, caches: Mapping[str, Cache], config: RunConfig, run: Path) -> "list[TrainingCache]":
        """The caches of a run, checked to hold what it trains on. See TrainingSet.check."""
        training_caches = [
            cls(name=name, cache=cache, training_set=config.caches[name].training_set) for name, cache in caches.items()
        ]
        for training_cache in training_caches:
            training_cache.training_set.check(training_cache.cache, run)
        return training_caches


def check_one_teacher(caches: Mapping[str, Cache]) -> None:
    """Raise TeacherError, naming the first field that differs, unless all caches have the same teacher."""
    (first_name, first), *others = caches.items()
    for name, other in others:
        if first.manifest.digests()["teacher"] == other.manifest.digests()["teacher"]:
            continue
        was, now = first.manifest.teacher.json_value(), other.manifest.teacher.json_value()
        field = next(field for field in Teacher.model_fields if was.get(field) != now.get(field))
        found = first_difference(was.get(field), now.get(field), field)
        raise TeacherError(
            f"caches {first_name} and {name} have different teachers: {found.path} is {found.one} in "
            f"{first.folder} and {found.other} in {other.folder}; a student has one teacher: train on "
            f"one of the caches, or build both with the same teacher"
        )


def check_one_quantization(caches: Mapping[str, Cache]) -> None:
    """Raise TeacherError unless all caches were sampled with the same kind of weights."""
    sampled = [(name, cache) for name, cache in caches.items() if not cache.manifest.is_text]
    if not sampled:
        return
    (first_name, first), *others = sampled
    was = first.manifest.sampling.quantize
    for name, other in others:
        if (now := other.manifest.sampling.quantize) != was:
            raise TeacherError(
                f"caches {first_name} and {name} were sampled with different weights of one teacher: quantize is {was} "
                f"in {first.folder} and {now} in {other.folder}; one backbone cannot replay both without bias: train "
                "on one of them, or build both with the same --quantize"
            )


def split(
    training_caches: Sequence[TrainingCache],
    device: torch.device,
    tokens: StudentTokens | None = None,
    host_modulation: HostModulation | None = None,
) -> tuple[ReplayDataset, ReplayDataset]:
    """The training and the held-out data; NotInCacheError for a cache without training data.

    tokens: tokenizer of a student that does not read the cache's token ids.
    host_modulation: computes the modulation vectors of batches, if given.
    """
    parts = [_split(training_cache) for training_cache in training_caches]
    training, held_out = (
        [
            Source(cache=training_cache.cache, indices=part[side])
            for training_cache, part in zip(training_caches, parts, strict=True)
        ]
        for side in (0, 1)
    )
    first, second = (
        ReplayDataset(sources, device=device, tokens=tokens, host_modulation=host_modulation)
        for sources in (training, held_out)
    )
    return first, second


def _split(training_cache: TrainingCache) -> tuple[Array, Array]:
    cache, indices = training_cache.cache, training_cache.training_set.indices()
    held = [prompt.held_out for prompt in cache.prompts]
    numbers = indices if cache.manifest.is_text else [cache.layout.place(int(index)).prompt for index in indices]
    mask = np.array([held[number] for number in numbers], dtype=bool)
    if not len(indices) or mask.all():
        committed = counted(len(indices), f"committed {row_name(cache)}")
        raise NotInCacheError(
            f"{cache.folder} has {committed}, {int(mask.sum())} of them held out: there is nothing to train on; build "
            f"more prompts"
        )
    return indices[~mask], indices[mask]


def stage_orders(
    settings: TrainSettings, training_caches: Sequence[TrainingCache], dataset: ReplayDataset
) -> list[InterleavedSampler]:
    """The data order of each stage: batches mix caches with equal sampling settings; other caches alternate."""
    return [
        InterleavedSampler(list(_orders(settings.seed, number, stage, training_caches, dataset)))
        for number, stage in enumerate(settings.stages)
    ]


def prompt_orders(
    settings: TrainSettings, training_caches: Sequence[TrainingCache], dataset: ReplayDataset
) -> list[InterleavedSampler | None]:
    """The order of the text caches' prompts in each stage with a context_loss_weight; None for the others."""
    text = [training_cache.name for training_cache in training_caches if training_cache.cache.manifest.is_text]

    def order(number: int, stage: Stage) -> InterleavedSampler | None:
        if not stage.context_loss_weight:
            return None
        weights = {name: weight for name, weight in (stage.caches or dict.fromkeys(text, 1.0)).items() if name in text}
        of_prompts = stage.model_copy(update={"loss": "context", "caches": weights, "timesteps_per_sample": 1})
        return InterleavedSampler(list(_orders(mix(settings.seed, 1), number, of_prompts, training_caches, dataset)))

    return [order(number, stage) for number, stage in enumerate(settings.stages)]


def _orders(
    seed: int, stage_number: int, stage: Stage, training_caches: Sequence[TrainingCache], dataset: ReplayDataset
) -> Iterator[Sampler]:
    alike: dict[object, list[int]] = {}
    for source, training_cache in enumerate(training_caches):
        if stage.trains_on(training_cache.name, is_text=training_cache.cache.manifest.is_text):
            alike.setdefault(_sampled_as(training_cache.cache.manifest), []).append(source)
    for number, sources in enumerate(alike.values()):
        parts = []
        for source in sources:
            count = len(dataset.sources[source].indices)
            share = stage.share_of(training_caches[source].name, count)
            parts.append(Part(first=dataset.first_of(source), count=count, share=share))
        vision = stage.replays
        yield Sampler(
            # Embedding losses have no timesteps, so there is no sequential order and nothing to share.
            kind=stage.data_order if vision else "shuffled",
            parts=tuple(parts),
            steps=dataset.sources[sources[0]].steps,
            batch_size=stage.batch_size,
            # A seed of its own for each stage and group, which would otherwise repeat the same order.
            seed=mix(seed, stage_number, number) if stage_number or number else seed,
            timesteps_per_sample=stage.timesteps_per_sample if vision else 1,
        )


def _sampled_as(manifest: Manifest) -> object:
    """The sampling settings that all records of a batch share: shapes, dtype and schedule."""
    if manifest.is_text:
        return manifest.dtype
    sampling = manifest.sampling
    shape = (sampling.height, sampling.width, sampling.image_tokens, sampling.channels, sampling.dtype)
    return shape, sampling.sigmas, sampling.timesteps, sampling.guidance is None
