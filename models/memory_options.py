"""What the frozen backbone may do to need less GPU memory while it is trained through."""

from typing import Literal, Self

from pydantic import Field, model_validator

from storage_schemas.manifest import Flags


class MemoryOptions(Flags):
    """Neither changes what is trained.

    modulation: "table" keeps the modulation vectors of the recorded conditions and drops the weights that make them
    (models/modulation_table.py); "live" keeps the weights; "auto" is the table wherever there can be one and it is
    the smaller. checkpoint_blocks: blocks whose activations are computed again in the backward pass: 0 none, 1 every
    block, n every n-th (models/checkpointing.py). resident_blocks: so many blocks stay on the device, the others come
    from the host's memory for each use, and are computed twice (models/streaming.py); None: all stay.
    """

    modulation: Literal["auto", "table", "live"] = "auto"
    checkpoint_blocks: int = Field(default=0, ge=0)
    resident_blocks: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _streaming_computes_every_block_twice(self) -> Self:
        if self.resident_blocks is not None and self.checkpoint_blocks > 1:
            raise ValueError(
                f"checkpoint-blocks is {self.checkpoint_blocks} with resident-blocks, expected 0 or 1: streamed blocks "
                f"are computed twice anyway, 1 says so of the resident ones"
            )
        return self
