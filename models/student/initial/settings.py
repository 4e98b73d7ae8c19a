"""The options of `secondcast init-student` that affect the student."""

from typing import Annotated, Literal

from pydantic import Field

from secondcast.storage_schemas.schema.flags import Flag, Flags
from secondcast.storage_schemas.schema.manifest import Dtype

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
