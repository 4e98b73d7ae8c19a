"""Memory and speed options of the frozen backbone."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag, Flags
from secondcast.storage_schemas.schema.recording import Dtype, Quantization

Modulation = Literal["auto", "precomputed", "cpu", "gpu"]
RecordedDtype = Literal["cache"] | Dtype
TextQuantization = Literal["int8", "nf4"]
"""Forms of the weights of text encoders, the teacher's and students."""
MEMORY = "GPU memory and speed"
"""Heading of these options in help texts."""


AUTO = "auto"
_UNIT_BYTES = {"gib": 2**30, "g": 2**30, "gb": 10**9, "mib": 2**20, "m": 2**20, "mb": 10**6}


def size_bytes(text: str) -> float:
    """Bytes of a size such as 16GiB, 15.5G or 16GB; SettingsError for any other text."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2].lower() not in _UNIT_BYTES or float(found[1]) == 0:
        raise SettingsError(
            f"--max-gpu-memory is {text!r}, expected a size such as 16GiB or 11.5GiB, or auto for the free memory"
        )
    return float(found[1]) * _UNIT_BYTES[found[2].lower()]


class GpuMemoryLimit(Flags):
    """Limit of GPU memory: a size that `size_bytes` reads, or AUTO."""

    max_gpu_memory: Annotated[str | None, Flag(group=MEMORY, metavar="SIZE")] = Field(
        default=None,
        description="Limit of a process's GPU memory, such as 16GiB (16GB is 14.9GiB), or auto: the free memory (in a "
        "plan: all memory of the named GPU). Chooses the memory options that are not given, in training also "
        "--grad-accum-steps.",
    )

    @field_validator("max_gpu_memory")
    @classmethod
    def _a_size_or_auto(cls, value: str | None) -> str | None:
        if value is not None and value.strip().lower() == AUTO:
            return AUTO
        if value is not None:
            size_bytes(value)
        return value


class WeightPlacement(Flags):
    """Placement of the frozen backbone's weights.

    Every choice is exact, except modulation "cpu" with a GPU, and in training gpu_blocks of families with
    cross-attention (see Anatomy).
    """

    modulation: Annotated[Modulation, Flag(group=MEMORY)] = Field(
        default="auto",
        description="Handling of the modulation weights, 27 % of FLUX: precomputed replaces them with their outputs, "
        "cpu keeps and computes them on the CPU (refused by build and generate), gpu keeps them on the GPU; auto: "
        "precomputed if pooled is zero, else cpu if the GPU is small (build: gpu).",
    )
    gpu_blocks: Annotated[int | None, Flag(group=MEMORY, metavar="N")] = Field(
        default=None,
        ge=0,
        description="Number of transformer blocks kept on the GPU; the others are streamed from pinned host memory.",
    )


class AttentionBackend(Flags):
    """The attention backend of the backbone."""

    attention_backend: Annotated[str | None, Flag(group=MEMORY, rare=True)] = Field(
        default=None, description="diffusers' attention backend for the transformer. Default: torch's own."
    )


class BackboneCall(AttentionBackend):
    """How the backbone computes in a replay."""

    backbone_dtype: Annotated[RecordedDtype, Flag(group=MEMORY, rare=True)] = Field(
        default="cache", description="Compute dtype of the transformer; cache: as recorded."
    )


class SamplingMemory(WeightPlacement, GpuMemoryLimit):
    """Memory options of a command that samples, without gradients."""

    @property
    def held(self) -> set[str]:
        """The options that a limit does not change."""
        options = WeightPlacement.model_fields
        return {name for name, field in options.items() if getattr(self, name) != field.default}

    def placed(self, quantize: Quantization, *, pooled_varies: bool, auto: Modulation) -> "MemoryOptions":
        """The options of the backbone as far as they are given.

        pooled_varies: whether each prompt has its own pooled vector.
        auto: what modulation "auto" means.

        Raises SettingsError for a table where it cannot be, and for the host, which would change what is sampled.
        """
        if self.modulation == "precomputed" and pooled_varies:
            raise SettingsError(
                "--modulation is precomputed, expected gpu: with CLIP's pooled vectors every prompt has its own "
                "modulation vectors, which no table can hold"
            )
        if self.modulation == "cpu":
            raise SettingsError(
                "--modulation is cpu, expected auto, precomputed or gpu: what the host computes is rounded differently "
                "from a GPU; --gpu-blocks and --max-gpu-memory save memory exactly"
            )
        return MemoryOptions.from_flags(
            modulation=auto if self.modulation == "auto" else self.modulation,
            gpu_blocks=self.gpu_blocks,
            quantize=quantize,
            # Checkpointing has no effect without gradients, but quantized weights are refused without it.
            activation_checkpointing=1 if quantize in ("int8", "fp8") else 0,
        )


class MemoryOptions(WeightPlacement):
    """All options except `quantize`, `compile` and (with a GPU) modulation "cpu" keep the results bit for bit.

    modulation: "precomputed" keeps the modulation vectors of the recorded conditions instead of their weights
        (models/memory/modulation_table.py); "cpu" keeps those weights in host memory and computes the vectors a batch
        ahead (models/memory/host_modulation.py); "gpu" keeps them with the other weights; "auto" is "precomputed" if a
        table is possible and smaller, "cpu" if pooled vectors are CLIP's and the weights would fill more than half of
        the GPU, else "gpu".
    activation_checkpointing: blocks that are recomputed in the backward pass: 0 none, 1 every block, n every n-th
        (models/memory/checkpointing.py).
    gpu_blocks: number of blocks that stay on the device; the others are copied from host memory for each use, and
        recomputed (models/memory/streaming.py). None: all stay.
    quantize: the weights of the blocks' linears in 8 or 4 bits (models/memory/quantized.py).
    compile: compiled blocks, which round differently (models/memory/compiling.py).
    """

    to_be_chosen: ClassVar[bool] = False
    """Whether --max-gpu-memory may still choose options that are not given."""

    activation_checkpointing: Annotated[int, Flag(group=MEMORY, metavar="N")] = Field(
        default=0,
        ge=0,
        description="Recompute every N-th block of the transformer in the backward pass, to save memory; 0: none.",
    )
    quantize: Annotated[Quantization, Flag(group=MEMORY)] = Field(
        default="none",
        description="Quantize the transformer's blocks to 8 or 4 bits; this biases the teacher, see --replay-check.",
    )
    compile: Annotated[bool, Flag(group=MEMORY, rare=True)] = Field(
        default=False, description="Compile the transformer's blocks, once per shape: faster, with different rounding."
    )

    @model_validator(mode="after")
    def _streaming_computes_every_block_twice(self) -> Self:
        if self.gpu_blocks is not None and self.activation_checkpointing > 1:
            raise ValueError(
                f"activation-checkpointing is {self.activation_checkpointing} with gpu-blocks, expected 0 or 1: "
                "streamed blocks are always recomputed, and 1 also recomputes the resident ones"
            )
        return self

    @model_validator(mode="after")
    def _quantized_blocks_stay_on_the_device(self) -> Self:
        if self.quantize != "none" and self.gpu_blocks is not None:
            raise ValueError(
                f"quantize is {self.quantize} with gpu-blocks {self.gpu_blocks}, expected one of the two: "
                f"streaming is only for exact weights; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _eight_bit_weights_are_checkpointed(self) -> Self:
        if self.quantize in ("int8", "fp8") and self.activation_checkpointing != 1 and not self.to_be_chosen:
            raise ValueError(
                f"quantize is {self.quantize} with activation-checkpointing {self.activation_checkpointing}, expected "
                "1: each linear keeps an unquantized copy of its weight until its backward pass, more than "
                "quantization saves; give --activation-checkpointing 1, or --quantize nf4"
            )
        return self


PLAIN = MemoryOptions()


def takes_host(options: MemoryOptions, *, pooled_varies: bool, weights_bytes: int, gpu_bytes: float | None) -> bool:
    """Whether the host computes the modulation vectors.

    pooled_varies: whether each prompt has its own pooled vector.
    weights_bytes: size of the whole transformer.
    gpu_bytes: total memory of the GPU; None without a GPU.

    "auto" uses the host if the weights would fill more than half of the GPU; otherwise the saving is not worth the
    different rounding. It does not depend on options that may change on resume.
    """
    if options.modulation != "auto":
        return options.modulation == "cpu"
    if not pooled_varies or gpu_bytes is None:
        return False
    return 2 * weights_bytes > gpu_bytes
