"""Loads the teacher's networks for a cache as its manifest states."""

from typing import Any

import torch

from secondcast.models.attention import RECORDED_NATIVE, backend_of_record, check_attention
from secondcast.models.backbone import FluxBackbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.peak import begin_peak, release_memory
from secondcast.models.memory.quantized import check_quantizer
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.schema.manifest import Manifest, check_same_teacher


class TeacherModels:
    """Text encoders and transformer of a teacher; only those of one stage are in memory at a time."""

    def __init__(self, manifest: Manifest, teacher: TeacherFolder, device: torch.device) -> None:
        """Raise MissingExtraError if the cache needs quantized weights and the quantizer is not installed."""
        check_quantizer(manifest.sampling.quantize)
        self.manifest, self.teacher, self.device = manifest, teacher, device
        self._encoder: TeacherTextEncoder | None = None
        self._backbone: FluxBackbone | None = None
        self._usable: set[str] = set()

    def text_encoder(self) -> TeacherTextEncoder:
        """Load T5, and CLIP if the cache has its pooled vectors."""
        if self._encoder is None:
            self._begin_stage()
            dtype, pooled = DTYPES[self.manifest.sampling.dtype], self.manifest.teacher.pooled
            self._encoder = TeacherTextEncoder.load(self.teacher, dtype=dtype, device=self.device, pooled=pooled)
        return self._encoder

    def backbone(self, attention_backend: str | None) -> FluxBackbone:
        """Load the transformer and set its attention backend; None for diffusers' default."""
        if self._backbone is None:
            self._begin_stage()
            self._backbone = load_backbone(self.manifest, self.teacher, self.device)
        self._backbone.use_attention(attention_backend)
        return self._backbone

    def recorded_backend(self, made: dict[str, Any]) -> str | None:
        """The attention backend that the provenance of a shard names; SettingsError if it does not work here."""
        name = str(made.get("attention", RECORDED_NATIVE))
        backend = backend_of_record(name)
        if name not in self._usable:
            dtype = DTYPES[self.manifest.sampling.dtype]
            check_attention(backend, self.manifest.teacher.backbone_config, dtype=dtype, device=self.device)
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


def load_backbone(manifest: Manifest, teacher: TeacherFolder, device: torch.device) -> FluxBackbone:
    """Load the teacher's transformer with the geometry, dtype and quantization of a manifest."""
    return FluxBackbone.load(
        teacher.path,
        recorded_geometry(manifest.sampling),
        text_length=manifest.teacher.text_length,
        dtype=DTYPES[manifest.sampling.dtype],
        device=device,
        # Checkpointing has no effect without gradients, but quantized weights are refused without it.
        options=MemoryOptions(quantize=manifest.sampling.quantize, activation_checkpointing=1),
    )


def check_recorded_teacher(manifest: Manifest, teacher: TeacherFolder, where: str) -> None:
    """Raise SettingsMismatchError, naming the first field, if a cache was recorded with other teacher files."""
    stated = manifest.teacher
    check_same_teacher(manifest, teacher.identity(text_length=stated.text_length, pooled=stated.pooled), where)
