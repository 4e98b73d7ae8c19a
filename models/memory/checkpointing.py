"""Activation checkpointing of the frozen transformer's blocks: activations are recomputed instead of saved."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from secondcast.models.families.registry import anatomy_of
from secondcast.models.memory.blocks import checkpointed_blocks


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
