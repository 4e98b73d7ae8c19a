"""What a family of teachers states about itself: everything in which one differs from the others.

A family is stateless. Its module imports torch and diffusers only within functions, because `plan`, `inspect show` and
the checks of a teacher's folder need neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secondcast.models.families.anatomy import Anatomy
from secondcast.models.families.encoders.interface import Conditioning, ConditioningEncoder, TextTokenizer
from secondcast.models.families.flow_match import PlannedSchedule
from secondcast.models.families.licences import Licence
from secondcast.storage_schemas.errors import SettingsError, TeacherError
from secondcast.storage_schemas.schema import derivation
from secondcast.storage_schemas.schema.fields import POOLED as POOLED
from secondcast.storage_schemas.schema.fields import TEXT_MASK as TEXT_MASK
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import ConditioningArray
from secondcast.storage_schemas.schema.recording import Dtype, LatentRule, Latents, Pooled, ScheduleName

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry
    from secondcast.models.schedule import Schedule
    from secondcast.models.weights.files import CheckpointSource

LATENTS_PER_SIDE = 2
"""Latents per side of an image token: of all families."""

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


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A kind of teacher.

    name: in manifests. title: in texts. owner: of its models on the hub. licences: of its models, by their names.
    pipeline: class of diffusers, in model_index.json and in usage examples.
    pipeline_options: arguments of that class besides its parts.
    parts: by role; the folder of the large text encoder is the slot of the pipeline that a student takes.
    text_length: text tokens of a new cache, unless the tokenizer takes fewer.
    largest_text_length: the most that the pipeline accepts.
    latent_rule: how x_{k+1} follows from x_k and v_k.
    pooled: what the pooled vector may be, the default first.
    guidance_rule: "embedded" where the transformer reads the guidance scale or none at all; "cfg" for classifier-free
        guidance in one call, the rows of the negative prompt first; "none" where no model has a guidance scale.
    guidance: the scales of a new cache, as `build --guidance` takes them.
    attention_backends: whether the transformer takes the attention backends of diffusers.
    masks_text: whether text encoder and transformer read the tokens of the text alone, and not the padding behind it.
    text_layers: the hidden layers of the text encoder that are read, side by side; None: its last one.
    student: the usual student of a plan: a name of STUDENT_SIZES.
    controlnet: class of diffusers of its ControlNets; None: not supported.
    tokenizer_files: those of the large tokenizer, which caches and students include.
    text_cleaning: how the pipeline changes a text before it is tokenised; None: not at all.
    """

    name: str
    title: str
    owner: str
    licences: Mapping[str, Licence]
    pipeline: str
    parts: Mapping[Role, Part]
    text_length: int
    largest_text_length: int
    latent_rule: LatentRule
    anatomy: Anatomy
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    pooled: tuple[Pooled, ...] = ("zero", "clip")
    guidance_rule: Literal["embedded", "cfg", "none"] = "embedded"
    guidance: str = "2.0:5.0:0.5"
    attention_backends: bool = True
    masks_text: bool = False
    text_cleaning: Literal["clean-caption"] | None = None
    text_layers: tuple[int, ...] | None = None
    student: str = "base"
    controlnet: str | None = None
    tokenizer_files: tuple[str, ...] = (
        *("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    )

    @property
    def models(self) -> tuple[str, ...]:
        """Names of its models on the hub, without their owner."""
        return tuple(self.licences)

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
    def vae(self) -> str:
        """The class of the VAE in diffusers."""
        return str(self.parts["vae"].kind)

    @property
    def slot(self) -> str:
        """The argument of the pipeline that takes a student."""
        return self.parts["large_text_encoder"].folder

    @property
    def tokenizer_slot(self) -> str:
        """The argument of the pipeline that takes the tokenizer of a student."""
        return self.parts["large_tokenizer"].folder

    @property
    def makes_initial_students(self) -> bool:
        """Whether a student can be made out of the text encoder: it is T5, and padding counts like text."""
        return self.text_layers is None and not self.masks_text

    def check_index(self, index: Mapping[str, Any], file: str) -> None:
        """Raise TeacherError for a pipeline of the right class that samples in another way, by its model_index.json."""
        return

    def check_text_encoder(self, config: Mapping[str, Any], file: str) -> None:
        """Raise TeacherError for a text encoder of the right class that is not one of the family's."""
        return

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

    @abstractmethod
    def encoder_width(self, encoder_config: Mapping[str, Any]) -> int:
        """Values per token that a text encoder gives, by its configuration: D if transformer and encoder fit."""

    @abstractmethod
    def pad_token_id(self, encoder_config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]) -> int:
        """The token id that pads the token ids of a cache; tokenizer_files: by name, as far as they are there."""

    @abstractmethod
    def tokenizer(self, folder: Path) -> TextTokenizer:
        """The tokenizer in a folder, as the pipeline calls it. Raises TeacherError."""

    @abstractmethod
    def load_text_encoder(self, folder: Path, source: "CheckpointSource", dtype: "torch.dtype") -> Any:
        """The network of the large text encoder, as far as it is read, on the host. Raises source.error."""

    def loaded_name(self, stored: str) -> str | None:
        """The name in that network of a tensor of the text encoder's files; None for one that is not loaded."""
        return stored

    @abstractmethod
    def make_text_encoder(self, config: Mapping[str, Any]) -> Any:
        """The same with random weights by its configuration, on torch's current device."""

    @abstractmethod
    def encode(self, text_encoder: Any, token_ids_BT: "torch.Tensor", pad_token_id: int) -> "torch.Tensor":
        """encoder_hidden_states_BTD of padded token ids on the device of the network, without gradients."""

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """P, of the configuration of a transformer; 0 without pooled vectors."""
        return 0

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

    def token_px(self, vae_config: Mapping[str, Any]) -> int:
        """Pixels per side of an image token: the VAE halves the image in each block after the first."""
        return LATENTS_PER_SIDE * int(2 ** (len(vae_config["block_out_channels"]) - 1))

    def token_channels(self, vae_config: Mapping[str, Any]) -> int:
        """C, of the latents of a VAE."""
        return int(LATENTS_PER_SIDE**2 * vae_config["latent_channels"])

    @abstractmethod
    def vae_input(self, latent_BSC: "torch.Tensor", geometry: "Geometry", vae: Any) -> "torch.Tensor":
        """Packed latents as a VAE of diffusers decodes them."""

    def vae_output(self, latents: "torch.Tensor", vae: Any) -> "torch.Tensor":
        """The inverse of `vae_input`: packed latents, [B, S, C], of what a VAE of diffusers encodes.

        Of families with ControlNets.
        """
        raise TypeError(f"images are not encoded for {self.title}")

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

    def timestep_dtype(self, dtype: "torch.dtype") -> "torch.dtype":
        """The dtype in which the transformer receives timesteps if latents have `dtype`; by default the same."""
        return dtype

    def predicted_clean_latent(self, x_SC: Array, prediction_SC: Array, sigma: float) -> Array:
        """The clean latent that the prediction of a step implies, [S, C] fp32; by default that of flow matching.

        Of the conditional prediction with classifier-free guidance.
        """
        return derivation.predicted_clean_latent(x_SC, prediction_SC, sigma)

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

    def reference(self, transformer: Any, scheduler_config: dict[str, Any], vae_config: dict[str, Any]) -> Any:
        """The unmodified pipeline around a transformer, without text encoders and without the weights of the VAE."""
        import diffusers
        import torch

        # The pipeline only reads the latent size from the VAE, so its weights do not matter.
        with torch.device("meta"):
            vae = getattr(diffusers, self.vae).from_config(vae_config)
        scheduler = getattr(diffusers, str(self.parts["scheduler"].kind)).from_config(scheduler_config)
        there = {"transformer": transformer, "scheduler": scheduler, "vae": vae}
        absent = {part.folder: None for role, part in self.parts.items() if role not in there}
        pipeline = getattr(diffusers, self.pipeline)(**there, **absent, **self.pipeline_options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

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
        """Packed latents as the pipeline takes them."""
        return latent_BSC

    def packed(self, latent: "torch.Tensor") -> "torch.Tensor":
        """The inverse of `unpacked`."""
        return latent

    def final_latents(self, pipeline: Any, **call: Any) -> "torch.Tensor":
        """x_K, packed, of a call of the pipeline with these arguments."""
        latents: torch.Tensor = pipeline(**call, output_type="latent", return_dict=False)[0]
        return self.packed(latents)

    def image_size(self, *, height: int, width: int) -> dict[str, int]:
        """The arguments of the pipeline for images of this size."""
        return {"height": height, "width": width}
