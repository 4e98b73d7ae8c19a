"""The options of `secondcast init-student` that affect the student."""

from typing import Annotated, Literal

from pydantic import Field

from secondcast.models.families.family import Family
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag, Flags
from secondcast.storage_schemas.schema.recording import Dtype

Kind = Literal["cut", "shallow", "pretrained"]


class InitialOptions(Flags):
    """The shape of an initial student, and the prompts and numbers of its statistics."""

    size: Annotated[str, Flag(metavar="SIZE")] = Field(
        description="Size: small, base or large (of T5 v1.1), pocket-tiny, pocket-small or pocket-base, or "
        "LAYERSxWIDTH, such as 12x768, with heads and feed-forward units in the teacher's proportions."
    )
    kind: Literal[Kind, "auto"] = Field(
        default="auto",
        description="cut: layers, heads and units of the teacher's encoder at a smaller width; shallow: some of its "
        "layers at full width; pretrained: another T5 v1.1, see --from; auto: the best of those.",
    )
    source: Annotated[str | None, Flag(flag="--from", metavar="STUDENT")] = Field(
        default=None, description="For pretrained: folder or hub name of a T5 v1.1, such as google/t5-v1_1-base."
    )
    projection_rank: int | None = Field(
        default=None,
        ge=1,
        description="Rank of the output projection's last matrix, for a smaller student; default: full.",
    )
    limit: int = Field(default=2000, ge=2, description="Number of distinct prompts to use at most.")
    text_length: int | None = Field(
        default=None, ge=1, description="Text tokens, as of the cache to train with; default: the teacher's own."
    )
    batch_size: int = Field(default=16, ge=1, description="Prompts per batch.")
    dtype: Dtype = Field(default="bfloat16", description="Compute dtype of the teacher's encoder, as of build.")


def check_makes_students(family: Family, teacher: str) -> None:
    """Raise SettingsError for a family of whose text encoder no initial student can be made. teacher: its name."""
    if family.makes_initial_students:
        return
    if family.text_layers is None:
        raise SettingsError(
            f"--teacher is {teacher}, whose text encoder reads a mask of padding, expected a teacher without one: the "
            f"fit counts padding; give FLUX.1 or Stable Diffusion 3, whose text encoder is the same T5-XXL"
        )
    raise SettingsError(
        f"--teacher is {teacher}, whose text encoder is a language model, expected a teacher with T5, of which initial "
        f"students are made: train a smaller model with the same tokenizer by train --student {family.student}"
    )
