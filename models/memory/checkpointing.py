"""Activation checkpointing of the frozen transformer's blocks: activations are recomputed instead of saved."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from secondcast.models.families.registry import anatomy_of
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.streaming import streamed_blocks


def checkpointed_blocks(blocks: int, every: int) -> range:
    """The checkpointed ones among `blocks` blocks: none for 0, else every `every`-th from the first."""
    return range(0, blocks, every) if every else range(0)


def recomputed_blocks(options: MemoryOptions, blocks: int) -> set[int]:
    """The blocks that are recomputed in the backward pass: checkpointed and streamed ones."""
    if options.gpu_blocks is None:
        return set(checkpointed_blocks(blocks, options.activation_checkpointing))
    return set(range(blocks) if options.activation_checkpointing else streamed_blocks(options.gpu_blocks, blocks))


def activation_checkpointing(transformer: Any, every: int) -> None:
    """Recompute every `every`-th block in the backward pass (1: all, 0: none); gradients keep their bits.

    Counts the double blocks, then the single ones. Works in eval mode; has no effect without gradients.
    """
    blocks = anatomy_of(transformer).blocks(transformer)
    chosen = {id(blocks[number]) for number in checkpointed_blocks(len(blocks), every)}
    if not chosen:
        transformer.disable_gradient_checkpointing()
        return

    def call(block: torch.nn.Module, *inputs: Any) -> Any:
        if id(block) not in chosen:
            return block(*inputs)
        # Frozen blocks have no dropout, so the RNG state need not be saved.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    transformer.enable_gradient_checkpointing(call)
