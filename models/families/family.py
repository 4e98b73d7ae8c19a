"""What a family of teachers states about itself: everything in which FLUX.1 differs from other models.

A family is stateless. Its module imports torch and diffusers only within functions, because `plan`, `inspect show` and
the checks of a teacher's folder need neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secondcast.models.families.flow_match import PlannedSchedule
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import Dtype, LatentRule, ScheduleName

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry
    from secondcast.models.schedule import Schedule

Role = Literal[
    "transformer",
    "scheduler",
    "vae",
    "large_text_encoder",
    "large_tokenizer",
    "pooled_text_encoder",
    "pooled_tokenizer",
]
"""What a part of a teacher is for. The large text encoder is the one that a student replaces."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a teacher's folder.

    folder: its name in the folder.
    key, kind: the key of its configuration that names its class, and that class; None: it is not checked.
    needs: other keys that its configuration must have.
    """

    folder: str
    key: str | None = None
    kind: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A list of equal blocks of a transformer.

    attribute: of the transformer.
    count_key: key of the configuration with the number of its blocks.
    joint: whether its blocks join text and image tokens to one sequence.
    """

    attribute: str
    count_key: str
    joint: bool = False


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the networks of a transformer are, for memory options, costs and losses.

    block_lists: in the order of computation.
    modulation: endings of the names of the linears whose only inputs are timestep, guidance and pooled, so that no
        gradient passes through them.
    conditioning: the module that computes their input; its result is the `temb` of each block.
    text_entry: the tensor through which text embeddings enter.
    head: the modules that follow the blocks.
    """

    block_lists: tuple[BlockList, ...]
    modulation: tuple[str, ...]
    conditioning: str
    text_entry: str
    head: tuple[str, ...]

    def blocks(self, transformer: "torch.nn.Module") -> "list[torch.nn.Module]":
        """All blocks, in the order of computation."""
        return [block for kind in self.block_lists for block in getattr(transformer, kind.attribute)]

    def block_count(self, config: Mapping[str, Any]) -> int:
        """Number of blocks of a transformer, by its configuration."""
        return sum(int(config[kind.count_key]) for kind in self.block_lists)

    def first_blocks(self, config: Mapping[str, Any], blocks: int) -> dict[str, int]:
        """The keys of a configuration with which a transformer has its first `blocks` blocks alone."""
        counts = {}
        for kind in self.block_lists:
            counts[kind.count_key] = min(blocks, int(config[kind.count_key]))
            blocks -= counts[kind.count_key]
        return counts


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A kind of teacher.

    name: in manifests. title: in texts. owner: of its models on the hub. models: their names.
    non_commercial: those of `models` whose licence restricts derivatives and outputs.
    pipeline: class of diffusers, in model_index.json and in usage examples.
    parts: by role; the folder of the large text encoder is the slot of the pipeline that a student takes.
    text_length: text tokens of a new cache, unless the tokenizer takes fewer.
    largest_text_length: the most that the pipeline accepts.
    latent_rule: how x_{k+1} follows from x_k and v_k.
    """

    name: str
    title: str
    owner: str
    models: tuple[str, ...]
    non_commercial: tuple[str, ...]
    pipeline: str
    parts: Mapping[Role, Part]
    text_length: int
    largest_text_length: int
    latent_rule: LatentRule
    anatomy: Anatomy

    @property
    def transformer(self) -> str:
        """The class of the transformer in diffusers."""
        return str(self.parts["transformer"].kind)

    @property
    def slot(self) -> str:
        """The argument of the pipeline that takes a student."""
        return self.parts["large_text_encoder"].folder

    @property
    def tokenizer_slot(self) -> str:
        """The argument of the pipeline that takes the tokenizer of a student."""
        return self.parts["large_tokenizer"].folder

    @abstractmethod
    def check_transformer(self, config: Mapping[str, Any], file: str) -> None:
        """Raise TeacherError for a transformer that has the right class but is called in another way."""

    @abstractmethod
    def tiny_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of a small transformer with the attention heads of another one, without guidance."""

    @abstractmethod
    def text_width(self, config: Mapping[str, Any]) -> int:
        """D, of the configuration of a transformer."""

    @abstractmethod
    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """P, of the configuration of a transformer."""

    @abstractmethod
    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """Whether a transformer embeds the guidance scale."""

    @abstractmethod
    def token_px(self, vae_config: Mapping[str, Any]) -> int:
        """Pixels per side of an image token."""

    @abstractmethod
    def token_channels(self, vae_config: Mapping[str, Any]) -> int:
        """C, of the latents of a VAE."""

    @abstractmethod
    def vae_input(
        self, latent_BSC: "torch.Tensor", geometry: "Geometry", vae_config: Mapping[str, Any]
    ) -> "torch.Tensor":
        """Packed latents as the VAE decodes them."""

    @abstractmethod
    def schedule(
        self,
        name: ScheduleName,
        scheduler_config: dict[str, Any],
        *,
        steps: int,
        image_tokens: int,
        dtype: "torch.dtype",
    ) -> "Schedule":
        """The schedule by its name in manifests; `dtype` is that of the latents."""

    def planned_schedule(
        self, name: ScheduleName, scheduler_config: dict[str, Any], *, steps: int, image_tokens: int, dtype: Dtype
    ) -> PlannedSchedule:
        """The same sigmas and timesteps for a plan; a family that can computes them without torch."""
        from secondcast.models.schedule import DTYPES

        schedule = self.schedule(name, scheduler_config, steps=steps, image_tokens=image_tokens, dtype=DTYPES[dtype])
        return schedule.sigmas, schedule.timesteps

    @abstractmethod
    def timestep_dtype(self, dtype: "torch.dtype") -> "torch.dtype":
        """The dtype in which the transformer receives timesteps if latents have `dtype`."""

    @abstractmethod
    def predicted_clean_latent(self, x_SC: Array, prediction_SC: Array, sigma: float) -> Array:
        """The clean latent that the prediction of a step implies, [S, C] fp32."""

    @abstractmethod
    def positions(
        self, geometry: "Geometry", text_length: int, *, device: "torch.device", dtype: "torch.dtype"
    ) -> "dict[str, torch.Tensor]":
        """Arguments of the transformer that depend on shapes alone."""

    @abstractmethod
    def call(
        self,
        transformer: Any,
        hidden_states_BSC: "torch.Tensor",
        encoder_hidden_states_BTD: "torch.Tensor",
        pooled_projections_BP: "torch.Tensor",
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        positions: "Mapping[str, torch.Tensor]",
    ) -> "torch.Tensor":
        """The prediction, [B, S, C], exactly as the pipeline asks for it."""

    @abstractmethod
    def streams(
        self,
        transformer: Any,
        blocks: int,
        hidden_states_BSC: "torch.Tensor",
        encoder_hidden_states_BTD: "torch.Tensor",
        pooled_projections_BP: "torch.Tensor",
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        positions: "Mapping[str, torch.Tensor]",
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """hidden_states_BSI and encoder_hidden_states_BTI after the first `blocks` blocks, as in `call`.

        I: inner width. Runs nothing behind these blocks, so that the transformer may lack it.
        """

    @abstractmethod
    def embedded_conditions(
        self,
        embed: "torch.nn.Module",
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        pooled_projections_BP: "torch.Tensor",
    ) -> "torch.Tensor":
        """embedded_BI: the anatomy's `conditioning` called as the transformer's forward calls it, in its dtype."""

    @abstractmethod
    def reference(self, transformer: Any, scheduler_config: dict[str, Any], vae_config: dict[str, Any]) -> Any:
        """The unmodified pipeline around a transformer, without text encoders and without the weights of the VAE."""

    @abstractmethod
    def reference_embedding(
        self, folder: Path, text_encoder: Any, texts: Sequence[str], *, text_length: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """encoder_hidden_states_BTD and token_ids_BT that the unmodified pipeline of a folder gives.

        text_encoder: the large one, loaded; the pipeline reads the others and the tokenizers.
        """

    @abstractmethod
    def image_size(self, *, height: int, width: int) -> dict[str, int]:
        """The arguments of the pipeline for images of this size."""
