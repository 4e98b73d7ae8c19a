"""What the networks of a plan cost: parameters, FLOPs and bytes, of one sample or one text; linear in the batch."""

from dataclasses import dataclass, replace
from typing import Any

from secondcast.models.memory.blocks import recomputed_blocks
from secondcast.models.memory.options import PLAIN, MemoryOptions


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One of `count` blocks of a kind: its weights, its forward pass, and the bytes saved for its backward pass.

    forward_flops, attention_flops, backward_flops, moved_bytes: see BackboneCost.
    recomputed_bytes: peak of a block whose forward pass is repeated before its backward pass, without its inputs.
    modulation_parameters: part of `parameters` that a modulation table replaces.
    modulation_width: values of these modules in a row of the table.
    """

    count: int
    parameters: int
    modulation_parameters: int
    modulation_width: int
    forward_flops: float
    attention_flops: float
    backward_flops: float
    moved_bytes: float
    saved_bytes: int
    recomputed_bytes: int


@dataclass(frozen=True, kw_only=True)
class BackboneCost:
    """Costs of a transformer per sample, with frozen weights.

    modulation_parameters: parameters of the modulation linears.
    conditioning_parameters: parameters that compute their input; a modulation table replaces both.
    head_parameters: parameters of what follows the blocks.
    modulation_width: values of a row of that table.
    largest_linear: parameters of the largest linear.
    backward_flops: of the gradient of the text embedding.
    moved_bytes: bytes that the kernels without matrix products of a forward pass read and write.
    forward_peak_bytes: peak without gradients.
    backward_bytes: peak of the backward pass beyond the saved activations, without checkpointing.
    checkpoint_bytes: activations saved per checkpointed block; outer_bytes: those outside of the blocks.
    kinds: of its blocks, in the order of computation.
    """

    parameters: int
    modulation_parameters: int
    conditioning_parameters: int
    head_parameters: int
    modulation_width: int
    largest_linear: int
    forward_flops: float
    attention_flops: float
    backward_flops: float
    moved_bytes: float
    forward_peak_bytes: int
    backward_bytes: int
    checkpoint_bytes: int
    outer_bytes: int
    kinds: tuple[BlockCost, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(kind.count for kind in self.kinds)

    def kind_of(self, block: int) -> BlockCost:
        """The kind of a block by its index."""
        for kind in self.kinds:
            if block < kind.count:
                return kind
            block -= kind.count
        raise IndexError(f"block is {block + self.blocks}, expected one of {self.blocks}")

    def first(self, blocks: int) -> "BackboneCost":
        """Costs of its first `blocks` blocks and what precedes them, without what follows the blocks.

        The FLOPs and bytes of the head's activations, a thousandth of those of FLUX.1-dev's block, are not taken off.
        """
        kinds, left = [], blocks
        for kind in self.kinds:
            kinds.append(replace(kind, count=min(left, kind.count)))
            left -= kinds[-1].count
        dropped = [(kind, kind.count - kept.count) for kind, kept in zip(self.kinds, kinds, strict=True)]

        def of_dropped(name: str) -> Any:
            return sum(count * getattr(kind, name) for kind, count in dropped)

        summed = ("forward_flops", "attention_flops", "backward_flops", "moved_bytes")
        return replace(
            self,
            kinds=tuple(kinds),
            parameters=self.parameters - self.head_parameters - of_dropped("parameters"),
            head_parameters=0,
            modulation_parameters=sum(kind.count * kind.modulation_parameters for kind in kinds),
            modulation_width=sum(kind.count * kind.modulation_width for kind in kinds),
            **{name: getattr(self, name) - of_dropped(name) for name in summed},
        )

    def training_flops(self, options: MemoryOptions = PLAIN, blocks: int | None = None) -> float:
        """FLOPs of one sample, forward and backward, including recomputed blocks; of the first `blocks`, or of all."""
        part = self if blocks is None else self.first(blocks)
        again = [block for block in recomputed_blocks(options, self.blocks) if block < part.blocks]
        return part.forward_flops + sum(self.kind_of(block).forward_flops for block in again) + part.backward_flops

    def training_bytes(self, options: MemoryOptions = PLAIN, blocks: int | None = None) -> int:
        """Peak activation bytes of one sample, which is where the backward pass of a block begins.

        blocks: see training_flops.
        """
        recomputed, kept, peak = recomputed_blocks(options, self.blocks), self.outer_bytes, 0
        for number in range(self.blocks if blocks is None else blocks):
            kind, again = self.kind_of(number), number in recomputed
            kept += self.checkpoint_bytes if again else kind.saved_bytes
            peak = max(peak, kept + (kind.recomputed_bytes if again else self.backward_bytes))
        return peak


@dataclass(frozen=True, kw_only=True)
class TextEncoderCost:
    """Costs of a text encoder or student: parameters; FLOPs and bytes of one text."""

    parameters: int
    forward_flops: float
    forward_peak_bytes: int
    saved_bytes: int
