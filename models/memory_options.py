"""What the frozen backbone may do to need less GPU memory while it is trained through."""

from typing import Literal

from pydantic import Field

from storage_schemas.manifest import Flags


class MemoryOptions(Flags):
    """Neither changes what is trained.

    modulation: "table" keeps the modulation vectors of the recorded conditions and drops the weights that make them
    (models/modulation_table.py); "live" keeps the weights; "auto" is the table wherever there can be one and it is
    the smaller. checkpoint_blocks: blocks whose activations are computed again in the backward pass: 0 none, 1 every
    block, n every n-th (models/checkpointing.py).
    """

    modulation: Literal["auto", "table", "live"] = "auto"
    checkpoint_blocks: int = Field(default=0, ge=0)
