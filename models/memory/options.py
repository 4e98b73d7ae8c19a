"""How the frozen backbone is held and computed while it is trained through: less GPU memory, or less time."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flags, Shown
from secondcast.storage_schemas.schema.manifest import Dtype, Quantization

Modulation = Literal["auto", "precomputed", "cpu", "gpu"]
RecordedDtype = Literal["cache"] | Dtype
MEMORY = "GPU memory and speed"
"""Heading of these options in help texts."""


AUTO = "auto"
_UNIT_BYTES = {"gib": 2**30, "g": 2**30, "gb": 10**9, "mib": 2**20, "m": 2**20, "mb": 10**6}


def size_bytes(text: str) -> float:
    """Bytes of a size such as 16GiB, 15.5G or 16GB; SettingsError for another text."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2].lower() not in _UNIT_BYTES or float(found[1]) == 0:
        raise SettingsError(
            f"--max-gpu-memory is {text!r}, expected a size such as 16GiB or 11.5GiB, or auto for what is free here"
        )
    return float(found[1]) * _UNIT_BYTES[found[2].lower()]


class GpuMemory(Flags):
    """How much memory of a GPU may be used; a size that `size_bytes` reads, or AUTO."""

    max_gpu_memory: Annotated[str | None, Shown(group=MEMORY, metavar="SIZE")] = Field(
        default=None,
        description="GPU memory to fit into, as in 16GiB (16GB is 14.9 of them); auto: what is free (a plan takes that "
        "of --gpu). Chooses those of the other memory options, and --grad-accum-steps, that are not given.",
    )

    @field_validator("max_gpu_memory")
    @classmethod
    def _a_size_or_auto(cls, value: str | None) -> str | None:
        if value is not None and value.strip().lower() == AUTO:
            return AUTO
        if value is not None:
            size_bytes(value)
        return value


class HeldWeights(Flags):
    """Where the weights of the frozen backbone are; every choice but modulation "cpu" on a GPU is exact."""

    modulation: Annotated[Modulation, Shown(group=MEMORY)] = Field(
        default="auto",
        description="table: 27 % of FLUX's weights give way to their results; host: they stay in its memory, and it "
        "computes; auto: table wherever pooled is zero, else host where the GPU is small.",
    )
    gpu_blocks: Annotated[int | None, Shown(group=MEMORY, metavar="N")] = Field(
        default=None,
        ge=0,
        description="Keep N of its blocks on the GPU, stream the others from pinned host memory.",
    )


class AttentionBackend(Flags):
    """How the backbone computes attention."""

    attention_backend: Annotated[str | None, Shown(group=MEMORY, rare=True)] = Field(
        default=None, description="diffusers' attention backend for the transformer; default: torch's own."
    )


class BackboneCall(AttentionBackend):
    """How the backbone computes on what was recorded."""

    backbone_dtype: Annotated[RecordedDtype, Shown(group=MEMORY, rare=True)] = Field(
        default="cache", description="Arithmetic of the transformer; cache: as recorded."
    )


class MemoryOptions(HeldWeights):
    """All but `quantize`, `compile` and, on a GPU, modulation "cpu" leave what is trained as it is, bit for bit.

    modulation: "precomputed" keeps the modulation vectors of the recorded conditions and drops the weights that make them
    (models/memory/modulation_table.py); "host" keeps those weights in the host's memory, which computes the vectors a
    batch ahead (models/memory/host_modulation.py); "live" keeps the weights where the others are; "auto" is the table
    wherever there can be one and it is the smaller, and the host where pooled vectors are CLIP's and the weights would
    fill more than half of the GPU. activation_checkpointing: blocks whose activations are computed again in the backward
    pass: 0 none, 1 every block, n every n-th (models/memory/checkpointing.py). gpu_blocks: so many blocks stay on
    the device, the others come from the host's memory for each use, and are computed twice
    (models/memory/streaming.py); None: all stay. quantize: the weights of the blocks' linears in 8 or 4 bits
    (models/memory/quantized.py). compile: blocks are compiled, which rounds otherwise (models/memory/compiling.py).
    """

    to_be_chosen: ClassVar[bool] = False
    """Whether options that are not given may still be chosen by what fits."""

    activation_checkpointing: Annotated[int, Shown(group=MEMORY, metavar="N")] = Field(
        default=0,
        ge=0,
        description="Compute every N-th block of the transformer twice, for less memory; 0: none.",
    )
    quantize: Annotated[Quantization, Shown(group=MEMORY)] = Field(
        default="none",
        description="Its blocks' weights in 8 or 4 bits: a biased teacher; the replay error says how much.",
    )
    compile: Annotated[bool, Shown(group=MEMORY, rare=True)] = Field(
        default=False, description="Compile its blocks, once per shape: faster steps, another rounding."
    )

    @model_validator(mode="after")
    def _streaming_computes_every_block_twice(self) -> Self:
        if self.gpu_blocks is not None and self.activation_checkpointing > 1:
            raise ValueError(
                f"activation-checkpointing is {self.activation_checkpointing} with gpu-blocks, expected 0 or 1: streamed blocks "
                f"are computed twice anyway, 1 says so of the resident ones"
            )
        return self

    @model_validator(mode="after")
    def _quantized_blocks_stay_on_the_device(self) -> Self:
        if self.quantize != "none" and self.gpu_blocks is not None:
            raise ValueError(
                f"quantize is {self.quantize} with gpu-blocks {self.gpu_blocks}, expected one of the two: "
                f"streaming is for the exact weights, quantized ones are small enough to stay; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _eight_bit_weights_are_checkpointed(self) -> Self:
        if self.quantize in ("int8", "fp8") and self.activation_checkpointing != 1 and not self.to_be_chosen:
            raise ValueError(
                f"quantize is {self.quantize} with activation-checkpointing {self.activation_checkpointing}, expected 1: each linear "
                f"keeps an unquantized copy of its weight until its backward pass, and all blocks at once would keep "
                f"more than is saved; give --activation-checkpointing 1, or --quantize nf4"
            )
        return self


PLAIN = MemoryOptions()
