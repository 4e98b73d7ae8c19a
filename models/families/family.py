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
from secondcast.storage_schemas.errors import SettingsError, TeacherError
from secondcast.storage_schemas.schema.fields import POOLED as POOLED
from secondcast.storage_schemas.schema.fields import TEXT_MASK as TEXT_MASK
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import (
    ConditioningArray,
    Dtype,
    LatentRule,
    Latents,
    Pooled,
    ScheduleName,
)

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry
    from secondcast.models.schedule import Schedule

Conditioning = Mapping[str, "torch.Tensor"]
"""What a transformer reads of a prompt besides the text, by the name of its argument or of the recorded array."""
CLIP_ROWS = "clip_hidden_states"

Role = Literal[
    "transformer",
    "scheduler",
    "vae",
    "large_text_encoder",
    "large_tokenizer",
    "pooled_text_encoder",
    "pooled_tokenizer",
    "second_pooled_text_encoder",
    "second_pooled_tokenizer",
]
"""What a part of a teacher is for. The large text encoder is the one that a student replaces."""


class ConditioningEncoder(ABC):
    """Frozen text encoders whose results are recorded beside the embedding."""

    networks: list[Any]

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> "dict[str, torch.Tensor]":
        """The conditioning of texts, by name; a row of each array for each text."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a teacher's folder.

    folder: its name in the folder.
    key, kind: the key of its configuration that names its class, and that class; None: it is not checked.
    also: other names of that class in configurations.
    needs: other keys that its configuration must have.
    loaded_as: class of transformers that reads its weights; None: `kind`, of diffusers.
    """

    folder: str
    key: str | None = None
    kind: str | None = None
    also: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    loaded_as: str | None = None


