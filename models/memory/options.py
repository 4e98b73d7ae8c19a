"""How the frozen backbone is held and computed while it is trained through: less GPU memory, or less time."""

from typing import Literal, Self

from pydantic import Field, model_validator

from secondcast.storage_schemas.schema.manifest import Flags, Quantization


class MemoryOptions(Flags):
    """All but `quantize`, `compile` and, on a GPU, modulation "host" leave what is trained as it is, bit for bit.

    modulation: "table" keeps the modulation vectors of the recorded conditions and drops the weights that make them
    (models/memory/modulation_table.py); "host" keeps those weights in the host's memory, which computes the vectors a
    batch ahead (models/memory/host_modulation.py); "live" keeps the weights where the others are; "auto" is the table
    wherever there can be one and it is the smaller, and the host where pooled vectors are CLIP's and the weights would
    fill more than half of the GPU. checkpoint_blocks: blocks whose activations are computed again in the backward
    pass: 0 none, 1 every block, n every n-th (models/memory/checkpointing.py). resident_blocks: so many blocks stay on
    the device, the others come from the host's memory for each use, and are computed twice
    (models/memory/streaming.py); None: all stay. quantize: the weights of the blocks' linears in 8 or 4 bits
    (models/memory/quantized.py). compile: blocks are compiled, which rounds otherwise (models/memory/compiling.py).
    """

    modulation: Literal["auto", "table", "host", "live"] = "auto"
    checkpoint_blocks: int = Field(default=0, ge=0)
    resident_blocks: int | None = Field(default=None, ge=0)
    quantize: Quantization = "none"
    compile: bool = False

    @model_validator(mode="after")
    def _streaming_computes_every_block_twice(self) -> Self:
        if self.resident_blocks is not None and self.checkpoint_blocks > 1:
            raise ValueError(
                f"checkpoint-blocks is {self.checkpoint_blocks} with resident-blocks, expected 0 or 1: streamed blocks "
                f"are computed twice anyway, 1 says so of the resident ones"
            )
        return self

    @model_validator(mode="after")
    def _quantized_blocks_stay_on_the_device(self) -> Self:
        if self.quantize != "none" and self.resident_blocks is not None:
            raise ValueError(
                f"quantize is {self.quantize} with resident-blocks {self.resident_blocks}, expected one of the two: "
                f"streaming is for the exact weights, quantized ones are small enough to stay; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _eight_bit_weights_are_checkpointed(self) -> Self:
        if self.quantize in ("int8", "fp8") and self.checkpoint_blocks != 1:
            raise ValueError(
                f"quantize is {self.quantize} with checkpoint-blocks {self.checkpoint_blocks}, expected 1: each linear "
                f"keeps an unquantized copy of its weight until its backward pass, and all blocks at once would keep "
                f"more than is saved; give --checkpoint-blocks 1, or --quantize nf4"
            )
        return self


PLAIN = MemoryOptions()
