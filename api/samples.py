"""`train --sample-every`: pictures by the student in training beside the teacher's, from the same recorded noise."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Self

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from secondcast.api.names import resolve_teacher
from secondcast.evaluation.closed_loop import RecordedInputs, decoded
from secondcast.evaluation.replaying import on_device
from secondcast.inspection.report.run import PROMPTS_KEY, sample_file
from secondcast.inspection.sheet import labelled_strip, picture_side, stacked
from secondcast.models.cost.counted import decoding_bytes, vae_parameters
from secondcast.models.geometry import recorded_geometry
from secondcast.models.teacher.folder import DECODE_PARTS, TeacherFolder
from secondcast.models.teacher.image_decoder import ImageDecoder, load_recorded_decoder
from secondcast.storage_schemas.errors import NotInCacheError, SettingsError, TeacherError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import Array
from secondcast.trainer.loop import Observer, Trainer
from secondcast.trainer.settings import TrainSettings

COUNT = 4
"""Default number of held-out trajectories."""
TAG = "samples"
_LARGEST_SIDE = 512
_FLOAT32_BYTES = 4
_HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Trajectories of one cache that are sampled together, and the teacher's pictures of them."""

    source: int
    prompts: Sequence[int]
    titles: Sequence[str]
    inputs: RecordedInputs
    decoder: ImageDecoder
    teacher: Sequence[Array]
    side: int

    @classmethod
    def of(cls, trainer: Trainer, decoder: ImageDecoder, source: int, indices: Sequence[int]) -> Self:
        """These trajectories of a cache of the run."""
        cache, backbone = trainer.dataset.sources[source].cache, trainer.objective.backbones[source]
        recorded = [cache.trajectory(index) for index in indices]
        with decoder.on(backbone.device):
            final_BSC = on_device([trajectory.final_latent_SC for trajectory in recorded], backbone.device)
            teacher = decoded(decoder, final_BSC)
        sampling = cache.manifest.sampling
        return cls(
            source=source,
            prompts=[trajectory.prompt for trajectory in recorded],
            titles=[f"{trajectory.index}: {cache.prompts[trajectory.prompt].text}" for trajectory in recorded],
            inputs=RecordedInputs.of(cache, recorded, backbone),
            decoder=decoder,
            teacher=teacher,
            side=picture_side(max(sampling.height, sampling.width), largest=_LARGEST_SIDE),
        )

    def strips(self, embedding_BTD: torch.Tensor) -> Iterator[Image.Image]:
        """Teacher and student side by side, by trajectory."""
        final_BSC = self.inputs.final_latent(embedding_BTD)
        with self.decoder.on(self.inputs.backbone.device):
            # A student may still drive the transformer to values that are not finite; training measures that itself.
            student = decoded(self.decoder, final_BSC.nan_to_num(posinf=0.0, neginf=0.0))
        for title, *pictures in zip(self.titles, self.teacher, student, strict=True):
            yield labelled_strip(title, dict(zip(("teacher", "student"), pictures, strict=True)), self.side)