def t5_part(folder: str) -> Part:
    """T5 as the large text encoder."""
    needs = ("d_model", "vocab_size")
    return Part(folder=folder, key="model_type", kind="t5", needs=needs, loaded_as="T5EncoderModel")


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
    cross_attention: whether text enters every block: its gradient is a sum over them, reordered by streaming.
    last_differs: whether the last block of a transformer has other weights, so that a part of it needs one block more.
    """

    block_lists: tuple[BlockList, ...]
    modulation: tuple[str, ...]
    conditioning: str
    text_entry: str
    head: tuple[str, ...]
    cross_attention: bool = False
    last_differs: bool = False

    def blocks(self, transformer: "torch.nn.Module") -> "list[torch.nn.Module]":
        """All blocks, in the order of computation."""
        return [block for kind in self.block_lists for block in getattr(transformer, kind.attribute)]

    def block_count(self, config: Mapping[str, Any]) -> int:
        """Number of blocks of a transformer, by its configuration."""
        return sum(int(config[kind.count_key]) for kind in self.block_lists)

    def first_blocks(self, config: Mapping[str, Any], blocks: int) -> tuple[dict[str, int], tuple[str, ...]]:
        """How a transformer has its first `blocks` blocks alone.

        The keys of its configuration, and the modules that this one has too much: its head, and where the last block
        differs from the others one block.
        """
        counts, surplus = {}, self.head
        if self.last_differs and blocks < self.block_count(config):
            surplus = (*surplus, f"{self.block_lists[-1].attribute}.{blocks}")
            blocks += 1
        for kind in self.block_lists:
            counts[kind.count_key] = min(blocks, int(config[kind.count_key]))
            blocks -= counts[kind.count_key]
        return counts, surplus


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
    pooled: what the pooled vector may be, the default first.
    guidance_rule: "embedded" where the transformer reads the guidance scale or none at all; "cfg" for classifier-free
        guidance in one call, the rows of the negative prompt first.
    guidance: the scales of a new cache, as `build --guidance` takes them.
    attention_backends: whether the transformer takes the attention backends of diffusers.
    masks_text: whether text encoder and transformer read the tokens of the text alone, and not the padding behind it.
    text_cleaning: how the pipeline changes a text before it is tokenised; None: not at all.
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
    pooled: tuple[Pooled, ...] = ("zero", "clip")
    guidance_rule: Literal["embedded", "cfg"] = "embedded"
    guidance: str = "2.0:5.0:0.5"
    attention_backends: bool = True
    masks_text: bool = False
    text_cleaning: Literal["clean-caption"] | None = None

    @property
    def latents(self) -> Latents:
        """How a new cache has its latents; those of guided trajectories do not follow from conditional predictions."""
        return "stored" if self.guidance_rule == "cfg" else "derived"

    @property
    def rows_per_call(self) -> int:
        """Rows of a call of the transformer for one image: 2 with those of the negative prompt."""
        return 2 if self.guidance_rule == "cfg" else 1

    def longest_side(self, config: Mapping[str, Any]) -> int | None:
        """The most image tokens per side that a transformer takes; None if unlimited."""
        return None

    def check_schedule_name(self, name: ScheduleName) -> None:
        """Raise TeacherError for another schedule than the pipeline's."""
        if name != "diffusers":
            raise TeacherError(
                f"--schedule is {name}, expected diffusers: {self.pipeline} has no other schedule; remove it"
            )

    def check_guidance(self, scales: Sequence[float]) -> None:
        """Raise SettingsError for a scale at which the pipeline switches classifier-free guidance off."""
        low = [scale for scale in scales if scale <= 1]
        if self.guidance_rule == "cfg" and low:
            raise SettingsError(
                f"--guidance has {low[0]:g}, expected scales above 1: {self.title} is sampled with classifier-free "
                f"guidance, which {self.pipeline} switches off at 1; give larger ones"
            )

    def pooled_choice(self, asked: Pooled | None) -> Pooled:
        """The pooled vectors asked for, or the family's; SettingsError for what it does not read."""
        if asked is not None and asked not in self.pooled:
            reads = "CLIP's pooled vectors" if self.pooled == ("clip",) else "no pooled vector"
            raise SettingsError(
                f"--pooled is {asked}, expected {self.pooled[0]}: {self.title} reads {reads}; remove it"
            )
        return asked or self.pooled[0]

    @property
    def conditioning_roles(self) -> tuple[tuple[Role, Role], ...]:
        """The text encoders beside the large one, each with its tokenizer."""
        pairs: tuple[tuple[Role, Role], ...] = (
            ("pooled_text_encoder", "pooled_tokenizer"),
            ("second_pooled_text_encoder", "second_pooled_tokenizer"),
        )
        return tuple(pair for pair in pairs if pair[0] in self.parts)

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

    def tiny_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of a small transformer with the attention heads of another one, without guidance.

        Of families whose transformers take attention backends.
        """
        raise TypeError(f"the transformer of {self.title} takes no attention backend")

    @abstractmethod
    def text_width(self, config: Mapping[str, Any]) -> int:
        """D, of the configuration of a transformer."""

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """P, of the configuration of a transformer; 0 without pooled vectors."""
        return 0

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """Texts as the pipeline tokenises them; MissingExtraError if that needs another package."""
        return list(texts)

    @abstractmethod
    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """Whether trajectories depend on a guidance scale."""

    @abstractmethod
    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """C, of the configuration of a transformer: channels of the image tokens that it reads."""

    def conditioning_arrays(self, clip_configs: Sequence[Mapping[str, Any]]) -> tuple[ConditioningArray, ...] | None:
        """What is recorded of each prompt besides embedding and pooled vector, by the configurations of the CLIPs."""
        return None

    def pooled_outputs(self, clip_configs: Sequence[Mapping[str, Any]]) -> int:
        """Width of the pooled vector that these CLIPs give together."""
        return 0

    def conditioning_encoder(
        self, folders: Mapping[Role, Path], *, dtype: "torch.dtype", device: "torch.device"
    ) -> ConditioningEncoder:
        """Load the text encoders beside the large one.

        folders: of `conditioning_roles`.
        """
        raise TypeError(f"{self.title} has no text encoder beside the large one")

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
        conditioning: "Conditioning",
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
        conditioning: "Conditioning",
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        positions: "Mapping[str, torch.Tensor]",
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """hidden_states_BSI and encoder_hidden_states_BTI after the first `blocks` blocks, as in `call`.

        I: inner width. Runs nothing behind these blocks, so that the transformer may lack it.
        """

    def embedded_conditions(
        self,
        embed: "torch.nn.Module",
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        pooled_projections_BP: "torch.Tensor",
    ) -> "torch.Tensor":
        """embedded_BI: the anatomy's `conditioning` called as the transformer's forward calls it, in its dtype.

        Of families with modulation weights.
        """
        raise TypeError(f"the transformer of {self.title} has no modulation weights")

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

    def reference_inputs(
        self, conditioning: Conditioning, embedding_BTD: "torch.Tensor", *, negative: bool = False
    ) -> dict[str, Any]:
        """Text as the arguments of the pipeline: for the prompts, or for the negative prompt."""
        before = "negative_" if negative else ""
        return {f"{before}prompt_embeds": embedding_BTD, f"{before}pooled_prompt_embeds": conditioning[POOLED]}

    def unpacked(self, latent_BSC: "torch.Tensor", geometry: "Geometry") -> "torch.Tensor":
        """Packed latents as the pipeline takes and returns them."""
        return latent_BSC

    def packed(self, latent: "torch.Tensor") -> "torch.Tensor":
        """The inverse of `unpacked`."""
        return latent

    @abstractmethod
    def image_size(self, *, height: int, width: int) -> dict[str, int]:
        """The arguments of the pipeline for images of this size."""
