"""The manifest: the complete description of a cache, with three digests over its sections.

`teacher` must agree when several caches train one student; `sampling` for resume, merge and extension;
`prompts` for resume. No setting that affects a number is implied by a default in code.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from secondcast.storage_schemas.errors import DamagedCacheError, NewerCacheError, NotACacheError, SettingsMismatchError
from secondcast.storage_schemas.io.digests import canonical_json, digest
from secondcast.storage_schemas.schema.first_difference import first_difference
from secondcast.storage_schemas.schema.problems import first_problem, newer_problem

FORMAT_NAME = "secondcast-cache"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

Dtype = Literal["bfloat16", "float32"]
Format = Literal["zarr", "webdataset"]
Latents = Literal["derived", "stored"]
CodecName = Literal["none", "lossless", "int8"]
Embeddings = Literal["stored", "none"]
Pooled = Literal["zero", "clip"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
ScheduleName = Literal["diffusers", "distillt5"]
LatentRule = Literal["flow-match-euler"]
"""How x_{k+1} follows from x_k and v_k (storage_schemas/schema/derivation.py)."""


class Record(BaseModel):
    """A frozen record that refuses unknown keys; the base of everything written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def json_value(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return self.model_dump(mode="json")


def _inside(files: dict[str, str]) -> dict[str, str]:
    """Validate the paths of a manifest's files; ValueError if one is outside the cache."""
    for path in files:
        if not stays_inside(path):
            raise ValueError(f"path {path!r} is outside the cache")
    return files


def stays_inside(path: str) -> bool:
    """Whether a path stated by a file of a cache is below the cache's folder."""
    return path.isprintable() and not path.startswith(("/", "\\")) and ".." not in path.replace("\\", "/").split("/")


PathsInside = Annotated[dict[str, str], AfterValidator(_inside)]


class Teacher(Record):
    """The recorded teacher.

    weights: sha256 of every weight file that affects the numbers.
    pooled: whether the pooled vector is zero or the output of the pipeline's CLIP (`text_encoder`); only then are
        CLIP's configuration and the sha256 of its tokenizer files (which the cache does not contain) recorded.
    """

    family: str = Field(min_length=1)
    weights: dict[str, str]
    backbone_config: dict[str, Any]
    text_encoder_config: dict[str, Any]
    tokenizer: PathsInside
    text_length: int = Field(ge=1)
    text_width: int = Field(ge=1)
    pad_token_id: int = Field(ge=0)
    pooled: Pooled
    pooled_width: int = Field(ge=1)
    pooled_encoder_config: dict[str, Any] | None = None
    pooled_tokenizer: dict[str, str] | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_always_so(self, plain: SerializerFunctionWrapHandler) -> Any:
        # Caches from before this choice existed do not have these keys, and keep their digests.
        return {key: value for key, value in plain(self).items() if value is not None}


class Storage(Record):
    """How a cache is stored on disk. `embeddings` "none": a finished cache has no teacher embeddings."""

    format: Format
    compression: CodecName
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


def int8_problem(codec: CodecName, latents: str) -> str | None:
    """Why this compression is incompatible with these latents, and the fix; None if it is compatible."""
    if codec != "int8" or latents == "stored":
        return None
    return "compression int8 rounds the velocity, but latents are derived from the exact one; use --latents stored"


def pooled_problem(pooled: Pooled, embeddings: Embeddings) -> str | None:
    """Why these pooled vectors are incompatible with this choice of embeddings, and the fix; None if compatible."""
    if pooled == "zero" or embeddings == "stored":
        return None
    return "replay needs CLIP's pooled vectors, which are stored with the embeddings; use --store-embeddings"


class Sampling(Record):
    """How the teacher was sampled.

    sigmas: K + 1 values in [0, 1].
    timesteps: the K timesteps as the backbone received them, rounded to `dtype` (0.972.., not 972).
    guidance: the values one of which is drawn per trajectory; None where the backbone takes no guidance.
    quantize: quantization of the weights of the backbone's blocks.
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
    storage: Storage

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
        # Caches from before this choice existed do not have this key, and keep their digests.
        value = plain(self)
        if self.quantize == "none" and info.context != "all keys":
            del value["quantize"]
        return value


class Segment(Record):
    """One build or extension: a range of prompts times a range of samples, cut into shards of fixed size.

    Its trajectories are ordered by sample, then prompt. A shard never spans two segments.
    """

    first_prompt: int = Field(ge=0)
    prompts: int = Field(ge=1)
    first_sample: int = Field(ge=0)
    samples_per_prompt: int = Field(ge=1)
    shard_size: int = Field(ge=1)


class PromptSet(Record):
    """The prompts, their order and their segments. `held_out` of them are never used in training."""

    count: int = Field(ge=1)
    held_out: int = Field(ge=0)
    sources: dict[str, int]
    ids: str
    bytes: int
    xxh3_128: str
    segments: tuple[Segment, ...] = Field(min_length=1)


class Manifest(Record):
    """Complete description of a cache. `source` and `created_by` are informational and part of no digest."""

    source: str
    created_by: str
    teacher: Teacher
    sampling: Sampling
    prompts: PromptSet
    metadata: PathsInside

    @model_validator(mode="after")
    def _pooled_is_stored(self) -> Self:
        if problem := pooled_problem(self.teacher.pooled, self.sampling.storage.embeddings):
            raise ValueError(problem)
        return self

    def digests(self) -> dict[str, str]:
        """The three digests; `sampling` also covers the teacher, `prompts` covers both."""
        teacher = self.teacher.json_value()
        sampling = {"teacher": teacher, "sampling": self.sampling.json_value()}
        prompts = {**sampling, "prompts": self.prompts.json_value()}
        return {"teacher": digest(teacher), "sampling": digest(sampling), "prompts": digest(prompts)}

    def encode(self) -> bytes:
        """The bytes of manifest.json."""
        body = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            **self.json_value(),
            "digests": self.digests(),
        }
        return with_digest(body)

    @classmethod
    def decode(cls, data: bytes, where: str) -> Self:
        """Decode manifest.json.

        NotACacheError for another file or a newer version, DamagedCacheError for changed bytes.
        """
        body = verify_digest(data, where, expected_format=FORMAT_NAME)
        if (version := body.pop("format_version", None)) != FORMAT_VERSION:
            raise NotACacheError(
                f"{where} has format version {version}, this program reads {FORMAT_VERSION}: it was built by "
                f"another version; use the one named in created_by, {body.get('created_by')!r}"
            )
        body.pop("format")
        stated = body.pop("digests", None)
        try:
            manifest = cls.model_validate(body)
        except ValidationError as error:
            if problem := newer_problem(where, error):
                raise NewerCacheError(problem) from error
            raise DamagedCacheError(f"{where} is not a valid manifest: {first_problem(error)}") from error
        if stated != manifest.digests():
            raise DamagedCacheError(f"{where} states digests {stated}, its content has {manifest.digests()}")
        return manifest


def with_digest(body: dict[str, Any], *, indent: int | None = 1) -> bytes:
    """Readable JSON with a digest of its other keys under `digest`."""
    text = json.dumps({**body, "digest": digest(body)}, indent=indent, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def verify_digest(data: bytes, where: str, *, expected_format: str) -> dict[str, Any]:
    """The inverse of `with_digest`; NotACacheError for foreign files, DamagedCacheError for changed ones."""
    try:
        body = json.loads(data)
        stated = body.pop("digest", None)
        found_format = body.get("format")
        found = digest(body)
    # Damage can produce any JSON: lists, numbers, NaN, lone surrogates, a million brackets.
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCacheError(
            f"{where} is not readable JSON ({len(data)} bytes): it is damaged, or not a file of this program; "
            f"copy it from another copy of the cache"
        ) from error
    if found_format != expected_format:
        raise NotACacheError(
            f"{where} has format {found_format!r}, expected {expected_format!r}: not a file of a cache"
        )
    if stated != found:
        raise DamagedCacheError(
            f"{where} has digest {found}, but states {stated}: the file was changed or damaged; "
            f"copy it from another copy of the cache"
        )
    checked: dict[str, Any] = body
    return checked


_DEPENDS = {
    "teacher": "every recorded number",
    "sampling": "every recorded trajectory",
    "prompts": "the order of all trajectories",
}


# Fields are compared by section: if the first difference is in `prompts`, the other sections agree.
_EXTEND_HINT = (
    "; `secondcast build --extend` adds prompts or samples to a cache, and is required for a cache that was extended"
)
SECTIONS = ("teacher", "sampling", "prompts")


def check_same_settings(found: Manifest, wanted: Manifest, where: str, *, sections: tuple[str, ...] = SECTIONS) -> None:
    """Raise SettingsMismatchError, naming the first field, both values, what depends on it, and the fix."""
    for field, was, now in differing_fields(found, wanted, sections=sections):
        hint = _EXTEND_HINT if field.startswith("prompts.") else ""
        first = first_difference(was, now, field)
        raise SettingsMismatchError(
            f"{where} was built with {first.path} = {first.one}, requested {first.other}: "
            f"{depends_on(field)} depends on it; give the original options, or another folder{hint}"
        )


def depends_on(field: str) -> str:
    """What depends on a field of the manifest."""
    if field.startswith("sampling.storage."):
        return "every byte of the shards (`secondcast convert` changes the storage)"
    return _DEPENDS[field.split(".")[0]]


def check_same_teacher(found: Manifest, teacher: Teacher, where: str) -> None:
    """Raise SettingsMismatchError, naming the first field, unless a cache was recorded with this teacher."""
    for field, was, now in _causes_first(differences(found.teacher.json_value(), teacher.json_value(), "teacher")):
        first = first_difference(was, now, field)
        raise SettingsMismatchError(
            f"{where} was recorded with {first.path} = {first.one}, this teacher has {first.other}: "
            f"{_DEPENDS['teacher']} depends on it; give the recorded teacher, {found.source!r}"
        )


def differing_fields(
    a: Manifest, b: Manifest, *, sections: tuple[str, ...] = SECTIONS
) -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of each field of teacher, sampling and prompts in which two manifests differ."""
    for section in sections:
        ours, theirs = (getattr(m, section).model_dump(mode="json", context="all keys") for m in (a, b))
        yield from _causes_first(differences(ours, theirs, section))


def _causes_first(found: Iterator[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    # With CLIP its weights are part of the teacher: name the option before them.
    return sorted(found, key=lambda difference: difference[0] != "teacher.pooled")


def differences(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of each field in which two JSON values differ; an absent field counts as None."""
    if isinstance(a, dict) and isinstance(b, dict):
        # In field order, so that `steps` is named before the sigmas that depend on it.
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key), b.get(key), f"{path}.{key}")
    elif canonical_json(a) != canonical_json(b):
        yield path, a, b


def shortened(value: Any) -> str:
    """A JSON value in at most 60 characters."""
    text = canonical_json(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
