"""Which blocks of the frozen transformer are streamed, and which are recomputed in the backward pass."""

from secondcast.models.memory.options import MemoryOptions

SLOTS = 2
"""Buffers on the device for streamed blocks: one is filled while the other computes."""


def streamed_blocks(resident: int, total: int) -> list[int]:
    """The streamed ones among `total` blocks, spread evenly, so that copies overlap with resident blocks."""
    count = total - resident
    return [index for index in range(total) if (index + 1) * count // total > index * count // total]


def checkpointed_blocks(blocks: int, every: int) -> range:
    """The checkpointed ones among `blocks` blocks: none for 0, else every `every`-th from the first."""
    return range(0, blocks, every) if every else range(0)


def recomputed_blocks(options: MemoryOptions, blocks: int) -> set[int]:
    """The blocks that are recomputed in the backward pass: checkpointed and streamed ones."""
    if options.gpu_blocks is None:
        return set(checkpointed_blocks(blocks, options.activation_checkpointing))
    return set(range(blocks) if options.activation_checkpointing else streamed_blocks(options.gpu_blocks, blocks))
