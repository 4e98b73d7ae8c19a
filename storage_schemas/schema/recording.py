"""How the rows of a cache were recorded and are stored: the sections `sampling` and `text` of a manifest."""

from typing import Any, Literal, Self

from pydantic import Field, SerializationInfo, SerializerFunctionWrapHandler, model_serializer, model_validator

from secondcast.storage_schemas.schema.json_files import Record

Dtype = Literal["bfloat16", "float32"]
Format = Literal["zarr", "webdataset"]
Latents = Literal["derived", "stored"]
CodecName = Literal["none", "lossless", "int8"]
Embeddings = Literal["stored", "none"]
Pooled = Literal["zero", "clip"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
ScheduleName = Literal["diffusers", "distillt5"]
LatentRule = Literal["flow-match-euler", "scheduler"]
"""How x_{k+1} follows from x_k and v_k (storage_schemas/schema/derivation.py).

"scheduler": by the recorded scheduler, whose steps also depend on earlier ones.
"""


class ArrayStorage(Record):
    """How the arrays of a cache are stored on disk."""

    format: Format
    compression: CodecName


class Storage(ArrayStorage):
    """How a cache with trajectories is stored. `embeddings` "none": a finished cache has no teacher embeddings."""

    latents: Latents
    embeddings: Embeddings = "stored"

    @model_validator(mode="after")
    def _int8_stores_latents(self) -> Self:
        if problem := int8_problem(self.compression, self.latents):
            raise ValueError(problem)
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_always_so(self, plain: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        # Caches from before this choice existed do not have this key, and keep their digests.
        value = plain(self)
        if self.embeddings == "stored" and info.context != "all keys":
            del value["embeddings"]
        return value


class Sampling(Record):
    """How the teacher was sampled.

    sigmas: K + 1 values in [0, 1].
    timesteps: the K timesteps as the backbone received them: of FLUX.1 rounded to `dtype` (0.972.., not 972).
    guidance: the values one of which is drawn per trajectory; None where the backbone takes no guidance.
    quantize: quantization of the weights of the backbone's blocks.
    scheduler: configuration of the scheduler, for the latent rule of that name; else None.
    negative_prompt: of classifier-free guidance: the latents follow the guided prediction, and velocity is the
        conditional one; the prompt's rows are those of prompt number NEGATIVE. None without.
    """

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    image_tokens: int = Field(ge=1)
    channels: int = Field(ge=1)
    steps: int = Field(ge=1)
    schedule: ScheduleName
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    guidance: tuple[float, ...] | None
    seed: int = Field(ge=0, lt=2**63)
    noise: Literal["philox-float32"]
    dtype: Dtype
    latent_rule: LatentRule
    quantize: Quantization = "none"
    scheduler: dict[str, Any] | None = None
    negative_prompt: str | None = None
    storage: Storage

    @model_validator(mode="after")
    def _a_scheduler_is_recorded_where_it_is_needed(self) -> Self:
        if (self.latent_rule == "scheduler") != (self.scheduler is not None):
            stated = "null" if self.scheduler is None else "stated"
            raise ValueError(f"scheduler is {stated} with latent_rule {self.latent_rule!r}")
        if self.latent_rule == "scheduler" and self.storage.latents == "derived":
            raise ValueError("latents are derived with latent_rule 'scheduler', expected stored")
        return self

    @model_validator(mode="after")
    def _guided_latents_are_stored(self) -> Self:
        if problem := guided_problem(self.negative_prompt, self.storage.latents):
            raise ValueError(problem)
        return self

    @property
    def rows_per_call(self) -> int:
        """Rows of a call of the backbone for one trajectory: 2 with those of the negative prompt."""
        return 1 if self.negative_prompt is None else 2

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if len(self.sigmas) != self.steps + 1 or len(self.timesteps) != self.steps:
            raise ValueError(
                f"steps is {self.steps}, sigmas are {len(self.sigmas)} and timesteps {len(self.timesteps)}, expected "
                f"{self.steps + 1} and {self.steps}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_always_so(self, plain: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        # Caches from before these choices existed do not have these keys, and keep their digests.
        value = plain(self)
        if self.quantize == "none" and info.context != "all keys":
            del value["quantize"]
        for name in ("scheduler", "negative_prompt"):
            if value[name] is None:
                del value[name]
        return value


class TextRecording(Record):
    """How the embeddings of a text cache were recorded."""

    dtype: Dtype
    storage: ArrayStorage

    @model_validator(mode="after")
    def _has_no_predictions(self) -> Self:
        if problem := text_compression_problem(self.storage.compression):
            raise ValueError(problem)
        return self


def int8_problem(codec: CodecName, latents: str) -> str | None:
    """Why this compression is incompatible with these latents, and the fix; None if it is compatible."""
    if codec != "int8" or latents == "stored":
        return None
    return "compression int8 rounds the velocity, but latents are derived from the exact one; use --latents stored"


def guided_problem(negative_prompt: str | None, latents: str) -> str | None:
    """Why a cache with classifier-free guidance cannot have these latents, and the fix; None if it can."""
    if negative_prompt is None or latents == "stored":
        return None
    return (
        "latents follow from guided predictions, of which a cache has the conditional parts alone; use --latents stored"
    )


def pooled_problem(pooled: Pooled, embeddings: Embeddings) -> str | None:
    """Why these pooled vectors are incompatible with this choice of embeddings, and the fix; None if compatible."""
    if pooled == "zero" or embeddings == "stored":
        return None
    return "replay needs CLIP's pooled vectors, which are stored with the embeddings; use --store-embeddings"


def text_compression_problem(codec: CodecName) -> str | None:
    """Why a text cache cannot have this compression, and the fix; None if it can."""
    if codec != "int8":
        return None
    return "compression int8 rounds predictions, of which a text cache has none; use lossless or none"
