"""Rows of pictures: from a prompt to a picture with the large text encoder, offloaded, quantized, or a student."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from secondcast.check.machine import with_memory
from secondcast.check.results import CheckRow
from secondcast.check.steps import Training
from secondcast.check.teachers import WHOLE
from secondcast.evaluation.pictures.folder import PictureSettings
from secondcast.evaluation.sampling import Generator
from secondcast.evaluation.settings.memory import sampling_cost
from secondcast.models.backbone import Backbone
from secondcast.models.cost.gpu_memory import GpuMemory
from secondcast.models.families.text import recorded_text
from secondcast.models.memory.options import TextQuantization
from secondcast.models.memory.peak import begin_peak, release_memory
from secondcast.models.memory.quantized import quantize_text_encoder
from secondcast.models.teacher.pipeline_inputs import GUIDANCE, STEPS, ImageSize
from secondcast.storage_schemas.errors import SettingsError

ENCODERS = ("student", "large", "large, offloaded", "large in 8 bits", "large in 4 bits")
"""Text encoders of a picture: the last three are what saves memory without a student."""
_QUANTIZED: dict[str, TextQuantization] = {"large in 8 bits": "int8", "large in 4 bits": "nf4"}
_CLAIM = "from a prompt to a picture of {size} px in {steps} steps"


def picture_name(encoder: str) -> str:
    """The name of a row."""
    return f"picture: {encoder}"


class Pictures:
    """Transformer and VAE on the device, without a table as a pipeline holds them, and a prompt.

    CLIP is not run: its rows are the recorded ones, or zero as in the cache.
    """

    def __init__(self, training: Training) -> None:
        self._training, teacher = training, training.teacher
        self._device = teacher.device
        family, folder = teacher.folder.family, teacher.folder
        geometry = folder.geometry(ImageSize(resolution=teacher.scale.picture_resolution))
        self._size = geometry.height
        self._generator = Generator(
            backbone=Backbone(
                teacher.transformer(),
                geometry,
                text_length=training.cache.manifest.teacher.text_length,
                device=teacher.device,
                family=family,
            ),
            decoder=teacher.decoder(geometry),
            schedule=family.schedule(
                "diffusers",
                folder.config("scheduler"),
                steps=STEPS,
                image_tokens=geometry.image_tokens,
                dtype=teacher.torch_dtype,
            ),
            geometry=geometry,
            teacher=folder,
            guidance=GUIDANCE,
            seed=0,
        )
        cache = training.cache
        number = cache.layout.place(0).prompt
        self._text, self._conditioning = cache.prompts[number].text, recorded_text(cache, [number]).conditioning
        self._negative = None if cache.negative is None else recorded_text(cache, [cache.negative])
        self._ids_BT = torch.from_numpy(cache.padded_token_ids(number))[None]

    def row(self, encoder: str) -> CheckRow:
        """The time and the memory with one of ENCODERS."""
        embed, before, after = self._encoder(encoder)
        self._picture(embed, before, after)
        # Without what loading and quantizing needed.
        release_memory(self._device)
        begin_peak(self._device)
        text_seconds, seconds = self._picture(embed, before, after)
        row = CheckRow(
            name=picture_name(encoder),
            claim=_CLAIM.format(size=self._size, steps=STEPS),
            result="measured",
            picture_seconds=seconds,
            text_seconds=text_seconds,
        )
        # `plan generate` plans the student; the others hold the large text encoder as well.
        return with_memory(row, self._device, self._planned() if encoder == "student" else None)

    def _encoder(self, encoder: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], Any, Any]:
        """An encoder, and what moves between host and GPU before and after its turn."""
        teacher = self._training.teacher
        if encoder == "student":
            student = copy.deepcopy(self._training.student).to(self._device).eval()
            return (lambda ids_BT: student(ids_BT)[0]), _nothing, _nothing
        offloads = encoder == "large, offloaded"
        if offloads and self._device.type != "cuda":
            raise SettingsError("on a CPU nothing is offloaded")
        transformer = self._generator.backbone.transformer
        # Never both on the GPU before the text encoder is as small as it will be.
        transformer.to("cpu")
        try:
            large = teacher.text_encoder()
            network = large.model
            if encoder in _QUANTIZED:
                quantize_text_encoder(network, _QUANTIZED[encoder])
            if offloads:
                network.to("cpu")
        finally:
            release_memory(self._device)
            transformer.to(self._device)
        if not offloads:
            return large.encode, _nothing, _nothing

        # As enable_model_cpu_offload of diffusers for the two large networks; the small VAE stays.
        def before() -> None:
            transformer.to("cpu")
            network.to(self._device)

        def after() -> None:
            network.to("cpu")
            transformer.to(self._device)

        return large.encode, before, after

    @torch.no_grad()
    def _picture(self, embed: Callable[[torch.Tensor], torch.Tensor], before: Any, after: Any) -> tuple[float, float]:
        """Seconds of the text embedding, and of the whole picture."""
        self._wait()
        began = time.perf_counter()
        before()
        embedding_BTD = embed(self._ids_BT.to(self._device))
        after()
        self._wait()
        encoded = time.perf_counter()
        conditioning = {name: rows.to(self._device) for name, rows in self._conditioning.items()}
        negative = None if self._negative is None else self._negative.on(self._device)
        self._generator.pictures(embedding_BTD, [self._text], conditioning, negative)
        self._wait()
        return encoded - began, time.perf_counter() - began

    def _planned(self) -> GpuMemory:
        teacher, manifest = self._training.teacher, self._training.cache.manifest
        settings = PictureSettings(
            student="", teacher="", text_length=manifest.teacher.text_length, height=self._size, width=self._size,
            steps=STEPS, schedule="diffusers", guidance=None if manifest.sampling.guidance is None else GUIDANCE,
            seed=0, dtype=teacher.dtype, pooled=manifest.teacher.pooled,
        )  # fmt: skip
        parameters = sum(parameter.numel() for parameter in self._training.student.parameters())
        cost = sampling_cost(settings, teacher.folder, batch_size=1, student_parameters=parameters)
        return cost.memory(WHOLE)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _nothing() -> None:
    pass
