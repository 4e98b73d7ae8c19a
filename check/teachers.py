"""The teacher of a check: one on disk, or a bundled configuration with random weights."""

import json
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secondcast.cache_builder.opening.new_manifest import has_negative, outline_manifest, plan_manifest
from secondcast.cache_builder.prompts.files import SourcedText
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.cache_builder.text_stage import negative_prompt, tokenised_prompts
from secondcast.check.random_weights import RandomConditioning, random_text_encoder, random_transformer, random_vae
from secondcast.models.backbone import Backbone
from secondcast.models.cost.shapes import STUDENT_SIZES
from secondcast.models.geometry import Geometry, recorded_geometry
from secondcast.models.memory.conditions import recorded_conditions
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.image_decoder import ImageDecoder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.pocket import STUDENTS_FOLDER
from secondcast.pocket.world import captions
from secondcast.storage_schemas.schema.fields import fields_of
from secondcast.storage_schemas.schema.manifest import NEGATIVE_TEXT, Manifest
from secondcast.storage_schemas.schema.prompts import Prompt, is_held_out, prompt_id
from secondcast.storage_schemas.schema.recording import Dtype
from secondcast.storage_schemas.writer import prompt_set_fields

RANDOM = {
    "random-flux": "FLUX.1-dev",
    "random-sd3": "stable-diffusion-3-medium-diffusers",
    "random-pixart": "PixArt-Sigma-XL-2-512-MS",
    "random-klein": "FLUX.2-klein-4B",
}
"""Teachers with random weights, and the bundled configurations that they have."""

WHOLE = MemoryOptions(modulation="gpu")
"""All weights on the device, as they are in the files."""
# Words of a random prompt, in tokens; the rest of the text is padding.
_RANDOM_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of a check.

    batch_size: trajectories of the cache, and rows of each optimizer step.
    steps: of a trajectory. training_steps: optimizer steps of a row that is timed.
    resolution, picture_resolution: of the cache and of pictures, in pixels; None: the teacher's own.
    student: the folder of a configuration of which a student with random weights is made; None: the family's usual one.
    """

    batch_size: int
    steps: int
    training_steps: int
    resolution: int | None
    picture_resolution: int | None
    student: Path | None = None


FULL = Scale(batch_size=4, steps=20, training_steps=6, resolution=512, picture_resolution=1024)
POCKET = Scale(
    batch_size=8,
    steps=20,
    training_steps=6,
    resolution=None,
    picture_resolution=None,
    student=STUDENTS_FOLDER / "small",
)


class CheckTeacher(ABC):
    """A teacher and the sizes at which it is checked.

    folder: its configuration files, and its weights where it has any.
    dtype: compute dtype and dtype of the cache.
    """

    def __init__(self, folder: TeacherFolder, scale: Scale, device: torch.device) -> None:
        self.folder, self.scale, self.device = folder, scale, device
        # fp32 is faster on CPUs without bf16 units, and comparisons are then exact.
        self.dtype: Dtype = "bfloat16" if device.type == "cuda" else "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch."""
        return DTYPES[self.dtype]

    @property
    def build_options(self) -> PlannedBuild:
        """The options of the cache."""
        return PlannedBuild(
            steps=self.scale.steps,
            resolution=self.scale.resolution,
            dtype=self.dtype,
            batch_size=self.scale.batch_size,
            shard_size=self.scale.batch_size,
        )

    @cached_property
    @abstractmethod
    def planned(self) -> tuple[Manifest, list[Prompt]]:
        """Manifest and prompts of the cache, none of them held out."""

    @property
    @abstractmethod
    def has_files(self) -> bool:
        """Whether weights and tokenizers are on disk."""

    @property
    def has_table(self) -> bool:
        """Whether a modulation table of the cache is possible."""
        return recorded_conditions([self.planned[0]], batch_rows=1) is not None

    @abstractmethod
    def text_encoder(self) -> TeacherTextEncoder:
        """The large text encoder, on the device."""

    @abstractmethod
    def transformer(self, *, on_host: bool = False) -> Any:
        """The unmodified transformer of diffusers, on the device or on the host."""

    @abstractmethod
    def backbone(self, options: MemoryOptions) -> Backbone:
        """The transformer as the product holds it with these options, at the sizes of the cache."""

    @abstractmethod
    def decoder(self, geometry: Geometry) -> ImageDecoder:
        """The VAE, on the device."""

    def student_source(self, folder: Path) -> str:
        """The source of a student's configuration, which may be written into `folder`."""
        if self.scale.student is not None:
            return str(self.scale.student)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "t5"} | STUDENT_SIZES[self.folder.family.student]
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        return str(folder)


