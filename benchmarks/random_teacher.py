"""A teacher with random weights made on the device, from configurations; a student for it, and caches of its walks."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel

from secondcast.cache_builder.opening.new_manifest import outline_manifest
from secondcast.cache_builder.sample_stage import run_sample_stage
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.cache_builder.text_stage import run_text_stage
from secondcast.models.backbone import Backbone
from secondcast.models.cost.students import student_config
from secondcast.models.geometry import recorded_geometry
from secondcast.models.schedule import DTYPES
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.models.teacher.planned import planned_teacher
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.prompts import Prompt, prompt_id
from secondcast.storage_schemas.writer import CacheWriter, prompt_set_fields

SEED = 0
# Words of a prompt, in tokens; the rest of the text is padding.
PROMPT_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Image size in pixels and text length in tokens; None: the teacher's own size."""

    resolution: int | None = None
    text_length: int

    @property
    def name(self) -> str:
        """512-77: pixels, then tokens."""
        return f"{self.resolution or 'own'}-{self.text_length}"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is. matmul: side of the square matrices whose product gives the matrix rate.

    small_student: for the smallest cards. compiler: torch.compile's backend for compiled blocks.
    """

    teacher: str
    student: str
    small_student: str
    dtype: str
    compiler: str
    shapes: tuple[Shape, ...]
    batch_sizes: tuple[int, ...]
    matmul: int

    def manifest(self, shape: Shape, *, steps: int) -> Manifest:
        """Of a cache of as many prompts as the largest batch has rows."""
        settings = PlannedBuild(
            resolution=shape.resolution,
            text_length=shape.text_length,
            steps=steps,
            dtype=self.dtype,
            compression="none",
        )
        return outline_manifest(settings, planned_teacher(self.teacher)[0], prompt_count=max(self.batch_sizes))


SCALES = {
    "full": Scale(
        teacher="FLUX.1-dev",
        student="google-t5/t5-base",
        small_student="google-t5/t5-small",
        dtype="bfloat16",
        compiler="inductor",
        shapes=(
            Shape(resolution=512, text_length=77),
            Shape(resolution=512, text_length=512),
            Shape(resolution=1024, text_length=77),
        ),
        batch_sizes=(1, 4),
        matmul=8192,
    ),
    # In fp32, so that losses of different ways can be compared closely; compiled code is traced and run uncompiled.
    "tiny": Scale(
        teacher=str(TEACHER_FOLDER),
        student=str(STUDENTS_FOLDER / "small"),
        small_student=str(STUDENTS_FOLDER / "tiny"),
        dtype="float32",
        compiler="aot_eager",
        shapes=(Shape(text_length=24),),
        batch_sizes=(1, 2),
        matmul=256,
    ),
}


def random_transformer(scale: Scale, device: torch.device, home: torch.device | None = None) -> FluxTransformer2DModel:
    """The backbone, the same weights each time; made on the device part by part, left on `home` (the device)."""
    config = planned_teacher(scale.teacher)[0].config("transformer")
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    parts: list[torch.nn.Module] = []
    for child in model.children():
        parts += child if isinstance(child, torch.nn.ModuleList) else [child]
    _fill(parts, DTYPES[scale.dtype], device, home or device)
    return model.eval().requires_grad_(False)


def random_text_encoder(scale: Scale, device: torch.device) -> TeacherTextEncoder:
    """T5-XXL's encoder, the same weights each time."""
    config = planned_teacher(scale.teacher)[0].config("large_text_encoder")
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(config))
    _fill([model], DTYPES[scale.dtype], device, device)
    return TeacherTextEncoder(model)


def random_student(source: str, manifest: Manifest, device: torch.device) -> SecondcastStudent:
    """An fp32 student to train, the same weights each time; source: of its configuration."""
    torch.manual_seed(SEED)
    config = student_config(source).to_dict()
    config.pop("model_type", None)
    teacher = manifest.teacher
    # Made where it will be: a CPU takes seconds for a large one.
    with device:
        student = SecondcastStudent(
            StudentConfig(
                project_in_dim=config["d_model"],
                project_out_dim=teacher.text_width,
                text_length=teacher.text_length,
                **config,
            )
        )
    return student.float().to(device).train()


def record(
    folder: Path, manifest: Manifest, text_encoder: TeacherTextEncoder, transformer: FluxTransformer2DModel
) -> Cache:
    """A cache of the teacher's walks, written by the stages of a build."""
    prompts = _prompts(manifest)
    prompt_set = manifest.prompts.model_copy(update=prompt_set_fields(prompts))
    teacher = planned_teacher(manifest.source)[0]
    manifest = manifest.model_copy(update={"prompts": prompt_set})
    writer = CacheWriter.create_or_resume(str(folder), manifest, prompts, teacher.tokenizer_files())
    how: dict[str, Any] = {"done": 0, "share": len(prompts), "batch_size": len(prompts), "progress": Silent()}
    run_text_stage(writer, text_encoder, writer.missing("embeddings"), **how)
    backbone = Backbone(transformer, recorded_geometry(manifest.sampling), text_length=manifest.teacher.text_length)
    run_sample_stage(writer, Cache.open(str(folder)), backbone, writer.missing("trajectories"), **how)
    writer.finish()
    return Cache.open(str(folder))


def _prompts(manifest: Manifest) -> list[Prompt]:
    draw = torch.Generator().manual_seed(SEED)
    vocabulary = int(manifest.teacher.text_encoder_config["vocab_size"])
    count = min(PROMPT_TOKENS, manifest.teacher.text_length) - 1
    texts = [f"prompt {number}" for number in range(manifest.prompts.count)]
    ids = torch.randint(3, vocabulary, (len(texts), count), generator=draw).tolist()
    return [
        Prompt(id=prompt_id(text), text=text, sources=("random",), token_ids=(*row, 1))
        for text, row in zip(texts, ids, strict=True)
    ]


def _fill(modules: Iterable[torch.nn.Module], dtype: torch.dtype, device: torch.device, home: torch.device) -> None:
    """Random matrices that keep the size of what passes; norms 1, biases 0."""
    draw = torch.Generator(device).manual_seed(SEED)
    for module in modules:
        module.to(dtype).to_empty(device=device)
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=draw)
            else:
                parameter.data.fill_(float(name.endswith("weight")))
        module.to(home)
