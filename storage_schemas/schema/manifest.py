"""The manifest: the complete description of a cache, with three digests over its sections.

`teacher` must agree when several caches train one student; `sampling` (`text` in a text cache) for resume, merge and
extension; `prompts` for resume. No setting that affects a number is implied by a default in code.
"""

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from secondcast.storage_schemas.errors import DamagedCacheError, NewerCacheError, NotACacheError, NoTrajectoriesError
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.schema.json_files import PathsInside, Record, verify_digest, with_digest
from secondcast.storage_schemas.schema.problems import first_problem, newer_problem
from secondcast.storage_schemas.schema.recording import (
    ArrayStorage,
    Dtype,
    Pooled,
    Sampling,
    TextRecording,
    pooled_problem,
)

FORMAT_NAME = "secondcast-cache"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
NEGATIVE_TEXT = ""
NEGATIVE = 0
"""Number of the negative prompt in a cache with classifier-free guidance; it has no trajectories."""


class ConditioningArray(Record):
    """An array that is recorded of each prompt besides its embedding: `letters` names its axes (schema/fields.py)."""

    name: Literal["clip_hidden_states"]
    letters: str
    shape: tuple[int, ...]


class Teacher(Record):
    """The recorded teacher.

    weights: sha256 of every weight file that affects the numbers.
    pooled: whether the pooled vector is zero or the output of the pipeline's CLIP (`text_encoder`); only then are
        CLIP's configuration and the sha256 of its tokenizer files (which the cache does not contain) recorded. With
        two CLIPs both are by the folders of the parts.
    pooled_width: 0 where the transformer reads no pooled vector.
    conditioning: arrays of each prompt besides embedding and pooled vector; None for families without.
    text_mask: "token-count" where text encoder and transformer read the first len(token_ids) tokens alone; embeddings
        are zero behind them. None: padding is read.
    text_cleaning: how the pipeline changes a text before it is tokenised; None: not at all.
    text_layers: the hidden layers of the text encoder that are side by side in an embedding; None: its last one.
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
    pooled_width: int = Field(ge=0)
    pooled_encoder_config: dict[str, Any] | None = None
    pooled_tokenizer: dict[str, str] | None = None
    conditioning: tuple[ConditioningArray, ...] | None = None
    text_mask: Literal["token-count"] | None = None
    text_cleaning: Literal["clean-caption"] | None = None
    text_layers: tuple[int, ...] | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_always_so(self, plain: SerializerFunctionWrapHandler) -> Any:
        # Caches from before this choice existed do not have these keys, and keep their digests.
        return {key: value for key, value in plain(self).items() if value is not None}


class Segment(Record):
    """One build or extension: a range of prompts times a range of samples, cut into shards of fixed size.

    Its trajectories are ordered by sample, then prompt. A shard never spans two segments. In a text cache
    samples_per_prompt is 0, and the shards are of embeddings.
    """

    first_prompt: int = Field(ge=0)
    prompts: int = Field(ge=1)
    first_sample: int = Field(ge=0)
    samples_per_prompt: int = Field(ge=0)
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
    """Complete description of a cache. `source` and `created_by` are informational and part of no digest.

    sampling_or_none: None in a text cache, which has `text` instead.
    """

    source: str
    created_by: str
    teacher: Teacher
    sampling_or_none: Sampling | None = Field(alias="sampling")
    text: TextRecording | None = None
    prompts: PromptSet
    metadata: PathsInside

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        if (self.sampling_or_none is None) != (self.text is not None):
            raise ValueError("sampling and text are both stated or both null, expected one of them")
        guided = not self.is_text and self.sampling.negative_prompt is not None
        for number, segment in enumerate(self.prompts.segments):
            without = self.is_text or (guided and number == 0)
            if (segment.samples_per_prompt == 0) != without:
                expected = "0" if without else "1 or more"
                raise ValueError(f"samples_per_prompt is {segment.samples_per_prompt}, expected {expected}")
        if guided and self.prompts.segments[0].prompts != 1:
            raise ValueError(f"the first segment has prompts = {self.prompts.segments[0].prompts}, expected 1")
        return self

    @model_validator(mode="after")
    def _pooled_is_stored(self) -> Self:
        if problem := pooled_problem(self.teacher.pooled, "stored" if self.keeps_embeddings else "none"):
            raise ValueError(problem)
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_unset(self, plain: SerializerFunctionWrapHandler) -> Any:
        value = plain(self)
        if self.text is None:
            del value["text"]
        return value

    def json_value(self) -> dict[str, Any]:
        """The manifest as plain JSON types."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def is_text(self) -> bool:
        """Whether this is a text cache: prompts and embeddings, without trajectories."""
        return self.text is not None

    @property
    def own_prompts(self) -> int:
        """Number of prompts without the negative one."""
        guided = self.sampling_or_none is not None and self.sampling_or_none.negative_prompt is not None
        return self.prompts.count - guided

    @property
    def sampling(self) -> Sampling:
        """How the teacher was sampled; NoTrajectoriesError for a text cache."""
        if self.sampling_or_none is None:
            raise no_trajectories("this", f"a cache of {self.source}")
        return self.sampling_or_none

    @property
    def dtype(self) -> Dtype:
        """Dtype of the stored arrays."""
        return self.sampling.dtype if self.text is None else self.text.dtype

    @property
    def storage(self) -> ArrayStorage:
        """Format and compression of the stored arrays."""
        return self.sampling.storage if self.text is None else self.text.storage

    @property
    def keeps_embeddings(self) -> bool:
        """Whether a finished cache has the teacher's embeddings."""
        return self.text is not None or self.sampling.storage.embeddings == "stored"

    def digests(self) -> dict[str, str]:
        """The digests by section: `sampling` (absent in a text cache) also covers the teacher, `prompts` everything."""
        sampling = {} if self.is_text else {"sampling": self.recording_digest()}
        prompts = {**self._recording(), "prompts": self.prompts.json_value()}
        return {"teacher": digest(self.teacher.json_value()), **sampling, "prompts": digest(prompts)}

    def recording_digest(self) -> str:
        """Digest of what the bytes of a row depend on besides its prompt: the teacher, and `sampling` or `text`."""
        return digest(self._recording())

    def _recording(self) -> dict[str, Any]:
        section, recorded = ("sampling", self.sampling) if self.text is None else ("text", self.text)
        return {"teacher": self.teacher.json_value(), section: recorded.json_value()}

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


def no_trajectories(what: str, where: str) -> NoTrajectoriesError:
    """The one error for a text cache where trajectories are needed."""
    return NoTrajectoriesError(
        f"{what} needs trajectories, but {where} is a text cache, of prompts and embeddings alone: give a cache that "
        f"was built without --text-only"
    )
