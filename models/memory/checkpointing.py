"""Gradient checkpointing of the frozen transformer's blocks: activations are computed again in place of being kept."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch.utils.checkpoint import checkpoint

from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.streaming import streamed_blocks


def checkpointed_blocks(blocks: int, every: int) -> range:
    """Which of so many blocks are checkpointed: none for 0, else each `every`-th from the first."""
    return range(0, blocks, every) if every else range(0)


def recomputed_blocks(options: MemoryOptions, blocks: int) -> set[int]:
    """Which of so many blocks are computed again in the backward pass: those checkpointed, and those streamed."""
    if options.gpu_blocks is None:
        return set(checkpointed_blocks(blocks, options.activation_checkpointing))
    return set(range(blocks) if options.activation_checkpointing else streamed_blocks(options.gpu_blocks, blocks))


def activation_checkpointing(transformer: FluxTransformer2DModel, every: int) -> None:
    """Compute each `every`-th block again in the backward pass (1: every block, 0: none); gradients keep their bits.

    Counts the double blocks, then the single ones. Works in eval mode; where no gradient is asked for nothing changes.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    chosen = {id(blocks[number]) for number in checkpointed_blocks(len(blocks), every)}
    if not chosen:
        transformer.disable_gradient_checkpointing()
        return

    def call(block: torch.nn.Module, *inputs: Any) -> Any:
        if id(block) not in chosen:
            return block(*inputs)
        # No dropout in frozen blocks: no state of a random generator to keep.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    transformer.enable_gradient_checkpointing(call)
