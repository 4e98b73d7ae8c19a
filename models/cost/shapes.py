"""What is counted: the configuration of a network and the shapes of its calls. Keys of the table of counted costs."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from secondcast.models.families.family import Family
from secondcast.models.families.registry import family_named
from secondcast.models.geometry import Geometry
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.manifest import ConditioningArray, Manifest, Teacher
from secondcast.storage_schemas.schema.recording import Dtype

_T5: dict[str, Any] = {"d_kv": 64, "vocab_size": 32128, "is_encoder_decoder": False, "use_cache": False}
_V1_1, _FIRST = _T5 | {"feed_forward_proj": "gated-gelu"}, _T5 | {"feed_forward_proj": "relu"}
_SMALL = {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
_BASE = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
_LARGE = {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
_XL = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000, "max_position_embeddings": 40960,
    "use_cache": False,
}  # fmt: skip
# The sizes of published encoders, so that planning needs no network.
STUDENT_SIZES: dict[str, dict[str, Any]] = {
    **{
        name: _V1_1 | size
        for name, size in zip(("small", "base", "large", "xl"), (_SMALL, _BASE, _LARGE, _XL), strict=True)
    },
    "google/t5-v1_1-small": _V1_1 | _SMALL,
    "google/t5-v1_1-base": _V1_1 | _BASE,
    "google/t5-v1_1-large": _V1_1 | _LARGE,
    "google/t5-v1_1-xl": _V1_1 | _XL,
    "google-t5/t5-small": _FIRST | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "google-t5/t5-base": _FIRST | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "google-t5/t5-large": _FIRST | {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "Qwen/Qwen3-0.6B": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072},
    "Qwen/Qwen3-1.7B": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144},
}


def fits_tokens(config: Mapping[str, Any], text_layers: tuple[int, ...] | None) -> bool:
    """Whether an encoder reads the tokens of a teacher: T5's, or those of a language model with these layers."""
    return (config.get("model_type", "t5") == "t5") == (text_layers is None)


class Shapes(Record):
    """A network's configuration and the shapes of its calls."""

    network: ClassVar[str]
    config: dict[str, Any]

    @property
    def key(self) -> str:
        """A readable text of all values, with a digest of the configuration."""
        values = {name: digest(value) if name == "config" else value for name, value in self.json_value().items()}
        return " ".join([self.network, *(f"{name}={value}" for name, value in values.items())])


class CallShapes(Shapes):
    """Of a transformer.

    conditioning: what it reads of a prompt besides text and pooled vector. masked: whether it takes a mask of the text.
    """

    network: ClassVar[str] = "transformer"
    family: str
    image_tokens: int
    channels: int
    text_length: int
    text_width: int
    pooled_width: int
    takes_guidance: bool
    dtype: Dtype
    conditioning: tuple[ConditioningArray, ...] | None = None
    masked: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of text and image that the blocks compute with."""
        return self.image_tokens + self.text_length + sum(array.shape[0] for array in self.conditioning or ())

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The calls of a (planned) cache, at its image size and text length, in its dtype."""
        sampling, teacher = manifest.sampling, manifest.teacher
        return cls(
            family=teacher.family,
            config=teacher.backbone_config,
            image_tokens=sampling.image_tokens,
            channels=sampling.channels,
            text_length=teacher.text_length,
            text_width=teacher.text_width,
            pooled_width=teacher.pooled_width,
            takes_guidance=sampling.guidance is not None,
            dtype=sampling.dtype,
            conditioning=teacher.conditioning,
            masked=teacher.text_mask is not None,
        )

    @classmethod
    def of_teacher(
        cls,
        family: Family,
        config: dict[str, Any],
        geometry: Geometry,
        *,
        text_length: int,
        dtype: Dtype,
        conditioning: tuple[ConditioningArray, ...] | None = None,
    ) -> Self:
        """The calls of a teacher's transformer by its configuration."""
        return cls(
            family=family.name,
            config=config,
            image_tokens=geometry.image_tokens,
            channels=geometry.channels,
            text_length=text_length,
            text_width=family.text_width(config),
            pooled_width=family.pooled_width(config),
            takes_guidance=family.takes_guidance(config),
            dtype=dtype,
            conditioning=conditioning,
            masked=family.masks_text,
        )


class TextEncoderShapes(Shapes):
    """Of a teacher's large text encoder. family: of one that is not T5."""

    network: ClassVar[str] = "text encoder"
    text_length: int
    dtype: Dtype
    family: str | None = None

    @classmethod
    def of(cls, teacher: Teacher, dtype: Dtype) -> Self:
        """The calls of a recorded teacher."""
        family = None if teacher.text_layers is None else teacher.family
        return cls(config=teacher.text_encoder_config, text_length=teacher.text_length, dtype=dtype, family=family)


class StudentShapes(Shapes):
    """Of a student in float32 that reads the teacher's tokens, with its projection to the teacher's text width.

    text_layers: of a teacher that reads several layers.
    """

    network: ClassVar[str] = "student"
    text_length: int
    text_width: int
    text_layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, source: str, config: dict[str, Any], teacher: Teacher) -> Self:
        """The calls of a student of this teacher; StudentError if it cannot take the teacher's token ids.

        source: its name in the error. config: of its encoder.
        """
        if not fits_tokens(config, teacher.text_layers):
            raise StudentError(
                f"{source} is a T5, but this teacher has a language model, whose tokens its student reads: give "
                f"{family_named(teacher.family).student}, or another with the same tokenizer"
            )
        needed, found = int(teacher.text_encoder_config["vocab_size"]), config["vocab_size"]
        if found < needed:
            raise StudentError(
                f"{source} has a vocabulary of {found}, but the teacher's token ids go up to {needed - 1}: use a "
                "student with the teacher's tokenizer"
            )
        return cls(
            config=config,
            text_length=teacher.text_length,
            text_width=teacher.text_width,
            text_layers=teacher.text_layers,
        )


class DecodingShapes(Shapes):
    """Of a VAE that decodes one image in float32."""

    network: ClassVar[str] = "decoder"
    family: str
    height: int
    width: int


class VaeConfig(Shapes):
    """Of a VAE of which parameters alone are counted. kind: its class in diffusers."""

    network: ClassVar[str] = "VAE parameters"
    kind: str


class ClipConfig(Shapes):
    """Of a CLIP text encoder of which parameters alone are counted."""

    network: ClassVar[str] = "CLIP parameters"
