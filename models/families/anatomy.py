"""Where the networks of a transformer are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A list of equal blocks of a transformer.

    attribute: of the transformer.
    count_key: key of the configuration with the number of its blocks.
    joint: whether its blocks join text and image tokens to one sequence.
    """

    attribute: str
    count_key: str
    joint: bool = False


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the networks of a transformer are, for memory options, costs and losses.

    block_lists: in the order of computation.
    modulation: endings of the names of the linears whose only inputs are timestep, guidance and pooled, so that no
        gradient passes through them.
    conditioning: the module that computes their input; its result is the `temb` of each block.
    text_entry: the tensor through which text embeddings enter.
    head: the modules that follow the blocks.
    cross_attention: whether text enters every block: its gradient is a sum over them, reordered by streaming.
    last_differs: whether the last block of a transformer has other weights, so that a part of it needs one block more.
    """

    block_lists: tuple[BlockList, ...]
    modulation: tuple[str, ...]
    conditioning: str
    text_entry: str
    head: tuple[str, ...]
    cross_attention: bool = False
    last_differs: bool = False

    def blocks(self, transformer: "torch.nn.Module") -> "list[torch.nn.Module]":
        """All blocks, in the order of computation."""
        return [block for kind in self.block_lists for block in getattr(transformer, kind.attribute)]

    def block_count(self, config: Mapping[str, Any]) -> int:
        """Number of blocks of a transformer, by its configuration."""
        return sum(int(config[kind.count_key]) for kind in self.block_lists)

    def first_blocks(self, config: Mapping[str, Any], blocks: int) -> tuple[dict[str, int], tuple[str, ...]]:
        """How a transformer has its first `blocks` blocks alone.

        The keys of its configuration, and the modules that this one has too much: its head, and where the last block
        differs from the others one block.
        """
        counts, surplus = {}, self.head
        if self.last_differs and blocks < self.block_count(config):
            surplus = (*surplus, f"{self.block_lists[-1].attribute}.{blocks}")
            blocks += 1
        for kind in self.block_lists:
            counts[kind.count_key] = min(blocks, int(config[kind.count_key]))
            blocks -= counts[kind.count_key]
        return counts, surplus


def run_block(transformer: Any, block: Any, *inputs: Any) -> Any:
    """A call of a block as the transformer's forward calls it: with gradient checkpointing where that is on."""
    import torch

    if torch.is_grad_enabled() and transformer.gradient_checkpointing:
        return transformer._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)