@dataclass(kw_only=True, eq=False)
class Samples(Observer):
    """Samples recorded trajectories with the student, at the start, after every `every` steps, and after the last one.

    Noise, guidance and schedule are the recorded ones, and the backbone is the run's: no random number is drawn. Every
    process embeds, because a student may be sharded; the first one samples and writes.

    vae: teacher folder with the VAE, which is on the device only while it decodes.
    chosen: trajectories by cache; empty for the first held-out ones of the run.
    """

    every: int
    vae: TeacherFolder
    chosen: Sequence[tuple[Cache, int]]
    say: Callable[[str], None]
    _prompts: list[list[tuple[int, int]]] = field(default_factory=list)
    _batches: list[_Batch] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        every: int,
        ids: Sequence[str],
        settings: TrainSettings,
        caches: Mapping[str, Cache],
        source: str,
        say: Callable[[str], None],
    ) -> Self:
        """Check what can be checked before weights are loaded: SettingsError, TeacherError, NotInCacheError.

        ids: [NAME=]KEY, the key or index of a trajectory of the cache NAME; default: of the first one.
        source: location of the teacher with vae/.
        """
        if every < 1:
            raise SettingsError(f"--sample-every is {every}, expected at least 1 step")
        if not settings.predicts:
            raise SettingsError(
                f"--sample-every is {every}, but no stage has the vision loss, so the run does not load the whole "
                f"transformer that samples need: remove it, and use `secondcast generate` after training"
            )
        sampled = {name: cache for name, cache in sorted(caches.items()) if not cache.manifest.is_text}
        if not sampled:
            next(iter(caches.values())).require_trajectories("--sample-every")
        try:
            vae = resolve_teacher(source, DECODE_PARTS)
        except TeacherError as error:
            raise TeacherError(
                f"--sample-every decodes with the teacher's VAE: {error}; or remove --sample-every"
            ) from error
        return cls(every=every, vae=vae, chosen=[_named(given, sampled) for given in ids], say=say)

    def decoding_bytes(self, caches: Mapping[str, Cache]) -> int:
        """GPU memory that decoding takes when the activations of a step are freed: the VAE and its activations."""
        config, family = self.vae.config("vae"), self.vae.family
        geometries = [
            recorded_geometry(cache.manifest.sampling) for cache in caches.values() if not cache.manifest.is_text
        ]
        largest = max(decoding_bytes(config, family, geometry) for geometry in geometries)
        return _FLOAT32_BYTES * vae_parameters(config, family) + largest

    def on_start(self, trainer: Trainer) -> None:
        """See Observer: whatever may fail does so before the first step."""
        decoders: dict[int, ImageDecoder] = {}
        for source, indices in _batched(trainer, self._keys(trainer)):
            cache = trainer.dataset.sources[source].cache
            self._prompts.append([(source, cache.layout.place(index).prompt) for index in indices])
            if trainer.processes.is_main_process:
                if source not in decoders:
                    decoders[source] = load_recorded_decoder(self.vae, cache.manifest.sampling, _HOST)
                self._batches.append(_Batch.of(trainer, decoders[source], source, indices))
        self.on_step(trainer)

    def on_step(self, trainer: Trainer) -> None:
        """See Observer."""
        if trainer.done % self.every and trainer.done < trainer.settings.total_steps:
            return
        embeddings = [trainer.embeddings(prompts) for prompts in self._prompts]
        if not trainer.processes.is_main_process:
            return
        strips = [
            strip
            for batch, embedding_BTD in zip(self._batches, embeddings, strict=True)
            for strip in batch.strips(embedding_BTD)
        ]
        sheet = stacked(strips)
        titles = [title for batch in self._batches for title in batch.titles]
        file = sample_file(trainer.run, trainer.done)
        durable.replace(file, _png(sheet, titles))
        self.say(f"step {trainer.done}: {counted(len(titles), 'sample')} in {file}")
        if trainer.metrics is not None:
            trainer.metrics.log_picture(step=trainer.done, tag=TAG, picture_HWC=np.asarray(sheet))

    def _keys(self, trainer: Trainer) -> list[tuple[int, int]]:
        """The trajectories as (index of the cache in the run, index of the trajectory)."""
        sources = trainer.dataset.sources
        if self.chosen:
            numbers = {id(source.cache): number for number, source in enumerate(sources)}
            return [(numbers[id(cache)], index) for cache, index in self.chosen]
        held_out = trainer.held_out
        keys = [held_out.trajectory_of(position) for position in range(len(held_out))]
        keys = [(number, index) for number, index in keys if not sources[number].cache.manifest.is_text][:COUNT]
        if not keys:
            raise NotInCacheError(
                f"--sample-every samples held-out trajectories, but none of the {len(trainer.dataset):,} rows of this "
                f"run is held out: give trajectories by --sample-ids"
            )
        return keys


def _named(given: str, caches: Mapping[str, Cache]) -> tuple[Cache, int]:
    name, sign, key = given.partition("=")
    if not sign:
        cache, key = next(iter(caches.values())), given
    elif name in caches:
        cache = caches[name]
    else:
        raise SettingsError(
            f"--sample-ids {given!r} names the cache {name!r}, expected {' or '.join(caches)}, the caches with "
            f"trajectories of this run"
        )
    return cache, cache.key_index(key)


def _batched(trainer: Trainer, keys: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """(cache, trajectories) that go through the transformer together: not more rows than training has memory for."""
    rows = max(1, trainer.settings.replay_rows // trainer.processes.ranks)
    for source, group in groupby(dict.fromkeys(sorted(keys, key=lambda key: key[0])), key=lambda key: key[0]):
        indices = [index for _, index in group]
        size = max(1, rows // trainer.dataset.sources[source].cache.manifest.sampling.rows_per_call)
        for first in range(0, len(indices), size):
            yield source, indices[first : first + size]


def _png(sheet: Image.Image, prompts: Sequence[str]) -> bytes:
    texts, data = PngInfo(), io.BytesIO()
    texts.add_itxt(PROMPTS_KEY, "\n".join(" ".join(prompt.split()) for prompt in prompts))
    sheet.save(data, "PNG", pnginfo=texts)
    return data.getvalue()
