"""What the networks of a plan cost: parameters, FLOPs and bytes, of one sample or one text; linear in the batch."""

from dataclasses import dataclass

from secondcast.models.memory.blocks import recomputed_blocks
from secondcast.models.memory.options import PLAIN, MemoryOptions


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """One of `count` blocks of a kind: its weights, its forward pass, and the bytes saved for its backward pass.

    recomputed_bytes: peak of a block whose forward pass is repeated before its backward pass, without its inputs.
    modulation_parameters: part of `parameters` that a modulation table replaces.
    modulation_width: values of these modules in a row of the table.
    """

    count: int
    parameters: int
    modulation_parameters: int
    modulation_width: int
    forward_flops: float
    saved_bytes: int
    recomputed_bytes: int


@dataclass(frozen=True, kw_only=True)
class BackboneCost:
    """Costs of a transformer per sample, with frozen weights.

    modulation_parameters: parameters of the modulation linears.
    conditioning_parameters: parameters that compute their input; a modulation table replaces both.
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

    def training_flops(self, options: MemoryOptions = PLAIN) -> float:
        """FLOPs of one sample, forward and backward, including recomputed blocks."""
        again = sum(self.kind_of(block).forward_flops for block in recomputed_blocks(options, self.blocks))
        return self.forward_flops + again + self.backward_flops

    def training_bytes(self, options: MemoryOptions = PLAIN) -> int:
        """Peak activation bytes of one sample, which is where the backward pass of a block begins."""
        recomputed, kept, peak = recomputed_blocks(options, self.blocks), self.outer_bytes, 0
        for number in range(self.blocks):
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
