"""Loads the teacher's networks for a cache as its manifest states."""

from typing import Any

import torch

from secondcast.cache_builder.settings import placed
from secondcast.models.attention import RECORDED_NATIVE, backend_of_record, check_attention
from secondcast.models.backbone import Backbone
from secondcast.models.cost.counted import recorded_clip_parameters, text_encoder_cost
from secondcast.models.cost.gpu_memory import text_stage_memory
from secondcast.models.cost.placement import Placement, place, sample_stage_cost
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.conditions import recorded_conditions
from secondcast.models.memory.host_memory import free_host_bytes
from secondcast.models.memory.limit import GIB, free_bytes
from secondcast.models.memory.options import SamplingMemory
from secondcast.models.memory.peak import begin_peak, release_memory
from secondcast.models.memory.quantized import check_quantizer
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import Progress, Silent
from secondcast.storage_schemas.schema.comparing import check_same_teacher
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Manifest


class TeacherModels:
    """Text encoders and transformer of a teacher; only those of one stage are in memory at a time."""

    def __init__(
        self,
        manifest: Manifest,
        teacher: TeacherFolder,
        device: torch.device,
        *,
        memory: SamplingMemory = SamplingMemory(),
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """Raise MissingExtraError if the cache needs quantized weights and the quantizer is not installed.

        memory, batch_size: see load_backbone.
        """
        if not manifest.is_text:
            check_quantizer(manifest.sampling.quantize)
        self.manifest, self.teacher, self.device = manifest, teacher, device
        self._memory, self._batch_size, self._progress = memory, batch_size, progress or Silent()
        self._encoder: TeacherTextEncoder | None = None
        self._backbone: Backbone | None = None
        self._usable: set[str] = set()

    def text_encoder(self) -> TeacherTextEncoder:
        """Load the large text encoder, and CLIP if the cache has its pooled vectors."""
        if self._encoder is None:
            self._begin_stage()
            check_text_encoder_fits(self.manifest, self._memory, self._batch_size, self.device)
            dtype, pooled = DTYPES[self.manifest.dtype], self.manifest.teacher.pooled
            self._encoder = TeacherTextEncoder.load(self.teacher, dtype=dtype, device=self.device, pooled=pooled)
        return self._encoder

    def backbone(self, attention_backend: str | None) -> Backbone:
        """Load the transformer and set its attention backend; None for diffusers' default."""
        if self._backbone is None:
            self._begin_stage()
            self._backbone = load_backbone(
                self.manifest,
                self.teacher,
                self.device,
                memory=self._memory,
                batch_size=self._batch_size,
                progress=self._progress,
            )
        self._backbone.use_attention(attention_backend)
        return self._backbone

    def recorded_backend(self, made: dict[str, Any]) -> str | None:
        """The attention backend that the provenance of a shard names; SettingsError if it does not work here."""
        name = str(made.get("attention", RECORDED_NATIVE))
        backend = backend_of_record(name)
        if name not in self._usable:
            dtype = DTYPES[self.manifest.sampling.dtype]
            check_attention(backend, self.teacher, dtype=dtype, device=self.device)
            self._usable.add(name)
        return backend

    def release(self) -> None:
        """Free the memory of the text encoders and the transformer."""
        # Garbage collection walks all objects of the process, so skip it if nothing is loaded.
        if self._encoder is not None or self._backbone is not None:
            self._encoder = self._backbone = None
            release_memory(self.device)

    def _begin_stage(self) -> None:
        self.release()
        begin_peak(self.device)


def load_backbone(
    manifest: Manifest,
    teacher: TeacherFolder,
    device: torch.device,
    *,
    memory: SamplingMemory = SamplingMemory(),
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Backbone:
    """Load the teacher's transformer with the geometry, dtype and quantization of a manifest.

    memory: where its weights go; its limit chooses what is not given.
    batch_size: usual number of rows per call.
    """
    sampling = manifest.sampling
    options = placed(memory, sampling.quantize, manifest.teacher.pooled)
    if (found := placement(manifest, memory, batch_size, device)) is not None:
        options = found.options
        (progress or Silent()).say(found.text(free_bytes(str(memory.max_gpu_memory), device)))
    return Backbone.load(
        teacher.path,
        recorded_geometry(sampling),
        text_length=manifest.teacher.text_length,
        dtype=DTYPES[sampling.dtype],
        device=device,
        options=options,
        # A batch does not cross shards.
        conditions=recorded_conditions([manifest], batch_rows=min(batch_size, largest_shard(manifest))),
        pooled_varies=manifest.teacher.pooled == "clip",
    )


def placement(manifest: Manifest, memory: SamplingMemory, batch_size: int, device: torch.device) -> Placement | None:
    """The placement that a limit chooses; None without a limit. SettingsError if nothing fits."""
    if memory.max_gpu_memory is None:
        return None
    return place(
        sample_stage_cost(manifest, batch_size),
        placed(memory, manifest.sampling.quantize, manifest.teacher.pooled),
        memory_bytes=free_bytes(memory.max_gpu_memory, device),
        host_bytes=free_host_bytes(),
        held=memory.held,
    )


def largest_shard(manifest: Manifest) -> int:
    """Trajectories of the largest shard of a cache."""
    return max(shard.rows for shard in Layout(manifest.prompts.segments).trajectories)


def check_text_encoder_fits(manifest: Manifest, memory: SamplingMemory, batch_size: int, device: torch.device) -> None:
    """Raise SettingsError if the text encoder does not fit into the limit of a GPU."""
    if memory.max_gpu_memory is None or device.type != "cuda":
        return
    free = free_bytes(memory.max_gpu_memory, device)
    itemsize = DTYPES[manifest.dtype].itemsize
    needed = text_stage_memory(
        text_encoder_cost(manifest),
        dtype_bytes=itemsize,
        batch_size=batch_size,
        beside_parameters=recorded_clip_parameters(manifest),
    )
    if needed.needed_bytes > free:
        raise SettingsError(
            f"the text encoder needs {needed.needed_bytes / GIB:.1f} GiB at batch {batch_size}, by calculation, "
            f"--max-gpu-memory leaves {free / GIB:.1f} GiB: first build with --stage text --device cpu, then with "
            f"--stage sample"
        )


def check_recorded_teacher(manifest: Manifest, teacher: TeacherFolder, where: str) -> None:
    """Raise SettingsMismatchError, naming the first field, if a cache was recorded with other teacher files."""
    stated = manifest.teacher
    check_same_teacher(manifest, teacher.identity(text_length=stated.text_length, pooled=stated.pooled), where)