class TeacherOnDisk(CheckTeacher):
    """The pocket teacher, or any other with its weights."""

    has_files = True

    @cached_property
    def planned(self) -> tuple[Manifest, list[Prompt]]:
        """See CheckTeacher. The captions of the pocket world serve any teacher."""
        texts = [text for text in captions(4 * self.scale.batch_size, seed=0, split="train")]
        texts = [text for text in texts if not is_held_out(prompt_id(text))][: self.scale.batch_size]
        prompts, _ = tokenised_prompts([SourcedText(text=text, sources=("check",)) for text in texts], self.folder)
        if has_negative(self.build_options, self.folder):
            prompts = [negative_prompt(self.folder), *prompts]
        return plan_manifest(self.build_options, self.folder, prompts), prompts

    def text_encoder(self) -> TeacherTextEncoder:
        """See CheckTeacher."""
        pooled = self.planned[0].teacher.pooled
        return TeacherTextEncoder.load(self.folder, dtype=self.torch_dtype, device=self.device, pooled=pooled)

    def transformer(self, *, on_host: bool = False) -> Any:
        """See CheckTeacher."""
        import diffusers

        part = self.folder.part("transformer")
        with warnings.catch_warnings():
            # Newer versions of diffusers name it dtype, older ones do not know that.
            warnings.simplefilter("ignore", FutureWarning)
            model = getattr(diffusers, self.folder.family.transformer).from_pretrained(
                part, torch_dtype=self.torch_dtype
            )
        return model.to("cpu" if on_host else self.device).eval().requires_grad_(False)

    def backbone(self, options: MemoryOptions) -> Backbone:
        """See CheckTeacher."""
        manifest = self.planned[0]
        return Backbone.load(
            self.folder.path,
            recorded_geometry(manifest.sampling),
            text_length=manifest.teacher.text_length,
            dtype=self.torch_dtype,
            device=self.device,
            options=options,
            conditions=recorded_conditions([manifest], batch_rows=self.scale.batch_size),
            pooled_varies=manifest.teacher.pooled == "clip",
        )

    def decoder(self, geometry: Geometry) -> ImageDecoder:
        """See CheckTeacher."""
        return ImageDecoder.load(self.folder, geometry, device=self.device)


class RandomTeacher(CheckTeacher):
    """A configuration with random weights, which are made again for each use, always the same."""

    has_files = False

    @cached_property
    def planned(self) -> tuple[Manifest, list[Prompt]]:
        """See CheckTeacher. No tokenizer is there: token ids are random."""
        manifest = outline_manifest(self.build_options, self.folder, prompt_count=self.scale.batch_size)
        vocabulary = int(manifest.teacher.text_encoder_config["vocab_size"])
        draw, tokens = torch.Generator().manual_seed(0), min(_RANDOM_TOKENS, manifest.teacher.text_length)
        prompts: list[Prompt] = []
        number, ends = 0, (1,)
        if has_negative(self.build_options, self.folder):
            identity = prompt_id(NEGATIVE_TEXT)
            prompts.append(Prompt(id=identity, text=NEGATIVE_TEXT, sources=("negative",), token_ids=ends))
        while len(prompts) < manifest.prompts.count:
            text, number = f"prompt {number}", number + 1
            ids = torch.randint(3, vocabulary, (tokens - 1,), generator=draw).tolist()
            if not is_held_out(prompt_id(text)):
                prompts.append(Prompt(id=prompt_id(text), text=text, sources=("check",), token_ids=(*ids, *ends)))
        stated = manifest.prompts.model_copy(update=prompt_set_fields(prompts))
        return manifest.model_copy(update={"prompts": stated}), prompts

    def text_encoder(self) -> TeacherTextEncoder:
        """See CheckTeacher."""
        fields = [field for field in fields_of(self.planned[0], "embeddings") if field.name != "encoder_hidden_states"]
        beside = RandomConditioning(fields, self.torch_dtype, self.device) if fields else None
        model = random_text_encoder(self.folder, self.torch_dtype, self.device)
        pad_token_id = self.folder.pad_token_id
        return TeacherTextEncoder(model, self.folder.family, pad_token_id=pad_token_id, conditioning=beside)

    def transformer(self, *, on_host: bool = False) -> Any:
        """See CheckTeacher."""
        home = torch.device("cpu") if on_host else self.device
        return random_transformer(self.folder, self.torch_dtype, self.device, home)

    def backbone(self, options: MemoryOptions) -> Backbone:
        """See CheckTeacher."""
        manifest = self.planned[0]
        return Backbone.holding(
            # The device need not hold more than what the options leave there.
            self.transformer(on_host=options != WHOLE),
            recorded_geometry(manifest.sampling),
            family=self.folder.family,
            text_length=manifest.teacher.text_length,
            device=self.device,
            options=options,
            conditions=recorded_conditions([manifest], batch_rows=self.scale.batch_size),
            pooled_varies=manifest.teacher.pooled == "clip",
        )

    def decoder(self, geometry: Geometry) -> ImageDecoder:
        """See CheckTeacher."""
        return ImageDecoder(random_vae(self.folder, self.device), self.folder.family, geometry)
